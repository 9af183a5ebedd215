"""Augmentation of labelled crops in fine-tuning: the paper's, and nnU-Net's.

nnU-Net's steps, probabilities and ranges are those of `nnUNetTrainer` 2.8.1 without the cascade and the mask for zeros outside
of the brain. Their effect is compared with batchgeneratorsv2 0.3.6 in `tests/nnunet/test_augmentation.py`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import combinations
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from harness.api.settings import Triple
from harness.config.schema import Finetune
from harness.data.crops import DrawWarp, Warp

TURNED, SCALED = 0.2, 0.2  # probabilities of nnU-Net's rotation and scaling
ANGLE = np.pi / 6  # largest rotation about each axis
SCALES = (0.7, 1.4)  # voxels of the volume per voxel of the crop; objects become smaller above 1
FLAT = 3  # a crop with an edge more than that many times the shortest one is turned and scaled in its plane only

Image = NDArray[np.float32]
Step = Callable[[Image, np.random.Generator], None]


class Augment:
    """nnU-Net's changes of intensities as `finetune.nnunet_augmentation` says, then the augmentation of the paper.

    The paper (section IV-C) has flips, rotations by 90 degrees, intensity scaling and shift.
    """

    def __init__(self, settings: Finetune) -> None:
        self.settings = settings

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Flip and rotate `image` and `target` (C, x, y, z) alike; change intensities in the image only."""
        image, target, settings = sample["image"], sample["target"], self.settings
        if settings.nnunet_augmentation:
            image = change_intensities(image, settings.nnunet_augmentation, rng)
        for axis in (1, 2, 3):
            if rng.random() < settings.flip:
                image, target = np.flip(image, axis), np.flip(target, axis)
        # A rotation by 90 degrees keeps the crop's shape only in planes whose two sides are equal.
        planes = [(a, b) for a, b in combinations((1, 2, 3), 2) if image.shape[a] == image.shape[b]]
        if planes and rng.random() < settings.rotate:
            plane, turns = planes[rng.integers(len(planes))], int(rng.integers(1, 4))
            image, target = np.rot90(image, turns, plane), np.rot90(target, turns, plane)
        if rng.random() < settings.scale:
            image = image * np.float32(rng.uniform(0.9, 1.1))
        if rng.random() < settings.shift:
            image = image + np.float32(rng.uniform(-0.1, 0.1))
        return {"image": np.ascontiguousarray(image), "target": np.ascontiguousarray(target)}


def warp_drawer(settings: Finetune) -> DrawWarp | None:
    """What draws nnU-Net's rotations and scalings; None without its augmentation."""
    return partial(draw_warp, settings.nnunet_augmentation) if settings.nnunet_augmentation else None


def draw_warp(factor: float, size: Triple, rng: np.random.Generator) -> Warp | None:
    """nnU-Net's rotation about all three axes by up to 30 degrees, and scaling of all axes by 0.7 to 1.4.

    A flat crop is rotated about its shortest axis only, by any angle, and that axis is not scaled.

    Args:
        factor: on the probabilities.
    """
    turned, scaled = rng.random(2) < (factor * TURNED, factor * SCALED)
    if not (turned or scaled):
        return None
    flat = _flat_axis(size)
    matrix = np.eye(3)
    if turned:
        for axis in (0, 1, 2) if flat is None else (flat,):
            matrix = matrix @ _rotation(
                axis, rng.uniform(-ANGLE, ANGLE) if flat is None else rng.uniform(-np.pi, np.pi)
            )
    if scaled:
        scales = np.full(3, rng.uniform(*SCALES))
        if flat is not None:
            scales[flat] = 1
        matrix = matrix * scales
    return Warp(matrix)


def _flat_axis(size: Sequence[int]) -> int | None:
    """The shortest axis of a flat crop; None if the crop is not flat."""
    return int(np.argmin(size)) if max(size) > FLAT * min(size) else None


