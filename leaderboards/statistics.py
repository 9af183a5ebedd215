"""Means with intervals, paired differences, tests and areas, over cases and seeds. NumPy and SciPy only.

Values have the shape (seeds, cases, targets), with NaN where a case has no value for a target. Results have the shape
(targets + 1): one entry per target, and last the average over targets, which is the mean of the targets' means, also in every
resample.

Seeds and cases are crossed: each seed is scored on the same cases. A resample draws seeds, and draws cases that apply to all
of these seeds (Owen 2007, "The pigeonhole bootstrap"). All methods use the same draws, so that differences are paired. With
few seeds and cases, plain percentile intervals are too short. Therefore the weights are spread by sqrt(n / (n - 1)), and the
percentiles are those of a t distribution (Hesterberg 2015, "What teachers should know about the bootstrap", section 5.3) with
Satterthwaite's degrees of freedom.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from leaderboards import fold_statistics

RESAMPLES = 2000
LEAST_IN_FOLD = 4
"""Cases of the smallest fold within which cases are drawn; the spread of fewer would be taken for far too small."""
MIN_CASES = 2
MIN_CASES_TEST, MIN_SEEDS_TEST = 6, 2
CHUNK = 64
"""Number of groups that are resampled at once; it bounds the memory."""
LEAST = 0.25
"""Share of a target's values that a resample must hold; with fewer values, the resample has no mean for the target."""
EXACT, PERMUTED = 50, 13
"""Largest numbers of cases for an exact signed-rank test without ties, and with ties (by permutation): SciPy's own limits."""

Values = NDArray[np.float64]
Folds = tuple[int, ...]
"""The fold of each case; empty where no folds are pooled."""


@dataclass(frozen=True)
class Estimate:
    """Means with 95 % intervals, (targets + 1) each; NaN where they cannot be computed.

    Attributes:
        low, high: ends of the intervals.
        freedom: degrees of freedom of the t distribution that gives the levels of the percentiles, (targets + 1).
        draws: the means of the resamples, (RESAMPLES, targets + 1).
    """

    mean: Values
    low: Values
    high: Values
    freedom: Values
    draws: NDArray[np.float32]


def estimates(groups: Sequence[Values], folds: Folds = ()) -> list[Estimate]:
    """Mean of each group over seeds and cases, then over targets, with a bootstrap interval. All groups have the same cases.

    Fewer than `MIN_CASES_TEST` cases have no interval: too few to tell how much cases differ.

    Args:
        folds: the fold of each case, where folds are pooled; then cases are drawn within their folds.
    """
    results: dict[int, Estimate] = {}
    for indices in _batches(groups):
        batch = np.stack([groups[index] for index in indices])
        # A mean lies within the range of its values; the spread weights could move the mean of very few values out of it.
        valid = ~np.isnan(batch)
        least, most = (
            extreme(np.where(valid, batch, fill), axis=(1, 2, 3))[:, None, None]
            for extreme, fill in ((np.min, np.inf), (np.max, -np.inf))
        )
        draws = np.clip(_resample(batch, folds), least, most)
        results |= zip(indices, _with_intervals(_mean(batch), draws, batch), strict=True)
    return [
        results[index] if groups[index].shape[1] >= MIN_CASES_TEST else _without_interval(results[index])
        for index in range(len(groups))
    ]


def estimate(values: Values) -> Estimate:
    """The estimate of one group, as `estimates`."""
    return estimates([values])[0]


def difference(first: Values, second: Values) -> Estimate:
    """mean(first) - mean(second), paired by seed and case. Both are (seeds, cases, targets) of the same seeds and cases.

    Raises:
        ValueError: the shapes differ.
    """
    return differences([(first, second)])[0]


