"""Means with intervals, paired differences, tests, ranks and areas, over cases and seeds. NumPy and SciPy only.

Values are (seeds, cases, targets) with NaN where a case has none for a target. Results are (targets + 1): per target, and last
the average over targets, which is the mean of the targets' means, in every resample too.

Seeds and cases are crossed: each seed is scored on the same cases. A resample draws seeds and, for all of them, cases (Owen
2007, "The pigeonhole bootstrap"), and methods share the draws, so that differences are paired. Few seeds and cases make plain
percentile intervals too short: the weights are spread by sqrt(n / (n - 1)) and the percentiles are those of a t distribution
(Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3) with Satterthwaite's degrees of freedom.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import stats

RESAMPLES = 2000
MIN_CASES = 2
MIN_CASES_TEST, MIN_SEEDS_TEST = 6, 2
CHUNK = 64
"""Groups that are resampled at once; bounds the memory."""
LEAST = 0.25
"""Share of a target's values that a resample must hold; with fewer, its mean says nothing."""
EXACT, PERMUTED = 50, 13
"""Cases up to which the signed-rank test is exact, and is so by permutation where there are ties: SciPy's own limits."""
MANY = 64
"""Methods of a table up to which Kendall's tau is computed from every resample; above, from the first hundred."""

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Means (targets + 1) with 95 % intervals; NaN: not computable.

    Attributes:
        freedom: (targets + 1), degrees of freedom that the intervals' levels come from.
        draws: resampled means, (RESAMPLES, targets + 1).
    """

    mean: Values
    low: Values
    high: Values
    freedom: Values
    draws: NDArray[np.float32]


def estimates(groups: Sequence[Values]) -> list[Estimate]:
    """Mean of each group over seeds and cases, then over targets, with its bootstrap interval; all on the same cases."""
    found: dict[int, Estimate] = {}
    for places in _alike(groups):
        batch = np.stack([groups[place] for place in places])
        # No mean leaves the range of its values; a spread resample of very few might.
        known = ~np.isnan(batch)
        least, most = (
            each(np.where(known, batch, fill), axis=(1, 2, 3))[:, None, None]
            for each, fill in ((np.min, np.inf), (np.max, -np.inf))
        )
        draws = np.clip(_resample(batch), least, most)
        found |= zip(places, _with_intervals(_mean(batch), draws, batch), strict=True)
    return [found[place] for place in range(len(groups))]


def estimate(values: Values) -> Estimate:
    """`estimates` of one group."""
    return estimates([values])[0]


def difference(first: Values, second: Values) -> Estimate:
    """mean(first) - mean(second), paired by seed and case: both are (seeds, cases, targets) of the same seeds and cases.

    Raises:
        ValueError: the shapes differ.
    """
    return differences([(first, second)])[0]


def differences(pairs: Sequence[tuple[Values, Values]]) -> list[Estimate]:
    """`difference` of several pairs, all on the same cases."""
    for first, second in pairs:
        if first.shape != second.shape:
            raise ValueError(f"{first.shape} and {second.shape} are not of the same seeds, cases and targets")
    found: dict[int, Estimate] = {}
    for places in _alike([first for first, _ in pairs]):
        first, second = (np.stack([pairs[place][side] for place in places]) for side in (0, 1))
        means, draws = _mean(first) - _mean(second), _resample(first) - _resample(second)
        found |= zip(places, _with_intervals(means, draws, first - second), strict=True)
    return [found[place] for place in range(len(pairs))]


def combine(parts: Sequence[Estimate], weights: Sequence[float]) -> tuple[float, float, float]:
    """Weighted sum of the averages over targets of several estimates on the same cases: value, low, high.

    With the fewest degrees of freedom that any part has.
    """
    mean = sum(weight * part.mean[-1] for part, weight in zip(parts, weights, strict=True))
    draws = sum(weight * part.draws[:, -1] for part, weight in zip(parts, weights, strict=True))
    level = 100 * stats.norm.cdf(stats.t.ppf(0.025, min(float(part.freedom[-1]) for part in parts)))
    low, high = np.nanpercentile(draws, [level, 100 - level]) if not np.isnan(draws).all() else (np.nan, np.nan)
    return float(mean), float(low), float(high)


def label_efficiency(fractions: Sequence[float], parts: Sequence[Estimate]) -> tuple[float, float, float]:
    """Area under Dice over the label fraction (trapezoids), divided by the range: a mean Dice; value, low, high.

    Raises:
        ValueError: fewer than two fractions, or fractions that do not ascend.
    """
    steps = np.diff(np.asarray(fractions, dtype=float))
    if len(steps) < 1 or (steps <= 0).any():
        raise ValueError("a curve needs at least two label fractions, in ascending order")
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2 / steps.sum()
    return combine(parts, weights.tolist())


def why_no_test(num_seeds: int, num_cases: int) -> str:
    """Why there is no p-value; empty where there is one."""
    if num_seeds < MIN_SEEDS_TEST:
        return "no p-value: one seed, whose luck cannot be told from the method"
    if num_cases < MIN_CASES_TEST:
        return f"no p-value: {num_cases} cases, with fewer than {MIN_CASES_TEST} no test can reject"
    return ""


@dataclass(frozen=True)
class Luck:
    """Variance of a run's mean over seeds, pooled over the methods of a table, (targets + 1), and its degrees of freedom."""

    variance: Values
    freedom: int


