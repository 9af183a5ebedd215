"""Means with intervals and paired differences over cases and seeds.

Arrays are (seeds, cases, targets) with NaN where a case is empty for a target. The average over targets is the mean
of the targets' means, in every resample too.
"""

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
    value = _means(values, np.ones((1, values.shape[0])), np.ones((1, values.shape[1])))[0]
    return None if np.isnan(value) else float(value)


def interval(values: Values) -> Interval:
    """95 % bootstrap interval of `mean`: seeds and cases are drawn. None for fewer than two cases."""
    seeds, cases = _drawn(len(values), 0), _drawn(values.shape[1], 1)
    return _percentiles(_means(values, seeds, cases), values.shape[1])


def paired_interval(first: Values, second: Values) -> Interval:
    """95 % bootstrap interval of mean(first) - mean(second): the same cases are drawn for both."""
    cases = _drawn(first.shape[1], 1)
    mine, theirs = _means(first, _drawn(len(first), 0), cases), _means(second, _drawn(len(second), 2), cases)
    return _percentiles(mine - theirs, first.shape[1])


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


def _drawn(number: int, stream: int) -> NDArray[np.float64]:
    """How often each of `number` things is drawn, (RESAMPLES, number). Fixed: the same records give the same table."""
    rng = np.random.default_rng((stream, number))
    return rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES).astype(float)


def _means(values: Values, seeds: NDArray[np.float64], cases: NDArray[np.float64]) -> NDArray[np.float64]:
    """`mean` under weights of the seeds (resamples, seeds) and of the cases (resamples, cases), (resamples,)."""
    there = ~np.isnan(values)
    sums = np.einsum("bs,bn,snt->bt", seeds, cases, np.where(there, values, 0), optimize=True)
    counts = np.einsum("bs,bn,snt->bt", seeds, cases, there.astype(float), optimize=True)
    scored = (counts > 0).sum(axis=1)
    totals = np.divide(sums, counts, out=np.zeros_like(sums), where=counts > 0).sum(axis=1)
    return np.divide(totals, scored, out=np.full(len(totals), np.nan), where=scored > 0)


def _percentiles(drawn: NDArray[np.float64], num_cases: int) -> Interval:
    kept = drawn[~np.isnan(drawn)]
    if num_cases < MIN_CASES or not len(kept):
        return None
    low, high = np.percentile(kept, LEVEL)
    return float(low), float(high)
