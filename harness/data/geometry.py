"""Resampling of images and label maps, and of predictions back to the native grid of the image.

Spline interpolation is linear in the voxels and separable, so one matrix per axis describes it. For cubic splines the
matrices come from scipy.ndimage and are applied by matrix products. For linear interpolation each output voxel depends on two
input voxels, so no matrix is needed. Both give scipy's values in single precision, several times faster than scipy.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from harness.api.task import Task

SLAB_BYTES = 64 * 2**20  # bytes of probabilities on the native grid that are in memory at a time


@dataclass(frozen=True)
class Geometry:
    """Position of a preprocessed volume in its native grid, used to bring predictions back to that grid.

    Attributes:
        shape: extent of the native grid in voxels.
        affine: of the native grid, from voxels to mm.
        box: the foreground, (start, stop) per axis of the canonical (RAS) grid, in native voxels.
        spacing: voxel edges of the preprocessed volume in mm, along the canonical axes.
    """

    shape: tuple[int, int, int]
    affine: list[list[float]]
    box: tuple[tuple[int, int], ...]
    spacing: tuple[float, float, float]

    def decide(self, task: Task, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Masks (targets, x, y, z) on the native grid from probabilities (outputs, x, y, z) on the preprocessed grid.

        Probabilities are resampled (linear) and then decided, one slab at a time. Masks are false outside the foreground.
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
            for axis, taps in enumerate((x.restricted(start, start + rows), y, z), start=1):
                slab = taps.apply(slab, axis)
            inside[:, start : start + rows] = task.decide(slab)
        identity = np.column_stack([np.arange(3), np.ones(3)])
        back = nib.orientations.ornt_transform(identity, to_canonical)
        return np.stack([nib.orientations.apply_orientation(mask, back) for mask in masks])


def resample(values: NDArray[np.float32], extent: Sequence[int], order: int) -> NDArray[np.float32]:
    """Resample an image (x, y, z) to `extent` voxels over the same physical box, by splines of `order`.

    Voxel i of an axis is centred at (i + 0.5) voxel edges from the border of the box.
    """
    # The axis that shrinks most comes first, so that the other axes have fewer voxels to compute.
    for axis in sorted(range(3), key=lambda axis: extent[axis] / values.shape[axis]):
        old, new = values.shape[axis], extent[axis]
        if order == 1:
            values = _taps(old, new).apply(values, axis)
        elif old != new:
            values = _multiply_along(values, _spline_matrix(old, new, order), axis)
    return values


def resample_label(label: NDArray[np.uint8], extent: Sequence[int]) -> NDArray[np.uint8]:
    """Resample a label map (x, y, z) to `extent` voxels: each label linearly, then the largest share of a voxel wins.

    Nearest-neighbour interpolation would leave stair steps. Each label is resampled in its own bounding box, and only the
    largest share so far is kept, so that the memory does not grow with the number of labels.
    """
    taps = [_taps(old, new) for old, new in zip(label.shape, extent, strict=True)]
    winner = np.zeros(extent, dtype=np.uint8)
    largest_share, sum_of_shares = np.zeros(extent, dtype=np.float32), np.zeros(extent, dtype=np.float32)
    for number, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        # The box gets a margin of one voxel, because linear interpolation reaches that far.
        source_box = tuple(
            slice(max(0, span.start - 1), min(n, span.stop + 1)) for span, n in zip(box, label.shape, strict=True)
        )
        share = (label[source_box] == number).astype(np.float32)
        target_box = tuple(axis_taps.reached(span) for axis_taps, span in zip(taps, source_box, strict=True))
        for axis, (axis_taps, span, target_span) in enumerate(zip(taps, source_box, target_box, strict=True)):
            share = axis_taps.restricted(target_span.start, target_span.stop).shifted(span.start).apply(share, axis)
        sum_of_shares[target_box] += share
        larger = share > largest_share[target_box]
        largest_share[target_box][larger] = share[larger]
        winner[target_box][larger] = number
    # The background has the rest of the shares; of equal shares the lower label wins, as with argmax.
    winner[1 - sum_of_shares >= largest_share] = 0
    return winner


@dataclass(frozen=True)
class _Taps:
    """Linear interpolation along an axis.

    Output i is (1 - `share[i]`) times input `low[i]` plus `share[i]` times input `high[i]`.
    """

    low: NDArray[np.intp]
    high: NDArray[np.intp]
    share: NDArray[np.float32]

    def restricted(self, start: int, stop: int) -> "_Taps":
        """Interpolation of the outputs from `start` to `stop` (excluded) only."""
        return _Taps(self.low[start:stop], self.high[start:stop], self.share[start:stop])

    def shifted(self, start: int) -> "_Taps":
        """The same interpolation for an input whose first voxel is number `start` of the present one."""
        return _Taps(self.low - start, self.high - start, self.share)

    def reached(self, span: slice) -> slice:
        """The range of outputs that depend on inputs in `span` only."""
        inside = np.flatnonzero((self.low >= span.start) & (self.high < span.stop))
        return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)

    def apply(self, values: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
        """Interpolate `values` along `axis`."""
        lower = values.take(self.low, axis)
        if not self.share.any():
            return lower
        result = values.take(self.high, axis)
        result -= lower
        result *= self.share.reshape([-1 if index == axis else 1 for index in range(values.ndim)])
        result += lower
        return result


@lru_cache(maxsize=256)
def _taps(old: int, new: int) -> _Taps:
    """Linear interpolation from `old` to `new` voxels over the same length; constant outside the first and last centre."""
    position = ((np.arange(new) + 0.5) * old / new - 0.5).clip(0, old - 1)
    low = np.floor(position).astype(np.intp)
    return _Taps(low, np.minimum(low + 1, old - 1), (position - low).astype(np.float32))


@lru_cache(maxsize=256)
def _spline_matrix(old: int, new: int, order: int) -> NDArray[np.float32]:
    """Matrix (new, old) of the spline interpolation of `order` from `old` to `new` voxels."""
    columns = [ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in np.eye(old)]
    return np.stack(columns, axis=1).astype(np.float32)


def _multiply_along(values: NDArray[np.float32], matrix: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Multiply an array (x, y, z) along `axis` by a matrix (new, old)."""
    if axis == 2:
        return values @ matrix.T
    if axis == 1:
        return matrix @ values
    x, y, z = values.shape
    return (matrix @ values.reshape(x, y * z)).reshape(-1, y, z)