def luck(groups: Sequence[Values]) -> Luck:
    """How much the seed alone moves a mean. Three seeds of one method hardly tell; those of all methods together do."""
    kept = [values for values in groups if len(values) > 1]
    if not kept:
        return Luck(np.full(groups[0].shape[2] + 1, np.nan), 0)
    sums = np.zeros(kept[0].shape[2] + 1)
    for values in kept:
        sums += np.nan_to_num(_mean(values[:, None]).var(axis=0, ddof=1)) * (len(values) - 1)
    freedom = sum(len(values) - 1 for values in kept)
    return Luck(sums / freedom, freedom)


def p_values(pairs: Sequence[tuple[Values, Values]], pooled: Luck) -> list[Values]:
    """Two-sided p-values (targets + 1) of first - second for each pair; NaN where there is no test (`why_no_test`).

    The larger of two, so that both have to reject. Wilcoxon's signed rank over cases, each the mean of its seeds: alone, it
    takes the luck of a seed, which all cases share, for the method's. And the t test of a mean over crossed random seeds and
    cases (Clark 1973, "The language-as-fixed-effect fallacy"), with the larger of the pair's own and the pooled variance over
    seeds.
    """
    found: dict[int, Values] = {}
    for places in _alike([first for first, _ in pairs]):
        columns = _contributions(*(np.stack([pairs[place][side] for place in places]) for side in (0, 1)))
        num_seeds = columns.shape[2]
        per_case = nanmean(columns, 2)  # (pairs, targets + 1, cases)
        number = (~np.isnan(per_case)).sum(axis=2)
        tested = (number >= MIN_CASES_TEST) & (np.nan_to_num(per_case) != 0).any(axis=2) & (num_seeds >= MIN_SEEDS_TEST)
        p = np.full(tested.shape, np.nan)
        if tested.any():
            # The freedom of the pooled variance for both: with the pair's own two or three, hardly anything could be found,
            # and the simulations in the tests show that this is not needed.
            freedom_of_seeds = max(pooled.freedom, 1)
            seeds = np.fmax(_nanvar(nanmean(columns, 3)), 2 * pooled.variance) / num_seeds
            cases = _nanvar(per_case) / np.maximum(number, 1)
            with np.errstate(divide="ignore", invalid="ignore"):
                freedom = (seeds + cases) ** 2 / (seeds**2 / freedom_of_seeds + cases**2 / (number - 1))
                crossed = 2 * stats.t.sf(abs(nanmean(per_case, 2)) / np.sqrt(seeds + cases), freedom)
            # Differences without any spread are beyond doubt.
            crossed = np.where(seeds + cases == 0, 0.0, crossed)
            p[tested] = np.maximum(_signed_rank(per_case[tested]), crossed[tested])
        found |= zip(places, p, strict=True)
    return [found[place] for place in range(len(pairs))]


def _contributions(first: Values, second: Values) -> Values:
    """What each seed and case adds to the difference, (pairs, targets + 1, seeds, cases); their means are the differences.

    Where only one side has a value for a case without the structure, the other side rightly found nothing: 1, the Dice that a
    perfect answer has. The average over targets weighs each case so that targets count alike, as the table's average does.
    """
    one_sided = np.isnan(first) != np.isnan(second)
    first, second = (np.where(one_sided & np.isnan(each), 1.0, each) for each in (first, second))
    change = first - second
    there = ~np.isnan(change)
    number = there.any(axis=1).sum(axis=1)[:, None, None]  # cases that have the target
    scored = np.maximum((number > 0).sum(axis=3, keepdims=True), 1)
    weighted = np.where(there, change, 0.0) * change.shape[2] / np.maximum(number, 1) / scored
    average = np.where(there.any(axis=3), weighted.sum(axis=3), np.nan)
    return np.concatenate([change.transpose(0, 3, 1, 2), average[:, None]], axis=1)


