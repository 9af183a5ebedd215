"""Between grids: resampling, and the way of a prediction back to the image's own grid.

Spline interpolation is linear in the voxels and separable, so it is a matrix per axis. For cubic splines the matrices come
from scipy.ndimage and are applied by matrix products; linear interpolation has two taps. Both give scipy's values, several
times faster, in single precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from harness.api.task import Task

SLAB_BYTES = 64 * 2**20  # of probabilities on the native grid that exist at a time


@dataclass(frozen=True)
class Geometry:
    """How a prepared volume lies in its native grid, so that predictions can go back.

    Attributes:
        shape, affine: of the native grid.
        box: the foreground, (start, stop) per axis of the canonical (RAS) grid.
        spacing: of the prepared volume in mm, along the canonical axes.
    """

    shape: tuple[int, int, int]
    affine: list[list[float]]
    box: tuple[tuple[int, int], ...]
    spacing: tuple[float, float, float]

    def decide(self, task: Task, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Probabilities on the prepared grid (outputs, x, y, z) -> masks (targets, x, y, z) on the native grid.

        Probabilities are resampled (linear), then decided, a slab at a time; outside the foreground nothing is found.
        """
        to_canonical = nib.orientations.io_orientation(np.asarray(self.affine))
        canonical = [0, 0, 0]
        for axis, (target, _) in enumerate(to_canonical):
            canonical[int(target)] = self.shape[axis]
        masks = np.zeros((len(task.targets), *canonical), dtype=np.bool_)
        extent = [stop - start for start, stop in self.box]
        inside = masks[(slice(None), *(slice(start, stop) for start, stop in self.box))]
        x, y, z = (_taps(old, new) for old, new in zip(probabilities.shape[1:], extent, strict=True))
        rows = max(1, SLAB_BYTES // (4 * len(probabilities) * extent[1] * extent[2]))
        for start in range(0, extent[0], rows):
            slab = probabilities
            for axis, taps in enumerate((x.part(start, start + rows), y, z), start=1):
                slab = taps.apply(slab, axis)
            inside[:, start : start + rows] = task.decide(slab)
        identity = np.column_stack([np.arange(3), np.ones(3)])
        back = nib.orientations.ornt_transform(identity, to_canonical)
        return np.stack([nib.orientations.apply_orientation(mask, back) for mask in masks])


def resample(values: NDArray[np.float32], extent: Sequence[int], order: int) -> NDArray[np.float32]:
    """(x, y, z) onto `extent` voxels over the same physical box (voxel centres at half steps); splines of `order`."""
    # The axis that shrinks most comes first: less work for the others.
    for axis in sorted(range(3), key=lambda axis: extent[axis] / values.shape[axis]):
        old, new = values.shape[axis], extent[axis]
        if order == 1:
            values = _taps(old, new).apply(values, axis)
        elif old != new:
            values = _along(values, _operator(old, new, order), axis)
    return values


def resample_label(label: NDArray[np.uint8], extent: Sequence[int]) -> NDArray[np.uint8]:
    """Label by label, linear, the largest share wins: nearest-neighbour would leave stair steps.

    Each label is resampled in its own box, and only the best so far is kept, so memory does not grow with their number.
    """
    taps = [_taps(old, new) for old, new in zip(label.shape, extent, strict=True)]
    winner = np.zeros(extent, dtype=np.uint8)
    best, taken = np.zeros(extent, dtype=np.float32), np.zeros(extent, dtype=np.float32)
    for number, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        # A margin of one voxel, as far as linear interpolation reaches.
        wide = tuple(
            slice(max(0, span.start - 1), min(n, span.stop + 1)) for span, n in zip(box, label.shape, strict=True)
        )
        share = (label[wide] == number).astype(np.float32)
        place = tuple(each.reached(span) for each, span in zip(taps, wide, strict=True))
        for axis, (each, span, here) in enumerate(zip(taps, wide, place, strict=True)):
            share = each.part(here.start, here.stop).shifted(span.start).apply(share, axis)
        taken[place] += share
        better = share > best[place]
        best[place][better] = share[better]
        winner[place][better] = number
    # What is left of 1 is background; an equal share goes to the lower number, as argmax would have it.
    winner[1 - taken >= best] = 0
    return winner


@dataclass(frozen=True)
class _Taps:
    """Linear interpolation along an axis: output i is `low[i]` and `high[i]` in the shares 1 - `share[i]` and `share[i]`."""

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    share: NDArray[np.float32]

    def part(self, start: int, stop: int) -> "_Taps":
        """Outputs `start`..`stop`."""
        return _Taps(self.low[start:stop], self.high[start:stop], self.share[start:stop])

    def shifted(self, start: int) -> "_Taps":
        """The same for an input that begins at `start`."""
        return _Taps(self.low - start, self.high - start, self.share)

    def reached(self, span: slice) -> slice:
        """Outputs that lie within the inputs `span`, and depend on nothing else."""
        inside = np.flatnonzero((self.low >= span.start) & (self.high < span.stop))
        return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)

    def apply(self, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Interpolate along `axis`."""
        found = values.take(self.low, axis)
        if not self.share.any():
            return found
        rise = values.take(self.high, axis)
        rise -= found
        rise *= self.share.reshape([-1 if place == axis else 1 for place in range(values.ndim)])
        rise += found
        return rise


@lru_cache(maxsize=256)
def _taps(old: int, new: int) -> _Taps:
    """From `old` to `new` voxels over the same length; outside the first and last centre their values hold."""
    place = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    low = np.floor(place).astype(np.intp)
    return _Taps(low, np.minimum(low + 1, old - 1), (place - low).astype(np.float32))


@lru_cache(maxsize=256)
def _operator(old: int, new: int, order: int) -> NDArray[np.float32]:
    """(new, old): what each of `old` voxels gives to each of `new`."""
    columns = [ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in np.eye(old)]
    return np.stack(columns, axis=1).astype(np.float32)


def _along(values: NDArray[np.float32], matrix: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Apply (new, old) along an axis of (x, y, z)."""
    if axis == 2:
        return values @ matrix.T
    if axis == 1:
        return matrix @ values
    x, y, z = values.shape
    return (matrix @ values.reshape(x, y * z)).reshape(-1, y, z)