def differences(pairs: Sequence[tuple[Values, Values]], folds: Folds = ()) -> list[Estimate]:
    """The differences of several pairs on the same cases, as `difference`. Raises ValueError as `difference`.

    Where folds are pooled, the intervals are those of the test of `leaderboards.fold_statistics`. Where there is no test
    (`why_no_test`), there is no interval either: the luck of a seed would not be in it.
    """
    for first, second in pairs:
        if first.shape != second.shape:
            raise ValueError(f"{first.shape} and {second.shape} are not of the same seeds, cases and targets")
    results: dict[int, Estimate] = {}
    for indices in _batches([first for first, _ in pairs]):
        first, second = (np.stack([pairs[index][side] for index in indices]) for side in (0, 1))
        means, draws = _mean(first) - _mean(second), _resample(first, folds) - _resample(second, folds)
        plain = _with_intervals(means, draws, first - second)
        if folds:
            lows, highs = fold_statistics.intervals(_contributions(first, second), folds)
            plain = [replace(part, low=a, high=b) for part, a, b in zip(plain, lows, highs, strict=True)]
        results |= zip(indices, plain, strict=True)
    return [
        _without_interval(results[index]) if why_no_test(first.shape[0], first.shape[1], folds) else results[index]
        for index, (first, _) in enumerate(pairs)
    ]


def _without_interval(part: Estimate) -> Estimate:
    """The estimate with its mean alone."""
    return replace(part, low=np.full_like(part.low, np.nan), high=np.full_like(part.high, np.nan))


def combine(parts: Sequence[Estimate], weights: Sequence[float]) -> tuple[float, float, float]:
    """Weighted sum of the averages over targets of several estimates on the same cases: value, low, high.

    The interval uses the smallest degrees of freedom of the estimates.
    """
    mean = sum(weight * part.mean[-1] for part, weight in zip(parts, weights, strict=True))
    draws = sum(weight * part.draws[:, -1] for part, weight in zip(parts, weights, strict=True))
    level = 100 * stats.norm.cdf(stats.t.ppf(0.025, min(float(part.freedom[-1]) for part in parts)))
    low, high = np.nanpercentile(draws, [level, 100 - level]) if not np.isnan(draws).all() else (np.nan, np.nan)
    return float(mean), float(low), float(high)


def area_under_curve(points: Sequence[float], parts: Sequence[Estimate]) -> tuple[float, float, float]:
    """Area under the curve of Dice over the label fraction, or over a number of steps: value, low, high.

    The area follows the trapezoidal rule and is divided by the range of the points, so that it is a mean Dice. Low and high are
    NaN where a point has no interval.

    Raises:
        ValueError: fewer than two points, or points that do not ascend.
    """
    steps = np.diff(np.asarray(points, dtype=float))
    if len(steps) < 1 or (steps <= 0).any():
        raise ValueError("a curve needs at least two points, in ascending order")
    weights = (np.append(steps, 0) + np.append(0, steps)) / 2 / steps.sum()
    area, low, high = combine(parts, weights.tolist())
    return (area, np.nan, np.nan) if any(np.isnan(part.low[-1]) for part in parts) else (area, low, high)


def why_no_test(num_seeds: int, num_cases: int, folds: Folds = ()) -> str:
    """The reason why there is no p-value; empty where there is one. Pooled folds are several trainings, as seeds are."""
    if num_seeds < MIN_SEEDS_TEST and not folds:
        return "no p-value: one seed, whose luck cannot be told from the method"
    if num_cases < MIN_CASES_TEST:
        return f"no p-value: {num_cases} cases, with fewer than {MIN_CASES_TEST} no test can reject"
    return ""


@dataclass(frozen=True)
class Luck:
    """Variance of a run's mean over the seeds, pooled over the methods of a table, (targets + 1); and its degrees of freedom.

    `folds`: the fold of each case, where folds are pooled. Then tests use the variance over folds instead.
    """

    variance: Values
    freedom: int
    folds: Folds = ()


def luck(groups: Sequence[Values], folds: Folds = ()) -> Luck:
    """The variance of a mean that the seed alone causes, pooled over all methods: three seeds of one method are too few."""
    with_seeds = [values for values in groups if len(values) > 1]
    if not with_seeds:
        return Luck(np.full(groups[0].shape[2] + 1, np.nan), 0, folds)
    sums = np.zeros(with_seeds[0].shape[2] + 1)
    for values in with_seeds:
        sums += np.nan_to_num(_mean(values[:, None]).var(axis=0, ddof=1)) * (len(values) - 1)
    freedom = sum(len(values) - 1 for values in with_seeds)
    return Luck(sums / freedom, freedom, folds)