def _signed_rank(differences: Values) -> Values:
    """Wilcoxon's p-value of each row (n, cases); NaN and, as Wilcoxon does, zeros are left out."""
    found = np.empty(len(differences))
    ordered = np.sort(abs(differences), axis=1)
    plain = ~np.isnan(ordered).any(axis=1) & (ordered[:, 0] > 0) & (np.diff(ordered, axis=1) > 0).all(axis=1)
    if plain.any():
        method = "exact" if differences.shape[1] <= EXACT else "auto"
        found[plain] = stats.wilcoxon(differences[plain], axis=1, method=method).pvalue
    # Zeros and ties: by the normal approximation, as SciPy does for more than `PERMUTED` cases, all at once.
    many = differences.shape[1] > PERMUTED
    tied = ~plain & ~np.isnan(ordered).any(axis=1) & (ordered[:, -1] > 0) & many
    if tied.any():
        found[tied] = stats.wilcoxon(differences[tied], axis=1, method="asymptotic").pvalue
    for place in np.flatnonzero(~plain & ~tied):
        row = differences[place]
        found[place] = stats.wilcoxon(row[~np.isnan(row)]).pvalue
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction over the p-values that are there (NaN: none)."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not np.isnan(p))
    corrected = [np.nan] * len(p_values)
    worst = 0.0
    for number, (p, place) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - number)))
        corrected[place] = worst
    return corrected


@dataclass(frozen=True)
class Ranks:
    """How firm the ranks of a table are.

    Attributes:
        shares: (methods, ranks), how often each method holds each rank among the resamples; rank 1 is the best.
        tau: mean Kendall's tau between the resampled rankings and the one of the means.
    """

    shares: Values
    tau: float


def ranks(estimates: Sequence[Estimate], target: int = -1) -> Ranks:
    """Rank stability over the resamples (Wiesenfarth et al. 2021, doi 10.1038/s41598-021-82017-6); more is better."""
    number, means = len(estimates), np.array([each.mean[target] for each in estimates])
    ranked = np.flatnonzero(~np.isnan(means))  # a method without a mean has no rank
    draws = np.stack([each.draws[:, target] for each in estimates], axis=1)[:, ranked]
    draws = draws[~np.isnan(draws).any(axis=1)]
    shares = np.full((number, number), np.nan)
    if not len(draws):
        return Ranks(shares, np.nan)
    places = stats.rankdata(-draws, method="min", axis=1).astype(int) - 1  # equal means share the better rank
    flat = (np.arange(len(ranked)) * number + places).ravel()
    shares[ranked] = np.bincount(flat, minlength=len(ranked) * number).reshape(-1, number) / len(draws)
    return Ranks(shares, _tau(draws, means[ranked]) if len(ranked) > 1 else np.nan)


def _tau(draws: NDArray[np.float32], means: Values) -> float:
    if len(means) > MANY:
        return float(np.mean([stats.kendalltau(row, means).statistic for row in draws[:100]]))
    first, second = np.triu_indices(len(means), 1)
    agree = np.sign(draws[:, first] - draws[:, second]) * np.sign(means[first] - means[second])
    return float(agree.mean())


