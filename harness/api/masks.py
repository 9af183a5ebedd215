"""Random masks on the device, without waiting for it: patches and boxes."""

from collections.abc import Sequence
from math import floor, prod

import torch
from torch import Tensor

from harness.api.global_batch import rand
from harness.system.errors import UserError


def num_masked(extent: Sequence[int], patch: Sequence[int], ratio: float) -> tuple[int, int]:
    """Masked patches and all patches of a crop. 216 patches at 0.4: 87, since the kept ones are rounded down.

    Raises:
        UserError: the patch does not divide the crop, or the ratio leaves none masked or none visible.
    """
    size, edge = ",".join(map(str, extent)), ",".join(map(str, patch))
    if any(length % side for length, side in zip(extent, patch, strict=True)):
        raise UserError(f"method.patch={edge} does not divide the crop {size}: set pretrain.crop to a multiple of it")
    total = prod(length // side for length, side in zip(extent, patch, strict=True))
    # The small term keeps a product such as 0.6 * 5 = 2.9999999999999996 from losing one patch.
    masked = total - floor(total * (1 - ratio) + 1e-9)
    if not 0 < masked < total:
        raise UserError(
            f"method.mask_ratio={ratio:g} masks {masked} of the {total} patches of {edge} in the crop {size}: "
            "set it, method.patch or pretrain.crop so that some are masked and some are not"
        )
    return masked, total


def random_patches(image: Tensor, patch: Sequence[int], ratio: float, generator: torch.Generator | None) -> Tensor:
    """Masked patches of every sample, (N, patches x, y, z) bool: the same number, drawn independently."""
    masked, total = num_masked(image.shape[2:], patch, ratio)
    grid = [length // side for length, side in zip(image.shape[2:], patch, strict=True)]
    scores = rand((len(image), total), image.device, generator)
    return (scores.argsort(dim=1).argsort(dim=1) >= total - masked).view(len(image), *grid)


def to_voxels(patches: Tensor, patch: Sequence[int]) -> Tensor:
    """Patch mask (N, x, y, z) -> voxel mask (N, 1, x, y, z)."""
    for axis, edge in enumerate(patch, start=1):
        patches = patches.repeat_interleave(edge, dim=axis)
    return patches[:, None]


def inside_boxes(start: Tensor, stop: Tensor, extent: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each index lies in each box, per axis: (N, K, 3) bounds -> three (N, K, length) bool.

    The box is their outer product; keeping the axes apart costs next to nothing.
    """
    spans = []
    for axis, length in enumerate(extent):
        index = torch.arange(length, device=start.device)
        spans.append((index >= start[..., axis, None]) & (index < stop[..., axis, None]))
    return spans[0], spans[1], spans[2]


def any_box(start: Tensor, stop: Tensor, extent: Sequence[int]) -> Tensor:
    """Union of K boxes per sample, (N, K, 3) bounds -> (N, 1, x, y, z) bool."""
    x, y, z = (span.float() for span in inside_boxes(start, stop, extent))
    return torch.einsum("nkx,nky,nkz->nxyz", x, y, z)[:, None] > 0


def random_integers(
    low: int | Tensor, high: int | Tensor, shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """Uniform whole numbers low..high, both included; the bounds may be tensors of that shape on the device."""
    drawn = rand(shape, device, generator)
    # The product may round up to the bound that it must stay below.
    found: Tensor = (low + (drawn * (high - low + 1)).floor()).clamp(max=high)
    return found.long()
