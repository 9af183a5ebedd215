"""Dice and HD95 of one mask against its reference, with an explicit policy for empty masks.

Definitions are those of `monai.metrics` (and of Metrics Reloaded): Dice = 2|A & B| / (|A| + |B|); HD95 = the larger
of the two directed 95th percentiles of surface distances, in mm. The surface is what a 6-neighbour erosion removes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.spatial import KDTree

POLICY = "empty-is-worst-v1"
"""Name of the rule for empty masks, kept with every row.

Reference there, prediction empty ("missed"), and the reverse ("spurious"): Dice 0, HD95 the diagonal of the image.
Both empty ("empty"): the case is left out of the averages of that target, and counted.
"""


@dataclass(frozen=True)
class Score:
    """One target of one case; `dice` and `hd95_mm` are None where `status` is "empty"."""

    status: str
    dice: float | None
    hd95_mm: float | None


def score(prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float]) -> Score:
    """Score one mask (x, y, z) against its reference on the same grid; `spacing` in mm per axis.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} must have one shape")
    predicted, present = bool(prediction.any()), bool(reference.any())
    if not predicted and not present:
        return Score("empty", None, None)
    if predicted != present:
        diagonal = float(np.linalg.norm(np.asarray(reference.shape) * np.asarray(spacing)))
        return Score("missed" if present else "spurious", 0.0, diagonal)
    # Both masks lie in one small box of the image; nothing outside can matter.
    box = _box(prediction | reference)
    prediction, reference = prediction[box], reference[box]
    overlap = np.count_nonzero(prediction & reference)
    dice = 2 * overlap / (np.count_nonzero(prediction) + np.count_nonzero(reference))
    return Score("scored", float(dice), hausdorff95(prediction, reference, spacing))


def hausdorff95(first: NDArray[np.bool_], second: NDArray[np.bool_], spacing: Sequence[float]) -> float:
    """The larger of the two directed 95th percentiles of surface distances in mm; neither mask may be empty."""
    points = [surface(mask) * np.asarray(spacing) for mask in (first, second)]
    directed = [KDTree(there).query(here)[0] for here, there in (points, points[::-1])]
    return float(max(np.percentile(distances, 95) for distances in directed))


def surface(mask: NDArray[np.bool_]) -> NDArray[np.intp]:
    """Voxels of the mask (rows of indices) with a face neighbour outside it; beyond the array is outside."""
    # Six shifted views of a padded copy: several times faster than scipy's general erosion, and equal to it.
    padded = np.pad(mask, 1)
    inside = mask.copy()
    for axis in range(3):
        for step in (0, 2):
            view = [slice(1, -1)] * 3
            view[axis] = slice(step, step + mask.shape[axis])
            inside &= padded[tuple(view)]
    return np.argwhere(mask & ~inside)


def _box(mask: NDArray[np.bool_]) -> tuple[slice, ...]:
    (found,) = ndimage.find_objects(mask.astype(np.uint8))
    box: tuple[slice, ...] = found
    return box
