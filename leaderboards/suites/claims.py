"""How likely a claim "A has a higher Dice than B" is false, for each table and over a suite.

The probability is Bayesian (Christodoulou et al. 2025, "False promises in medical imaging AI?", ask for it). The prior of the
true difference is normal with mean 0 and standard deviation `PRIOR`. The likelihood is the t distribution of the test over
crossed seeds and cases (`leaderboards.statistics.moments`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy import integrate, stats

from leaderboards import statistics
from leaderboards.board import Group, Table, paired, stack
from leaderboards.statistics import Values

PRIOR = 0.015
"""Standard deviation of the prior in Dice. The root mean square of the differences from scratch in the HybridMIM paper's
tables is 0.0146; `tests/leaderboards/suites/test_claims.py` computes it."""


@dataclass(frozen=True)
class Claim:
    """A claim that one method has a higher mean Dice than another.

    Attributes:
        table: number of the table; None for the mean over all tables.
        first, second: names of rows; `first` has the higher mean, or the same.
        difference: in Dice. `low`, `high`: the 95 % interval of the t test; NaN without a test.
        p: two-sided p-value, Holm-corrected over the tables and the pairs that were asked for; NaN without a test, and for
            the mean over all tables.
        false: probability that the true difference is 0 or below; NaN without a test.
    """

    table: int | None
    first: str
    second: str
    difference: float
    low: float
    high: float
    p: float
    false: float

    def of(self, method: str) -> "Claim":
        """The claim that this method has the higher Dice, whether it has or not. The method is one of the two."""
        if method == self.first:
            return self
        return Claim(
            self.table, self.second, self.first, -self.difference, -self.high, -self.low, self.p, 1 - self.false
        )


def all_claims(tables: Sequence[Table], methods: Sequence[str], prior: float = PRIOR) -> list[Claim]:
    """The claims of all pairs of methods in each table, and last over all tables. Every table has all methods."""
    return _claims(tables, list(combinations(methods, 2)), prior)


def claims_against_scratch(tables: Sequence[Table], methods: Sequence[str], prior: float = PRIOR) -> list[Claim]:
    """As `all_claims`, but the pairs of each method with scratch on its backbone only, and Holm's correction over these."""
    groups = [group for table in tables[:1] for group in table.groups if group.name in methods]
    controls = {group.backbone: group.name for group in groups if group.is_control}
    pairs = [
        (group.name, controls[group.backbone])
        for group in groups
        if group.backbone in controls and not group.is_control
    ]
    return _claims(tables, pairs, prior)


def probability_false(mean: float, variance: float, freedom: float, prior: float = PRIOR) -> float:
    """Posterior probability that the true difference is 0 or below; NaN where there is no variance.

    Args:
        mean, variance: the measured difference and its squared standard error.
        freedom: degrees of freedom of the t distribution of (mean - truth) / standard error.
        prior: standard deviation of the true differences around 0.
    """
    if not np.isfinite([mean, variance, freedom]).all():
        return np.nan
    if variance == 0:
        return float(0.5 * (1 - np.sign(mean)))
    error = np.sqrt(variance)
    # Either factor may be much narrower than the other, so the grid is fine around both.
    fine = np.linspace(-12, 12, 2001)
    grid = np.unique(np.concatenate([fine * prior, mean + fine * error, [0.0]]))
    logarithm = stats.norm.logpdf(grid, 0, prior) + stats.t.logpdf((mean - grid) / error, freedom)
    area = integrate.cumulative_trapezoid(np.exp(logarithm - logarithm.max()), grid, initial=0)
    return float(area[np.searchsorted(grid, 0.0)] / area[-1])


def _claims(tables: Sequence[Table], pairs: Sequence[tuple[str, str]], prior: float) -> list[Claim]:
    """The claims of these pairs: of each table, then over all tables."""
    measured = np.full((len(tables), len(pairs), 3), np.nan)  # mean, squared standard error, degrees of freedom
    p = np.full((len(tables), len(pairs)), np.nan)
    for number, table in enumerate(tables):
        groups = {group.name: group for group in table.groups}
        for index, (first, second) in enumerate(pairs):
            measured[number, index], p[number, index] = _measure(table, groups[first], groups[second])
    corrected = np.array(statistics.holm(p.ravel().tolist())).reshape(p.shape)
    claims = [
        _claim(number, pair, measured[number, index], corrected[number, index], prior)
        for number in range(len(tables))
        for index, pair in enumerate(pairs)
    ]
    return claims + [_claim(None, pair, _pool(measured[:, index]), np.nan, prior) for index, pair in enumerate(pairs)]


def _measure(table: Table, first: Group, second: Group) -> tuple[tuple[float, float, float], float]:
    """Mean, squared standard error and degrees of freedom of the difference of two rows; and its p-value."""
    own, other = paired(first.runs, second.runs)
    if not table.is_tested(own):
        return (float(first.dice.mean[-1] - second.dice.mean[-1]), np.nan, np.nan), np.nan
    pair = stack(own, "dice"), stack(other, "dice")
    (p,) = statistics.p_values([pair], table.luck)
    return statistics.moments(*pair, table.luck), float(p[-1])


def _pool(measured: Values) -> Values:
    """The moments of the mean over tables, with Satterthwaite's degrees of freedom. Tables are independent."""
    mean, variance, freedom = measured.T
    total = variance.sum()
    pooled = total**2 / (variance**2 / freedom).sum() if total > 0 else freedom.sum()
    return np.array([mean.mean(), total / len(measured) ** 2, pooled])


def _claim(table: int | None, pair: tuple[str, str], moments: Values, p: float, prior: float) -> Claim:
    """The claim of a pair, in the direction of its difference."""
    mean, variance, freedom = map(float, moments)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    claim = Claim(
        table, *pair, mean, mean - half, mean + half, float(p), probability_false(mean, variance, freedom, prior)
    )
    return claim if mean >= 0 else claim.of(pair[1])