def _rotation(axis: int, angle: float) -> NDArray[np.float64]:
    """The matrix of a rotation about an axis."""
    first, second = (other for other in range(3) if other != axis)
    matrix = np.eye(3)
    matrix[first, first] = matrix[second, second] = np.cos(angle)
    matrix[first, second], matrix[second, first] = -np.sin(angle), np.sin(angle)
    return matrix


def change_intensities(image: Image, factor: float, rng: np.random.Generator) -> Image:
    """nnU-Net's changes of intensities, in its order: a new image (C, x, y, z).

    Args:
        factor: on the probabilities of the steps (`STEPS`).
    """
    image = image.copy()
    for probability, step in STEPS:
        if rng.random() < factor * probability:
            step(image, rng)
    return image


def add_noise(image: Image, rng: np.random.Generator) -> None:
    """Add Gaussian noise of one deviation to all channels."""
    image += np.float32(rng.uniform(0, 0.1)) * rng.standard_normal(image.shape, dtype=np.float32)


def blur(channel: Image, rng: np.random.Generator) -> Image:
    """Blur with a Gaussian of another width along each axis."""
    blurred: Image = gaussian_filter(channel, rng.uniform(0.5, 1, size=3), mode="mirror", truncate=6)
    return blurred


def change_brightness(channel: Image, rng: np.random.Generator) -> Image:
    """Multiply by a factor."""
    return channel * np.float32(_around_one(0.75, 1.25, rng))


def change_contrast(channel: Image, rng: np.random.Generator) -> Image:
    """Scale the distances from the mean; what leaves the old range is clipped."""
    mean = channel.mean()
    scaled = mean + (channel - mean) * np.float32(_around_one(0.75, 1.25, rng))
    return scaled.clip(channel.min(), channel.max())


def lower_resolution(channel: Image, rng: np.random.Generator) -> Image:
    """Sample down by nearest neighbours and up linearly; not along the shortest axis of a flat crop."""
    flat, factor = _flat_axis(channel.shape), rng.uniform(0.5, 1)
    small = [edge if axis == flat else max(1, round(edge * factor)) for axis, edge in enumerate(channel.shape)]
    down = F.interpolate(torch.from_numpy(channel)[None, None], small, mode="nearest-exact")
    coarse: Image = F.interpolate(down, channel.shape, mode="trilinear")[0, 0].numpy()
    return coarse


def change_gamma(channel: Image, rng: np.random.Generator, inverted: bool) -> Image:
    """Raise the intensities, scaled to 0..1, to a power; mean and deviation stay."""
    values = torch.from_numpy(-channel if inverted else channel)
    low, high = torch.aminmax(values)
    if low == high:
        return channel
    changed = ((values - low) / (high - low)).pow_(_around_one(0.7, 1.5, rng))
    changed = (changed - changed.mean()) * (values.std() / changed.std()) + values.mean()
    out: Image = (-changed if inverted else changed).numpy()
    return out


def _around_one(low: float, high: float, rng: np.random.Generator) -> float:
    """A factor: with equal chances below 1 or above, then uniform."""
    return float(rng.uniform(low, 1) if rng.random() < 0.5 else rng.uniform(1, high))


def _each_channel(change: Callable[[Image, np.random.Generator], Image], probability: float = 1.0) -> Step:
    """A step that draws for each channel anew, and changes each with a probability."""

    def step(image: Image, rng: np.random.Generator) -> None:
        """Change channels in place."""
        for channel in image:
            if probability == 1 or rng.random() < probability:
                channel[...] = change(channel, rng)

    return step


STEPS: tuple[tuple[float, Step], ...] = (
    (0.1, add_noise),
    (0.2, _each_channel(blur, 0.5)),
    (0.15, _each_channel(change_brightness)),
    (0.15, _each_channel(change_contrast)),
    (0.25, _each_channel(lower_resolution, 0.5)),
    (0.1, _each_channel(partial(change_gamma, inverted=True))),
    (0.3, _each_channel(partial(change_gamma, inverted=False))),
)
"""Probability of each step, and the step, which changes an image (C, x, y, z) in place."""
