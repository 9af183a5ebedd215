"""Dice, HD95 and surface Dice for all targets of a case, with an explicit policy for empty masks.

Dice = 2|A & B| / (|A| + |B|). The field uses several definitions of the other two; `Scoring` names the one that is used:

- `max-directed` (`monai.metrics`, Metrics Reloaded; the default): the larger of the two directed 95th percentiles of the
  distances between surface voxels. Surface voxels are those that a 6-neighbour erosion removes.
- `pooled` (`medpy.metric.hd95`): the 95th percentile of the distances of both directions together.
- `area-weighted` (DeepMind's `surface-distance`): surfaces by marching cubes, percentiles weighted by area,
  and the larger of the two directions.

Surface Dice (Nikolov et al. 2021, arXiv:1809.04430, section "surface Dice") is the share of both surfaces that lies within a
tolerance of the other surface. It is counted in voxels for the first two definitions and by area for the third.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from harness.config.schema import Definition, Empty
from harness.evaluation import surfaces
from harness.evaluation.surfaces import BITS, Codes, Surfaces

VERSION = 1
"""Version of the metrics. Records of different versions are never compared."""


@dataclass(frozen=True)
class Scoring:
    """The definitions of the scores, and the policy for empty masks.

    Attributes:
        hd95: definition of HD95 and of surface Dice.
        empty: policy for empty masks. If one mask is empty and the other is not ("missed", "spurious"), Dice is 0.
            `worst`: HD95 is then the diagonal of the image. If both are empty ("empty"), the case is left out and counted.
            `skipped`: HD95 then has no value, as in averages over MONAI's results. Missed structures drop out, which makes
            HD95 look better. Otherwise as `worst`.
            `perfect`: as `worst`, but if both are empty, Dice is 1 and HD95 is 0, as in BraTS.
        tolerance: of surface Dice, in mm.
    """

    hd95: Definition = "max-directed"
    empty: Empty = "worst"
    tolerance: float = 1.0

    @property
    def policy(self) -> str:
        """Name and version of the definitions and the policy, which are kept with every result."""
        name = f"empty-is-{self.empty}-v{VERSION}"
        return name if self.hd95 == "max-directed" else f"{name}+hd95-{self.hd95}"


@dataclass(frozen=True)
class Score:
    """The scores of one target of one case; None for a score without a value."""

    status: str
    dice: float | None
    hd95_mm: float | None
    surface_dice: float | None


DEFAULT = Scoring()


def score(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], spacing: Sequence[float], scoring: Scoring = DEFAULT
) -> list[Score]:
    """Score masks (targets, x, y, z) against their reference on the same grid; `spacing` in mm per axis.

    Raises:
        ValueError: the shapes differ, or do not have 4 axes.
    """
    if prediction.shape != reference.shape or prediction.ndim != 4:
        raise ValueError(f"prediction {prediction.shape} and reference {reference.shape} must have one shape of 4 axes")
    scores = []
    for start in range(0, len(prediction), BITS):
        group = slice(start, start + BITS)
        prediction_codes, reference_codes = (_encode(masks[group]) for masks in (prediction, reference))
        scores += _score(prediction_codes, reference_codes, len(prediction[group]), spacing, scoring)
    return scores


def score_labels(
    prediction: NDArray[np.integer],
    reference: NDArray[np.integer],
    targets: Mapping[str, Sequence[int]],
    spacing: Sequence[float],
    scoring: Scoring = DEFAULT,
) -> list[Score]:
    """Score label maps (x, y, z) with values 0..65535. Otherwise as `score`.

    Args:
        targets: the label values that make up each target.

    Raises:
        ValueError: the shapes differ, or do not have 3 axes.
    """
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
    """HD95 in mm of two masks (x, y, z). Raises ValueError if one of them is empty."""
    result = score(first[None], second[None], spacing, Scoring(hd95=definition))[0]
    if result.status != "scored" or result.hd95_mm is None:
        raise ValueError("HD95 needs two masks that are not empty")
    return result.hd95_mm


def _encode(masks: NDArray[np.bool_]) -> Codes:
    """Masks (targets, x, y, z) -> codes (x, y, z), whose bit t is mask t."""
    codes = np.zeros(masks.shape[1:], np.uint16)
    for bit, mask in enumerate(masks):
        codes |= mask.astype(np.uint16) << np.uint16(bit)
    return codes


def _score(
    prediction: Codes, reference: Codes, num_masks: int, spacing: Sequence[float], scoring: Scoring
) -> list[Score]:
    """The scores of each of the `num_masks` masks in two volumes of codes."""
    counts = surfaces.count(prediction, reference, num_masks)
    diagonal = float(np.linalg.norm(np.asarray(prediction.shape) * np.asarray(spacing)))
    if scoring.hd95 == "area-weighted":
        sides = [surfaces.surface_cubes(codes, num_masks, spacing) for codes in (prediction, reference)]
    else:
        sides = [surfaces.surface_voxels(codes, num_masks) for codes in (prediction, reference)]
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
    predicted: Surfaces, reference: Surfaces, mask: int, spacing: Sequence[float], scoring: Scoring
) -> tuple[float, float]:
    """HD95 in mm and surface Dice of one mask."""
    forth = surfaces.distances(predicted, reference, mask, spacing)
    back = surfaces.distances(reference, predicted, mask, spacing)
    areas = [side.masks[mask].weights for side in (predicted, reference)]
    if scoring.hd95 == "max-directed":
        hd95 = float(max(np.percentile(forth, 95), np.percentile(back, 95)))
    elif scoring.hd95 == "pooled":
        hd95 = float(np.percentile(np.concatenate([forth, back]), 95))
    else:
        hd95 = max(_percentile_by_area(forth, areas[0]), _percentile_by_area(back, areas[1]))
    # A distance that equals the tolerance but for rounding counts as within it.
    limit = scoring.tolerance * (1 + 1e-9)
    if scoring.hd95 == "area-weighted":
        within = areas[0][forth <= limit].sum() + areas[1][back <= limit].sum()
        size = areas[0].sum() + areas[1].sum()
    else:
        within = np.count_nonzero(forth <= limit) + np.count_nonzero(back <= limit)
        size = len(forth) + len(back)
    return hd95, float(within / size)


def _percentile_by_area(distances: NDArray[np.float64], areas: NDArray[np.float64]) -> float:
    """The smallest distance in mm within which 95 % of the area lies."""
    order = np.argsort(distances, kind="stable")
    share = np.cumsum(areas[order]) / areas.sum()
    return float(distances[order[min(int(np.searchsorted(share, 0.95)), len(order) - 1)]])