def p_values(pairs: Sequence[tuple[Values, Values]], pooled: Luck) -> list[Values]:
    """Two-sided p-values (targets + 1) of first - second for each pair; NaN where there is no test (`why_no_test`).

    A p-value is the larger of two, so that both tests have to reject:

    * Wilcoxon's signed-rank test over cases, where each case is the mean of its seeds. On its own, it would attribute the
      luck of a seed, which all cases share, to the method.
    * The t test of a mean over crossed random seeds and cases (Clark 1973, "The language-as-fixed-effect fallacy"), with the
      larger of the pair's own variance over seeds and the pooled one. Where folds are pooled, it is the test of
      `leaderboards.fold_statistics`.
    """
    results: dict[int, Values] = {}
    for indices in _batches([first for first, _ in pairs]):
        columns = _contributions(*(np.stack([pairs[index][side] for index in indices]) for side in (0, 1)))
        num_seeds = columns.shape[2]
        per_case = nanmean(columns, 2)  # (pairs, targets + 1, cases)
        num_cases = (~np.isnan(per_case)).sum(axis=2)
        repeated = num_seeds >= MIN_SEEDS_TEST or bool(pooled.folds)
        tested = (num_cases >= MIN_CASES_TEST) & (np.nan_to_num(per_case) != 0).any(axis=2) & repeated
        p = np.full(tested.shape, np.nan)
        if tested.any() and pooled.folds:
            p[tested] = np.maximum(
                _signed_rank(per_case[tested]), fold_statistics.p_values(columns, pooled.folds)[tested]
            )
        elif tested.any():
            between = np.fmax(_nanvar(nanmean(columns, 3)), 2 * pooled.variance)
            mean, variance, freedom = _crossed_moments(columns, pooled, between)
            with np.errstate(divide="ignore", invalid="ignore"):
                crossed = 2 * stats.t.sf(abs(mean) / np.sqrt(variance), freedom)
            # Differences without any spread: the test rejects.
            crossed = np.where(variance == 0, 0.0, crossed)
            p[tested] = np.maximum(_signed_rank(per_case[tested]), crossed[tested])
        results |= zip(indices, p, strict=True)
    return [results[index] for index in range(len(pairs))]


def moments(first: Values, second: Values, pooled: Luck) -> tuple[float, float, float]:
    """Mean of first - second in the average over targets, its squared standard error, and the degrees of freedom.

    As in the t test of `p_values`, but with the pooled variance over seeds alone: the larger of two variances makes a test
    careful, but would make a probability wrong. Both arguments are (seeds, cases, targets) of the same seeds and cases.
    """
    columns = _contributions(first[None], second[None])
    if pooled.folds:
        mean, error, freedom = fold_statistics.moments(columns, pooled.folds)
        return float(mean[0, -1]), float(error[0, -1] ** 2), float(freedom[0, -1])
    mean, variance, freedom = _crossed_moments(columns, pooled, 2 * pooled.variance)
    return float(mean[0, -1]), float(variance[0, -1]), float(freedom[0, -1])


def _crossed_moments(columns: Values, pooled: Luck, between: Values) -> tuple[Values, Values, Values]:
    """Mean, squared standard error and degrees of freedom of contributions (pairs, targets + 1, seeds, cases).

    `between`: the variance between seeds.
    """
    num_seeds, per_case = columns.shape[2], nanmean(columns, 2)
    num_cases = (~np.isnan(per_case)).sum(axis=2)
    # Both variances use the degrees of freedom of the pooled one. With the two or three of the pair's own variance the
    # test could hardly reject, and the simulations in the tests show that such caution is not needed.
    freedom_of_seeds = max(pooled.freedom, 1)
    seeds = between / num_seeds
    cases = _nanvar(per_case) / np.maximum(num_cases, 1)
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (seeds + cases) ** 2 / (seeds**2 / freedom_of_seeds + cases**2 / (num_cases - 1))
    return nanmean(per_case, 2), seeds + cases, freedom