def _alike(groups: Sequence[Values]) -> list[list[int]]:
    """Places of groups of one shape, in batches of bounded size."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for place, values in enumerate(groups):
        shapes[values.shape].append(place)
    return [places[start : start + CHUNK] for places in shapes.values() for start in range(0, len(places), CHUNK)]


def _with_intervals(means: Values, draws: Values, values: Values) -> list[Estimate]:
    """Percentiles of the draws (groups, RESAMPLES, targets + 1) at the levels of a t distribution."""
    columns = _columns(values)
    enough = (~np.isnan(columns)).any(axis=2).sum(axis=2) >= MIN_CASES
    freedom = np.maximum(_freedom(columns), 1)
    levels = stats.norm.cdf(stats.t.ppf(0.025, freedom))
    ordered = np.sort(draws, axis=1)  # NaN last
    most = (~np.isnan(draws)).sum(axis=1) - 1
    ends = []
    for level in (levels, 1 - levels):
        place = np.maximum(level * most, 0)
        below = np.floor(place).astype(int)
        above = np.minimum(below + 1, np.maximum(most, 0))
        low, high = (np.take_along_axis(ordered, each[:, None], axis=1)[:, 0] for each in (below, above))
        ends.append(np.where(enough & (most >= 0), low + (place - below) * (high - low), np.nan))
    kept = draws.astype(np.float32)
    return [Estimate(*each) for each in zip(means, *ends, freedom, kept, strict=True)]


@lru_cache(maxsize=256)
def _weights(number: int, stream: int) -> Values:
    """Weights of `number` things in each resample, (RESAMPLES, number), the same in every call."""
    rng = np.random.default_rng((stream, number))
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES).astype(float)
    return drawn if number < 2 else 1 + (drawn - 1) * np.sqrt(number / (number - 1))


def _resample(batch: Values) -> Values:
    """(groups, seeds, cases, targets) -> means (groups, RESAMPLES, targets + 1) under drawn seeds and cases."""
    _, num_seeds, num_cases, _ = batch.shape
    there = ~np.isnan(batch)
    sums = _weigh(np.where(there, batch, 0.0))
    counts = np.full_like(sums, num_seeds * num_cases) if there.all() else _weigh(there.astype(float))
    # A target that hardly any drawn case has cannot be averaged in that resample.
    least = LEAST * there.sum(axis=(1, 2))[:, None]
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=(counts > least) & (counts > 0))
    return np.concatenate([means, nanmean(means, 2)[..., None]], axis=2)


def _weigh(batch: Values) -> Values:
    """Sums (groups, RESAMPLES, targets) over seeds and cases under the weights of each resample."""
    groups, num_seeds, num_cases, num_targets = batch.shape
    seeds, cases = _weights(num_seeds, 0), _weights(num_cases, 1)
    sums = np.zeros((RESAMPLES, groups * num_targets))
    for seed in range(num_seeds):
        # One product for all groups: the weights of the cases are the same for all.
        columns = batch[:, seed].transpose(1, 0, 2).reshape(num_cases, -1)
        sums += seeds[:, [seed]] * (cases @ columns)
    return sums.reshape(RESAMPLES, groups, num_targets).transpose(1, 0, 2)


def _mean(batch: Values) -> Values:
    """(groups, seeds, cases, targets) -> (groups, targets + 1)."""
    means = nanmean(batch.reshape(len(batch), -1, batch.shape[3]), 1)
    return np.concatenate([means, nanmean(means, 1)[:, None]], axis=1)


def _columns(batch: Values) -> Values:
    """(groups, seeds, cases, targets) -> (groups, targets + 1, seeds, cases): each target, and the mean that a case has."""
    return np.concatenate([batch.transpose(0, 3, 1, 2), nanmean(batch, 3)[:, None]], axis=1)


def _freedom(columns: Values) -> Values:
    """Degrees of freedom of the mean over (..., seeds, cases), both random (Satterthwaite)."""
    parts = []
    for axis in (-1, -2):
        means = nanmean(columns, axis)
        number = (~np.isnan(means)).sum(axis=-1)
        parts.append((np.nan_to_num(_nanvar(means)) / np.maximum(number, 1), np.maximum(number - 1, 1)))
    (seeds, few), (cases, many) = parts
    total = seeds**2 / few + cases**2 / many
    found: Values = np.divide((seeds + cases) ** 2, total, out=many.astype(float), where=total > 0)
    return found


def _nanvar(values: Values) -> Values:
    """Variance with n - 1 along the last axis; NaN for fewer than two values."""
    there = ~np.isnan(values)
    squares = np.where(there, values - nanmean(values, -1)[..., None], 0.0) ** 2
    number = there.sum(axis=-1)
    found: Values = np.divide(squares.sum(axis=-1), number - 1, out=np.full(number.shape, np.nan), where=number > 1)
    return found


def nanmean(values: Values, axis: int) -> Values:
    """Mean along an axis over what is not NaN; NaN, without a warning, where nothing is."""
    there = ~np.isnan(values)
    counts, sums = there.sum(axis=axis), np.where(there, values, 0.0).sum(axis=axis)
    means: Values = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means
