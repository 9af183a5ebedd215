"""Means with intervals and paired differences over cases and seeds.

Arrays are (seeds, cases, targets) with NaN where a case is empty for a target. The average over targets is the mean
of the targets' means, in every resample too.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
LEVEL = (2.5, 97.5)
MIN_CASES = 2
MIN_CASES_TEST, MIN_SEEDS_TEST = 6, 2

Values = NDArray[np.float64]
Interval = tuple[float, float] | None


def mean(values: Values) -> float | None:
    """(seeds, cases, targets) -> mean over seeds and cases per target, then over targets; None where all is empty."""
    with np.errstate(invalid="ignore"):
        counts = (~np.isnan(values)).sum(axis=(0, 1))
        sums = np.nansum(values, axis=(0, 1))
    kept = counts > 0
    return float((sums[kept] / counts[kept]).mean()) if kept.any() else None


def interval(values: Values) -> Interval:
    """95 % bootstrap interval of `mean`: seeds are drawn first, then cases. None for fewer than two cases."""
    return _bootstrap(values.shape[1], lambda rng, cases: mean(_seeds(rng, values)[:, cases]))


def paired_interval(first: Values, second: Values) -> Interval:
    """95 % bootstrap interval of mean(first) - mean(second): the same cases are drawn for both."""

    def difference(rng: np.random.Generator, cases: NDArray[np.intp]) -> float | None:
        a, b = mean(_seeds(rng, first)[:, cases]), mean(_seeds(rng, second)[:, cases])
        return None if a is None or b is None else a - b

    return _bootstrap(first.shape[1], difference)


def p_value(first: Values, second: Values) -> float | None:
    """Wilcoxon signed-rank over cases, each the mean of its seeds and targets.

    None with one seed (its luck cannot be told from the method) or fewer than six cases (no test can reject).
    """
    if min(len(first), len(second)) < MIN_SEEDS_TEST:
        return None
    differences = _per_case(first) - _per_case(second)
    differences = differences[~np.isnan(differences)]
    if len(differences) < MIN_CASES_TEST or not differences.any():
        return None
    return float(stats.wilcoxon(differences).pvalue)


def holm(p_values: list[float | None]) -> list[float | None]:
    """Holm's step-down correction over the p-values that are there."""
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    worst = 0.0
    for number, (p, place) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - number)))
        corrected[place] = worst
    return corrected


def _per_case(values: Values) -> NDArray[np.float64]:
    counts = (~np.isnan(values)).sum(axis=(0, 2))
    sums = np.nansum(values, axis=(0, 2))
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _seeds(rng: np.random.Generator, values: Values) -> Values:
    return values[rng.integers(len(values), size=len(values))]


def _bootstrap(num_cases: int, statistic: Callable[[np.random.Generator, NDArray[np.intp]], float | None]) -> Interval:
    if num_cases < MIN_CASES:
        return None
    # A fixed generator: the same records give the same table.
    rng = np.random.default_rng(0)
    drawn = (statistic(rng, rng.integers(num_cases, size=num_cases)) for _ in range(RESAMPLES))
    kept = [value for value in drawn if value is not None]
    if not kept:
        return None
    low, high = np.percentile(kept, LEVEL)
    return float(low), float(high)
