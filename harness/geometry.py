"""Between grids: resampling, and the way of a prediction back to the image's own grid.

Spline interpolation is linear in the voxels and separable, so it is a matrix per axis. The matrices come from
scipy.ndimage and are applied by matrix products: the same values, several times faster, in single precision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from harness.task import Task

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
        matrices = [_operator(old, new, 1) for old, new in zip(probabilities.shape[1:], extent, strict=True)]
        rows = max(1, SLAB_BYTES // (4 * len(probabilities) * extent[1] * extent[2]))
        for start in range(0, extent[0], rows):
            part = matrices[0][start : start + rows]
            used = np.flatnonzero(part.any(axis=0))
            near = slice(int(used[0]), int(used[-1]) + 1)
            slab = probabilities[:, near]
            for axis, matrix in enumerate((part[:, near], *matrices[1:])):
                slab = _along(slab, matrix, axis)
            inside[:, start : start + rows] = task.decide(slab)
        identity = np.column_stack([np.arange(3), np.ones(3)])
        back = nib.orientations.ornt_transform(identity, to_canonical)
        return np.stack([nib.orientations.apply_orientation(mask, back) for mask in masks])


def resample(values: NDArray[np.float32], extent: Sequence[int], order: int) -> NDArray[np.float32]:
    """(x, y, z) onto `extent` voxels over the same physical box (voxel centres at half steps); splines of `order`."""
    # The axis that shrinks most comes first: less work for the others.
    for axis in sorted(range(3), key=lambda axis: extent[axis] / values.shape[axis]):
        values = _along(values, _operator(values.shape[axis], extent[axis], order), axis)
    return values


def resample_label(label: NDArray[np.uint8], extent: Sequence[int]) -> NDArray[np.uint8]:
    """Label by label, linear, the largest share wins: nearest-neighbour would leave stair steps.

    Each label is resampled in its own box, and only the best so far is kept, so memory does not grow with their number.
    """
    matrices = [_operator(old, new, 1) for old, new in zip(label.shape, extent, strict=True)]
    winner = np.zeros(extent, dtype=np.uint8)
    best, taken = np.zeros(extent, dtype=np.float32), np.zeros(extent, dtype=np.float32)
    for number, box in enumerate(ndimage.find_objects(label), start=1):
        if box is None:
            continue
        share = (label[box] == number).astype(np.float32)
        where = []
        for axis, matrix in enumerate(matrices):
            part = matrix[:, box[axis]]
            reached = np.flatnonzero(part.any(axis=1))
            if not len(reached):
                break
            where.append(slice(int(reached[0]), int(reached[-1]) + 1))
            share = _along(share, part[where[-1]], axis)
        if len(where) < 3:
            continue  # a few voxels between the new ones
        place = tuple(where)
        taken[place] += share
        better = share > best[place]
        best[place][better] = share[better]
        winner[place][better] = number
    # What is left of 1 is background; an equal share goes to the lower number, as argmax would have it.
    winner[1 - taken >= best] = 0
    return winner


@lru_cache(maxsize=256)
def _operator(old: int, new: int, order: int) -> NDArray[np.float32]:
    """(new, old): what each of `old` voxels gives to each of `new`."""
    if old == new:
        return np.eye(old, dtype=np.float32)
    columns = [ndimage.zoom(unit, new / old, order=order, mode="nearest", grid_mode=True) for unit in np.eye(old)]
    return np.stack(columns, axis=1).astype(np.float32)


def _along(values: NDArray[np.float32], matrix: NDArray[np.float32], axis: int) -> NDArray[np.float32]:
    """Apply (new, old) along one of the last three axes of (..., x, y, z)."""
    new, old = matrix.shape
    if old == new and np.array_equal(matrix, np.eye(old, dtype=np.float32)):
        return values
    if axis == 2:
        return values @ matrix.T
    if axis == 1:
        return matrix @ values
    *lead, _, y, z = values.shape
    return (matrix @ values.reshape(*lead, old, y * z)).reshape(*lead, new, y, z)
