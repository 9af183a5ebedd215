"""Random masks, made of patches or of boxes. They are computed on the device, and the host does not wait for it."""

from collections.abc import Sequence
from math import floor, prod

import torch
from torch import Tensor

from harness.api.global_batch import rand
from harness.api.settings import size_text
from harness.system.errors import UserError


def num_masked(extent: Sequence[int], patch: Sequence[int], ratio: float) -> tuple[int, int]:
    """Number of masked patches in a crop, and number of all its patches.

    The number of visible patches is rounded down: of 216 patches at a ratio of 0.4, 87 are masked.

    Args:
        extent: of the crop, in voxels.
        patch: extent of a patch, in voxels.
        ratio: share of the patches to mask, in 0..1.

    Raises:
        UserError: the patch does not divide the crop, or the ratio leaves no patch masked or no patch visible.
    """
    size, edge = size_text(extent), size_text(patch)
    if any(length % side for length, side in zip(extent, patch, strict=True)):
        raise UserError(f"method.patch={edge} does not divide the crop {size}: set pretrain.crop to a multiple of it")
    num_patches = prod(length // side for length, side in zip(extent, patch, strict=True))
    # The small term keeps a product such as 0.6 * 5 = 2.9999999999999996 from losing one patch.
    masked = num_patches - floor(num_patches * (1 - ratio) + 1e-9)
    if not 0 < masked < num_patches:
        raise UserError(
            f"method.mask_ratio={ratio:g} masks {masked} of the {num_patches} patches of {edge} in the crop {size}: "
            "set it, method.patch or pretrain.crop so that some are masked and some are not"
        )
    return masked, num_patches


def random_patches(image: Tensor, patch: Sequence[int], ratio: float, generator: torch.Generator | None) -> Tensor:
    """Patch mask of every sample, True is masked: the same number of patches in each, drawn independently.

    Args:
        image: (N, C, x, y, z); only its shape and its device are used.
        patch: extent of a patch, in voxels.
        ratio: share of the patches to mask, in 0..1.
        generator: `Method.generator`.

    Returns:
        (N, x / patch[0], y / patch[1], z / patch[2]) bool.

    Raises:
        UserError: as `num_masked`.
    """
    masked, num_patches = num_masked(image.shape[2:], patch, ratio)
    grid = [length // side for length, side in zip(image.shape[2:], patch, strict=True)]
    scores = rand((len(image), num_patches), image.device, generator)
    return (scores.argsort(dim=1).argsort(dim=1) >= num_patches - masked).view(len(image), *grid)


def to_voxels(patches: Tensor, patch: Sequence[int]) -> Tensor:
    """Patch mask (N, patches along x, y, z) -> voxel mask (N, 1, x, y, z). `patch` is the extent of a patch in voxels."""
    for axis, edge in enumerate(patch, start=1):
        patches = patches.repeat_interleave(edge, dim=axis)
    return patches[:, None]


def inside_boxes(start: Tensor, stop: Tensor, extent: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """For each axis, whether a voxel index lies in each of K boxes per sample.

    A box is the outer product of its three results. They are returned separately because this takes far less memory and
    time than a mask of voxels.

    Args:
        start, stop: bounds of the boxes in voxels, (N, K, 3); `stop` is excluded.
        extent: of the image, in voxels.

    Returns:
        One bool tensor per axis, (N, K, extent[axis]).
    """
    spans = []
    for axis, length in enumerate(extent):
        index = torch.arange(length, device=start.device)
        spans.append((index >= start[..., axis, None]) & (index < stop[..., axis, None]))
    return spans[0], spans[1], spans[2]


def any_box(start: Tensor, stop: Tensor, extent: Sequence[int]) -> Tensor:
    """Union of K boxes per sample: bounds (N, K, 3), as for `inside_boxes` -> voxel mask (N, 1, x, y, z) bool."""
    x, y, z = (span.float() for span in inside_boxes(start, stop, extent))
    return torch.einsum("nkx,nky,nkz->nxyz", x, y, z)[:, None] > 0


def random_integers(
    low: int | Tensor, high: int | Tensor, shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Uniform whole numbers from `low` to `high`, both included, as an int64 tensor of `shape`.

    Args:
        low, high: numbers, or tensors on the device whose shape broadcasts with `shape`.
        generator: as for `harness.rand`.
    """
    drawn = rand(shape, device, generator)
    # The product may round up to the number of values, which would give high + 1.
    integers: Tensor = (low + (drawn * (high - low + 1)).floor()).clamp(max=high)
    return integers.long()
