"""Are ranks as firm as they look? Against SciPy, and in simulations with a known answer."""

import numpy as np
import pytest
from scipy import stats

from leaderboards import ranks, statistics


def test_ranks_are_firm_where_methods_are_apart_and_loose_where_they_are_not():
    rng = np.random.default_rng(0)
    apart = [statistics.estimate(rng.normal(mean, 0.01, (3, 20, 1))) for mean in (0.5, 0.9, 0.7)]
    firm = ranks.rank_stability(apart)
    assert firm.shares.argmax(axis=1).tolist() == [2, 0, 1]
    assert firm.shares.max(axis=1).min() == 1
    assert firm.tau == 1
    same = [statistics.estimate(rng.normal(0.7, 0.1, (3, 20, 1))) for _ in range(6)]
    loose = ranks.rank_stability(same)
    assert loose.shares.sum(axis=0) == pytest.approx(np.ones(6), abs=0.01)  # equal draws share the better rank
    assert loose.shares.sum(axis=1) == pytest.approx(np.ones(6))
    assert loose.tau < 0.8


def test_a_firm_rank_of_equal_methods_is_as_rare_as_a_small_p_value():
    """Two methods that differ by the luck of three seeds only: either is first in 97.5 % of the resamples in 5 % of tables."""
    rng, tables, firm, unwidened = np.random.default_rng(0), 200, 0, 0
    for _ in range(tables):
        first, second = (0.8 + rng.normal(0, 0.02, (3, 1, 1)) + rng.normal(0, 0.01, (3, 20, 1)) for _ in range(2))
        pair = statistics.estimates([first, second])
        freedom = ranks.least_freedom([(first, second)])
        firm += ranks.rank_stability(pair, freedom).shares[:, 0].max() >= 0.975
        unwidened += ranks.rank_stability(pair).shares[:, 0].max() >= 0.975
    print(f"firm ranks of equal methods: {firm / tables:.1%}, {unwidened / tables:.1%} without the t distribution")
    assert firm / tables <= 0.08
    assert unwidened > 2 * firm


def test_equal_methods_share_a_rank_and_one_without_a_mean_has_none():
    values = np.random.default_rng(0).random((2, 9, 1))
    same = [statistics.estimate(values), statistics.estimate(values), statistics.estimate(np.full((2, 9, 1), np.nan))]
    found = ranks.rank_stability(same)
    assert found.shares[:2, 0].tolist() == [1, 1]
    assert np.isnan(found.shares[2]).all()


def test_kendalls_tau_is_scipys():
    rng = np.random.default_rng(0)
    draws, means = rng.normal(size=(50, 8)), rng.normal(size=8)
    expected = np.mean([stats.kendalltau(row, means).statistic for row in draws])
    assert ranks._tau(draws, means) == pytest.approx(expected)