def share(method: Values, control: Values, positive: Values, pooled: Luck) -> tuple[float, float, float]:
    """The share that a method gains of what a positive control gains over the control: value, low, high.

    The interval is Fieller's (1954, "Some problems in interval estimation"): all shares that the t test of `p_values` does
    not reject. An end is infinite where the headroom is too small to bound the share, and NaN where no test can be made.

    Args:
        method, control, positive: Dice of the same seeds and cases.
        pooled: the variance over seeds in the table.
    """
    gain, headroom = (_contributions(side[None], control[None])[0, -1] for side in (method, positive))  # (seeds, cases)
    value = float(np.nansum(gain) / np.nansum(headroom))
    num_seeds, num_cases = len(gain), int((~np.isnan(gain)).any(axis=0).sum())

    def margin(candidate: float) -> float:
        """How far the test is from rejecting a share; below 0 it does not reject."""
        contrast = gain - candidate * headroom
        if pooled.folds:
            return fold_statistics.margin(contrast, pooled.folds)
        per_case = nanmean(contrast, 0)
        own = _nanvar(nanmean(contrast, 1)[None])[0]
        # Three runs enter the contrast, the control with what is left of it.
        expected = pooled.variance[-1] * (1 + candidate**2 + (1 - candidate) ** 2)
        seeds, cases = np.fmax(own, expected) / num_seeds, _nanvar(per_case[None])[0] / num_cases
        if seeds + cases == 0:  # no spread at all: only the value itself is not rejected
            return float(abs(nanmean(per_case, 0)))
        freedom = (seeds + cases) ** 2 / (seeds**2 / max(pooled.freedom, 1) + cases**2 / (num_cases - 1))
        return float(abs(nanmean(per_case, 0)) - stats.t.ppf(0.975, freedom) * np.sqrt(seeds + cases))

    too_few = num_seeds < MIN_SEEDS_TEST and not pooled.folds
    if num_cases < MIN_CASES or too_few or not np.isfinite(margin(value)):
        return value, np.nan, np.nan
    return value, _root(margin, value, -1), _root(margin, value, 1)


def _root(margin: Callable[[float], float], value: float, direction: int) -> float:
    """The first zero of `margin` on one side of `value`; infinite if there is none within 1000."""
    if margin(value) >= 0:  # without any spread, up to rounding
        return value
    step = 1 / 64
    while step < 1000:
        if margin(value + direction * step) > 0:
            return float(optimize.brentq(margin, value, value + direction * step))
        step *= 2
    return direction * np.inf


def _contributions(first: Values, second: Values) -> Values:
    """The contribution of each seed and case to the difference, (pairs, targets + 1, seeds, cases).

    The mean of the contributions is the difference; a case without any target has none. For a case without the structure,
    one side may have no value because it correctly predicted nothing; it then gets 1, the Dice of a perfect prediction. In
    the average over targets, the cases are weighted so that all targets count equally, as in the average of the table.
    """
    one_sided = np.isnan(first) != np.isnan(second)
    first, second = (np.where(one_sided & np.isnan(side), 1.0, side) for side in (first, second))
    change = first - second
    valid = ~np.isnan(change)
    num_cases = valid.any(axis=1).sum(axis=1)[:, None, None]  # that have the target
    num_targets = np.maximum((num_cases > 0).sum(axis=3, keepdims=True), 1)
    num_scored = valid.any(axis=(1, 3)).sum(axis=1)[:, None, None, None]  # that have any target
    weighted = np.where(valid, change, 0.0) * num_scored / np.maximum(num_cases, 1) / num_targets
    average = np.where(valid.any(axis=3), weighted.sum(axis=3), np.nan)
    return np.concatenate([change.transpose(0, 3, 1, 2), average[:, None]], axis=1)


