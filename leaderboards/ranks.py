"""How firm the ranks of methods are: in one table, over the resamples of its cases and seeds.

Source: Wiesenfarth et al. 2021, "Methods and open-source toolkit for analyzing and visualizing challenge results"
(doi 10.1038/s41598-021-82017-6).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from leaderboards.statistics import Estimate, Values, freedom_of_difference

MANY = 64
"""Largest number of methods for which Kendall's tau is computed from every resample; for more, from the first hundred."""


@dataclass(frozen=True)
class Ranks:
    """Rank stability of a table.

    Attributes:
        shares: share of the resamples in which each method holds each rank, (methods, ranks); rank 1 is the best.
        tau: mean of Kendall's tau between the ranking in a resample and the ranking of the means.
    """

    shares: Values
    tau: float


def rank_stability(estimates: Sequence[Estimate], freedom: float = np.inf, target: int = -1) -> Ranks:
    """Rank stability over the resamples. Higher means rank first; a method without a mean has no rank.

    Args:
        freedom: degrees of freedom of the differences, see `widen`.
    """
    num_methods, means = len(estimates), np.array([estimate.mean[target] for estimate in estimates])
    ranked = np.flatnonzero(~np.isnan(means))
    draws = np.stack([estimate.draws[:, target] for estimate in estimates], axis=1)[:, ranked].astype(float)
    draws = widen(draws[~np.isnan(draws).any(axis=1)], means[ranked], freedom)
    shares = np.full((num_methods, num_methods), np.nan)
    if not len(draws):
        return Ranks(shares, np.nan)
    rank_indices = stats.rankdata(-draws, method="min", axis=1).astype(int) - 1  # equal means share the better rank
    flat = (np.arange(len(ranked)) * num_methods + rank_indices).ravel()
    shares[ranked] = np.bincount(flat, minlength=len(ranked) * num_methods).reshape(-1, num_methods) / len(draws)
    return Ranks(shares, _tau(draws, means[ranked]) if len(ranked) > 1 else np.nan)


def widen(draws: Values, means: Values, freedom: float) -> Values:
    """Draws (resamples, methods), moved away from the means by the ratio of the quantiles of the t and the normal distribution.

    The ends of the intervals are moved in the same way. Without that, resamples of two seeds make a rank look firm whose p-value
    is 1.
    """
    widened: Values = means + (draws - means) * stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
    return widened


def least_freedom(pairs: Sequence[tuple[Values, Values]], target: int = -1) -> float:
    """The smallest degrees of freedom of the differences (seeds, cases, targets) of the pairs; infinite without pairs."""
    return min((float(freedom_of_difference(first, second)[target]) for first, second in pairs), default=np.inf)


def _tau(draws: Values, means: Values) -> float:
    """Mean Kendall's tau between the rows of `draws` and the means."""
    if len(means) > MANY:
        return float(np.mean([stats.kendalltau(row, means).statistic for row in draws[:100]]))
    first, second = np.triu_indices(len(means), 1)
    agree = np.sign(draws[:, first] - draws[:, second]) * np.sign(means[first] - means[second])
    return float(agree.mean())
