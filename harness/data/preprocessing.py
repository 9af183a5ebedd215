"""Preprocesses one case in memory: orientation, crop to the foreground, intensities, spacing."""

from collections.abc import Iterable, Sequence
from functools import partial
from math import prod

import nibabel as nib
import numpy as np
import psutil
from numpy.typing import NDArray

from harness.api.task import ImageSet, Normalisation, Percentiles, Window, ZScore
from harness.data.cases import LoadedCase
from harness.data.geometry import Geometry, resample, resample_label
from harness.system.errors import UserError

POINTS_PER_TARGET = 2000
STEPS = 32767  # number of int16 steps in [0, 1]; a step is 3e-5, far below any noise
Z_STEPS, Z_LIMIT = (
    1024,
    31.0,
)  # int16 steps per standard deviation, and the number of deviations beyond which values are cut


def steps_of(how: Normalisation) -> int:
    """Number of int16 steps per unit of intensity in the cache."""
    return Z_STEPS if isinstance(how, ZScore) else STEPS


def quantise(image: NDArray[np.float32], steps: int = STEPS) -> NDArray[np.int16]:
    """Intensities as the int16 steps that the cache holds, `steps` per unit."""
    return np.rint(image * np.float32(steps)).astype(np.int16)


def preprocess(
    images: ImageSet, loaded: LoadedCase, source: str
) -> tuple[NDArray[np.float32], NDArray[np.uint8] | None, Geometry]:
    """Preprocess a case: image (C, x, y, z), label (x, y, z) or None, and geometry. No file is read or written.

    Args:
        source: path or name of the image, for messages.

    Raises:
        UserError: a channel has no contrast, or as `preprocessed_extent`.
    """
    orientation = nib.orientations.io_orientation(loaded.affine)
    turn = partial(nib.orientations.apply_orientation, ornt=orientation)
    channels = [turn(channel) for channel in loaded.image]
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = loaded.spacing
    box = _foreground(channels, images)
    spans = tuple(slice(start, stop) for start, stop in box)
    target = spacing if images.spacing is None else np.asarray(images.spacing)
    shape = [stop - start for start, stop in box]
    extent = preprocessed_extent(shape, spacing, target, len(channels), source)
    image = np.empty((len(channels), *extent), dtype=np.float32)
    for index, channel in enumerate(channels):
        # Cubic splines as in nnU-Net. They overshoot at edges, so the result is clipped.
        scaled = normalise(channel[spans], images.normalisation, source)
        low, high = (-Z_LIMIT, Z_LIMIT) if isinstance(images.normalisation, ZScore) else (0, 1)
        image[index] = scaled if extent == shape else resample(scaled, extent, order=3).clip(low, high)
    label = None
    if loaded.label is not None:
        label = np.ascontiguousarray(turn(loaded.label)[spans])
        label = label if extent == shape else resample_label(label, extent)
    x, y, z = loaded.image.shape[1:]
    geometry = Geometry(
        shape=(x, y, z),
        affine=loaded.affine.tolist(),
        box=box,
        spacing=(float(target[0]), float(target[1]), float(target[2])),
    )
    return image, label, geometry


def preprocessed_extent(
    shape: Iterable[int], spacing: Iterable[float], target: Iterable[float], channels: int, source: str
) -> list[int]:
    """Voxels per axis of an image of `shape` and `spacing` after resampling to the spacing `target`, both in mm.

    Raises:
        UserError: the spacing cannot be right, because it gives fewer than two voxels along an axis, or more voxels than
            the free memory holds.
    """
    extent = [max(1, round(n * float(old) / float(new))) for n, old, new in zip(shape, spacing, target, strict=True)]
    need, free = 4 * prod(extent) * (channels + 2), psutil.virtual_memory().available
    if need > free or min(extent) < 2:
        grids = f"{' x '.join(f'{edge:.3g}' for edge in spacing)} to {' x '.join(f'{edge:.3g}' for edge in target)} mm"
        raise UserError(
            f"{source}: resampling it from {grids} gives {' x '.join(map(str, extent))} voxels, {need / 2**30:.1f} GiB of "
            f"{free / 2**30:.1f} GiB that are free: is its spacing in mm? Mend the header, or set another task.spacing"
        )
    return extent


LEAST_CONTRAST = 0.02
"""Smallest share of a window that the values of an image must span."""


def normalise(channel: NDArray[np.float32], how: Normalisation, source: str) -> NDArray[np.float32]:
    """Scale a channel (x, y, z): to [0.001, 1], where 0 is kept for voxels without an intensity (as in HybridMIM's code), or
    to mean 0 and standard deviation 1.

    Raises:
        UserError: the channel has no contrast.
    """
    if isinstance(how, ZScore):
        mean, deviation = float(channel.mean(dtype=np.float64)), float(channel.std(dtype=np.float64))
        if not deviation > 1e-6 * max(1.0, abs(mean)):
            raise UserError(f"{source}: a channel has the same value {mean:g} everywhere: restore the image")
        return ((channel - np.float32(mean)) * np.float32(1 / deviation)).clip(-Z_LIMIT, Z_LIMIT)
    if isinstance(how, Window):
        low, high = how.low, how.high
    else:
        present = channel[channel != 0]
        if not present.size:
            raise UserError(f"{source}: a channel has the same value 0 everywhere: restore the image")
        low, high = (float(value) for value in np.percentile(present, [how.low, how.high]))
        if not low < high:
            raise UserError(f"{source}: a channel has the same value {low:g} nearly everywhere: restore the image")
    scaled = channel - np.float32(low)
    scaled *= np.float32(0.999 / (high - low))
    scaled.clip(0, np.float32(0.999), out=scaled)
    if isinstance(how, Window) and not float(scaled.max() - scaled.min()) > LEAST_CONTRAST:
        raise UserError(
            f"{source}: its values from {channel.min():g} to {channel.max():g} have no contrast in the window from {low:g} to "
            f"{high:g} HU: are they Hounsfield units? Convert the image again, or give the window that its values need"
        )
    scaled += np.float32(0.001)
    if isinstance(how, Percentiles):
        scaled *= channel != 0
    return scaled


def _foreground(channels: Sequence[NDArray[np.float32]], images: ImageSet) -> tuple[tuple[int, int], ...]:
    """Smallest box that holds the foreground of all channels, (start, stop) per axis; the whole image if there is none."""
    inside = np.zeros(channels[0].shape, dtype=np.bool_)
    for channel in channels:
        inside |= channel > images.normalisation.low if isinstance(images.normalisation, Window) else channel != 0
    box: list[tuple[int, int]] = []
    for axis in range(3):
        indices = np.flatnonzero(inside.any(axis=tuple(other for other in range(3) if other != axis)))
        box.append((int(indices[0]), int(indices[-1]) + 1) if len(indices) else (0, inside.shape[axis]))
    return tuple(box)


def label_points(images: ImageSet, label: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Voxels of each target, for crops centred on the foreground: rows of (target number, x, y, z).

    At most POINTS_PER_TARGET per target. They are spread evenly over its voxels, so no random numbers are needed.
    """
    rows = [np.zeros((0, 4), dtype=np.int64)]
    for number, values in enumerate(images.targets.values()):
        flat = np.flatnonzero(np.isin(label, values))
        selected = flat[np.linspace(0, len(flat) - 1, min(len(flat), POINTS_PER_TARGET)).astype(int)]
        rows.append(np.column_stack([np.full(len(selected), number), *np.unravel_index(selected, label.shape)]))
    return np.concatenate(rows).astype(np.int32)