def _signed_rank(differences: Values) -> Values:
    """Wilcoxon's p-value of each row of (n, cases). NaN is left out, and so are zeros, as Wilcoxon does."""
    p = np.empty(len(differences))
    ordered = np.sort(abs(differences), axis=1)
    plain = ~np.isnan(ordered).any(axis=1) & (ordered[:, 0] > 0) & (np.diff(ordered, axis=1) > 0).all(axis=1)
    if plain.any():
        method = "exact" if differences.shape[1] <= EXACT else "auto"
        p[plain] = stats.wilcoxon(differences[plain], axis=1, method=method).pvalue
    # Rows with zeros or ties use the normal approximation, as SciPy does for more than `PERMUTED` cases; all rows at once.
    many = differences.shape[1] > PERMUTED
    tied = ~plain & ~np.isnan(ordered).any(axis=1) & (ordered[:, -1] > 0) & many
    if tied.any():
        p[tied] = stats.wilcoxon(differences[tied], axis=1, method="asymptotic").pvalue
    for index in np.flatnonzero(~plain & ~tied):
        row = differences[index]
        p[index] = stats.wilcoxon(row[~np.isnan(row)]).pvalue
    return p


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction. NaN means no p-value: it is not counted, and stays NaN."""
    order = sorted((p, index) for index, p in enumerate(p_values) if not np.isnan(p))
    corrected = [np.nan] * len(p_values)
    worst = 0.0
    for rank, (p, index) in enumerate(order):
        worst = max(worst, min(1.0, p * (len(order) - rank)))
        corrected[index] = worst
    return corrected


def _batches(groups: Sequence[Values]) -> list[list[int]]:
    """Indices of the groups, in batches of at most `CHUNK` groups of one shape."""
    shapes: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, values in enumerate(groups):
        shapes[values.shape].append(index)
    return [indices[start : start + CHUNK] for indices in shapes.values() for start in range(0, len(indices), CHUNK)]


def _with_intervals(means: Values, draws: Values, values: Values) -> list[Estimate]:
    """Estimates with intervals: percentiles of the draws (groups, RESAMPLES, targets + 1) at the levels of a t distribution."""
    columns = _columns(values)
    computable = (~np.isnan(columns)).any(axis=2).sum(axis=2) >= MIN_CASES
    freedom = np.maximum(_freedom(columns), 1)
    levels = stats.norm.cdf(stats.t.ppf(0.025, freedom))
    ordered = np.sort(draws, axis=1)  # NaN comes last
    last = (~np.isnan(draws)).sum(axis=1) - 1
    ends = []
    for level in (levels, 1 - levels):
        position = np.maximum(level * last, 0)
        below = np.floor(position).astype(int)
        above = np.minimum(below + 1, np.maximum(last, 0))
        low, high = (np.take_along_axis(ordered, index[:, None], axis=1)[:, 0] for index in (below, above))
        ends.append(np.where(computable & (last >= 0), low + (position - below) * (high - low), np.nan))
    single_draws = draws.astype(np.float32)
    return [Estimate(*arrays) for arrays in zip(means, *ends, freedom, single_draws, strict=True)]


@lru_cache(maxsize=256)
def _case_weights(folds: Folds) -> Values:
    """Weights of cases that are drawn within their folds, (RESAMPLES, cases); of all cases where a fold has too few."""
    if min(folds.count(fold) for fold in set(folds)) < LEAST_IN_FOLD:
        return _weights(len(folds), 1)
    weights = np.empty((RESAMPLES, len(folds)))
    for fold in sorted(set(folds)):
        (members,) = np.nonzero(np.array(folds) == fold)
        # Each fold has draws of its own.
        weights[:, members] = _weights(len(members), 2 + fold)
    return weights


@lru_cache(maxsize=256)
def _weights(number: int, stream: int) -> Values:
    """Weights of `number` seeds (stream 0), of cases (1) or of the cases of a fold (from 2) in each resample.

    The shape is (RESAMPLES, number); the weights are equal in every call.
    """
    rng = np.random.default_rng((stream, number))
    drawn = rng.multinomial(number, np.full(number, 1 / number), size=RESAMPLES).astype(float)
    return drawn if number < 2 else 1 + (drawn - 1) * np.sqrt(number / (number - 1))


def _resample(batch: Values, folds: Folds = ()) -> Values:
    """Means of all resamples: (groups, seeds, cases, targets) -> (groups, RESAMPLES, targets + 1)."""
    _, num_seeds, num_cases, _ = batch.shape
    valid = ~np.isnan(batch)
    sums = _weigh(np.where(valid, batch, 0.0), folds)
    counts = np.full_like(sums, num_seeds * num_cases) if valid.all() else _weigh(valid.astype(float), folds)
    # A resample has no mean for a target that hardly any drawn case has.
    least = LEAST * valid.sum(axis=(1, 2))[:, None]
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=(counts > least) & (counts > 0))
    return np.concatenate([means, nanmean(means, 2)[..., None]], axis=2)


def _weigh(batch: Values, folds: Folds) -> Values:
    """Sums over seeds and cases with the weights of each resample, (groups, RESAMPLES, targets)."""
    groups, num_seeds, num_cases, num_targets = batch.shape
    seeds = _weights(num_seeds, 0)
    cases = _case_weights(folds) if folds else _weights(num_cases, 1)
    sums = np.zeros((RESAMPLES, groups * num_targets))
    for seed in range(num_seeds):
        # One matrix product serves all groups, since they share the weights of the cases.
        columns = batch[:, seed].transpose(1, 0, 2).reshape(num_cases, -1)
        sums += seeds[:, [seed]] * (cases @ columns)
    return sums.reshape(RESAMPLES, groups, num_targets).transpose(1, 0, 2)


def _mean(batch: Values) -> Values:
    """Means over seeds and cases, and their average: (groups, seeds, cases, targets) -> (groups, targets + 1)."""
    means = nanmean(batch.reshape(len(batch), -1, batch.shape[3]), 1)
    return np.concatenate([means, nanmean(means, 1)[:, None]], axis=1)


def _columns(batch: Values) -> Values:
    """Values per target, and last each case's mean over the targets.

    The shape changes from (groups, seeds, cases, targets) to (groups, targets + 1, seeds, cases).
    """
    return np.concatenate([batch.transpose(0, 3, 1, 2), nanmean(batch, 3)[:, None]], axis=1)


def _freedom(columns: Values) -> Values:
    """Satterthwaite's degrees of freedom of a mean over (..., seeds, cases), where seeds and cases are random."""
    variances = []
    for axis in (-1, -2):
        means = nanmean(columns, axis)
        count = (~np.isnan(means)).sum(axis=-1)
        variances.append((np.nan_to_num(_nanvar(means)) / np.maximum(count, 1), np.maximum(count - 1, 1)))
    (seeds, seeds_freedom), (cases, cases_freedom) = variances
    denominator = seeds**2 / seeds_freedom + cases**2 / cases_freedom
    freedom: Values = np.divide(
        (seeds + cases) ** 2, denominator, out=cases_freedom.astype(float), where=denominator > 0
    )
    return freedom


def freedom_of_difference(first: Values, second: Values) -> Values:
    """Satterthwaite's degrees of freedom of the mean of first - second, (targets + 1)."""
    freedom: Values = _freedom(_columns((first - second)[None]))[0]
    return freedom


def _nanvar(values: Values) -> Values:
    """Variance (divided by n - 1) along the last axis, without NaN; NaN for fewer than two values."""
    valid = ~np.isnan(values)
    squares = np.where(valid, values - nanmean(values, -1)[..., None], 0.0) ** 2
    count = valid.sum(axis=-1)
    variance: Values = np.divide(squares.sum(axis=-1), count - 1, out=np.full(count.shape, np.nan), where=count > 1)
    return variance


def nanmean(values: Values, axis: int) -> Values:
    """Mean along an axis, without NaN; NaN, without a warning, where all values are NaN."""
    valid = ~np.isnan(values)
    counts, sums = valid.sum(axis=axis), np.where(valid, values, 0.0).sum(axis=axis)
    means: Values = np.divide(sums, counts, out=np.full(sums.shape, np.nan), where=counts > 0)
    return means
