"""Dice, HD95 and surface Dice of all targets of a case, with an explicit policy for empty masks.

Dice = 2|A & B| / (|A| + |B|). The field has several definitions of the other two; `Scoring` names the one that is used:

- `max-directed` (`monai.metrics`, Metrics Reloaded; the default): the larger of the two directed 95th percentiles of the
  distances between surface voxels, which are what a 6-neighbour erosion removes.
- `pooled` (`medpy.metric.hd95`): the 95th percentile of both directions' distances together.
- `area-weighted` (DeepMind's `surface-distance`): surfaces by marching cubes, percentiles by area; the larger direction.

Surface Dice (Nikolov et al. 2021, arXiv:1809.04430, section "surface Dice") is the share of both surfaces, counted in voxels or
by area as the definition has it, that lies within a tolerance of the other one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import Definition, Empty
from harness.evaluation import surfaces
from harness.evaluation.surfaces import BITS, Codes, Surfaces

VERSION = 1
"""Of what is computed; records of another version are never compared with these."""


@dataclass(frozen=True)
class Scoring:
    """What is computed, by which definition.

    Attributes:
        empty: where one mask is empty and the other is not ("missed", "spurious"), Dice is 0 and
            `worst`: HD95 is the diagonal of the image. Where both are empty ("empty"), the case is left out and counted.
            `skipped`: HD95 has no value, as averages over MONAI's results have it; else as `worst`. Flatters who misses.
            `perfect`: as `worst`, but where both are empty Dice is 1 and HD95 0, as in BraTS.
        tolerance: of surface Dice, in mm.
    """

    hd95: Definition = "max-directed"
    empty: Empty = "worst"
    tolerance: float = 1.0

    @property
    def policy(self) -> str:
        """Name with version, kept with every row."""
        name = f"empty-is-{self.empty}-v{VERSION}"
        return name if self.hd95 == "max-directed" else f"{name}+hd95-{self.hd95}"


@dataclass(frozen=True)
class Score:
    """One target of one case; what has no value is None."""

    status: str
    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None


DEFAULT = Scoring()


def score(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float], scoring: Scoring = DEFAULT
) -> list[Score]:
    """Masks (targets, x, y, z) against their reference on the same grid; `spacing` in mm per axis.

    Raises:
        ValueError: the shapes differ.
    """
    if prediction.shape != reference.shape or prediction.ndim != 4:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} must have one shape of 4 axes")
    scores = []
    for start in range(0, len(prediction), BITS):
        group = slice(start, start + BITS)
        mine, theirs = (_encode(masks[group]) for masks in (prediction, reference))
        scores += _score(mine, theirs, len(prediction[group]), spacing, scoring)
    return scores


def score_labels(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    targets: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
    scoring: Scoring = DEFAULT,
) -> list[Score]:
    """Two label maps (x, y, z) of values 0..65535; each of `targets` is made up of label values. Otherwise as `score`."""
    if prediction.shape != reference.shape or prediction.ndim != 3:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} must have one shape of 3 axes")
    values = list(targets.values())
    scores = []
    for start in range(0, len(values), BITS):
        group = values[start : start + BITS]
        table = np.zeros(
            1 + max(65535 if label.dtype.itemsize > 1 else 255 for label in (prediction, reference)), np.uint16
        )
        for bit, labels in enumerate(group):
            table[list(labels)] |= np.uint16(1 << bit)
        scores += _score(table[prediction], table[reference], len(group), spacing, scoring)
    return scores


def hausdorff95(
    first: NDArray[np.bool_],
    second: NDArray[np.bool_],
    spacing: Sequence[float],
    definition: Definition = "max-directed",
) -> float:
    """HD95 in mm of two masks (x, y, z), neither of them empty."""
    found = score(first[None], second[None], spacing, Scoring(hd95=definition))[0]
    if found.status != "scored" or found.hd95_mm is None:
        raise ValueError("HD95 needs two masks that are not empty")
    return found.hd95_mm


def _encode(masks: NDArray[np.bool_]) -> Codes:
    codes = np.zeros(masks.shape[1:], np.uint16)
    for bit, mask in enumerate(masks):
        codes |= mask.astype(np.uint16) << np.uint16(bit)
    return codes


def _score(mine: Codes, theirs: Codes, number: int, spacing: Sequence[float], scoring: Scoring) -> list[Score]:
    counts = surfaces.count(mine, theirs, number)
    diagonal = float(np.linalg.norm(np.asarray(mine.shape) * np.asarray(spacing)))
    if scoring.hd95 == "area-weighted":
        sides = [surfaces.surface_cells(codes, number, spacing) for codes in (mine, theirs)]
    else:
        sides = [surfaces.surface_voxels(codes, number) for codes in (mine, theirs)]
    scores = []
    for mask, (predicted, present, both) in enumerate(counts.tolist()):
        if predicted and present:
            hd95, surface_dice = _compare(sides[0], sides[1], mask, spacing, scoring)
            scores.append(Score("scored", 2 * both / (predicted + present), hd95, surface_dice))
        elif predicted or present:
            worst = None if scoring.empty == "skipped" else diagonal
            scores.append(Score("missed" if present else "spurious", 0.0, worst, 0.0))
        else:
            scores.append(Score("empty", *((1.0, 0.0, 1.0) if scoring.empty == "perfect" else (None, None, None))))
    return scores


def _compare(
    mine: Surfaces, theirs: Surfaces, mask: int, spacing: Sequence[float], scoring: Scoring
) -> tuple[float, float]:
    """HD95 and surface Dice of one target."""
    there = surfaces.distances(mine, theirs, mask, spacing)
    back = surfaces.distances(theirs, mine, mask, spacing)
    areas = [side.masks[mask].weights for side in (mine, theirs)]
    if scoring.hd95 == "max-directed":
        hd95 = float(max(np.percentile(there, 95), np.percentile(back, 95)))
    elif scoring.hd95 == "pooled":
        hd95 = float(np.percentile(np.concatenate([there, back]), 95))
    else:
        hd95 = max(_percentile_by_area(there, areas[0]), _percentile_by_area(back, areas[1]))
    # A distance that is the tolerance up to rounding is within it.
    limit = scoring.tolerance * (1 + 1e-9)
    if scoring.hd95 == "area-weighted":
        within, total = areas[0][there <= limit].sum() + areas[1][back <= limit].sum(), areas[0].sum() + areas[1].sum()
    else:
        within, total = np.count_nonzero(there <= limit) + np.count_nonzero(back <= limit), len(there) + len(back)
    return hd95, float(within / total)


def _percentile_by_area(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    """The smallest distance within which 95 % of the area lies."""
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order[min(int(np.searchsorted(share, 0.95)), len(order) - 1)]])
