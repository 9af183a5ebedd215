"""The share of a headroom that a method gains: its value, and what its interval covers."""

import numpy as np
import pytest

from leaderboards import statistics
from tests.leaderboards.made import simulated


@pytest.mark.parametrize(
    ("share", "headroom"),
    [(0.5, 0.06), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((0.0, 0.06), (1.2, 0.04)))],
)
def test_the_interval_of_a_share_holds_the_true_share_in_95_percent_of_tables(share, headroom):
    rng, covered, number = np.random.default_rng(7), 0, 1000
    for _ in range(number):
        control, positive, method, *others = simulated(rng, headroom, share * headroom, 0.0, 0.01, 0.02)
        pooled = statistics.luck([control, positive, method, *others])
        _, low, high = statistics.share(method, control, positive, pooled)
        covered += low <= share <= high
    # Two standard errors of a share of 1000 tables are 0.014; a test that is somewhat too careful is no fault.
    assert 0.95 - 0.014 <= covered / number <= 0.985


def test_a_share_is_the_ratio_of_two_differences():
    rng = np.random.default_rng(0)
    control, positive, method = simulated(rng, 0.05, 0.02)
    value, low, high = statistics.share(method, control, positive, statistics.luck([control, positive, method]))
    assert value == pytest.approx((method.mean() - control.mean()) / (positive.mean() - control.mean()))
    assert low < value < high


def test_cases_without_any_target_change_no_share():
    rng = np.random.default_rng(0)
    sides = simulated(rng, 0.05, 0.02)
    pooled = statistics.luck(sides)
    control, positive, method = sides
    padded = [np.concatenate([side, np.full_like(side, np.nan)], axis=1) for side in (method, control, positive)]
    assert statistics.share(*padded, pooled) == pytest.approx(statistics.share(method, control, positive, pooled))


def test_without_headroom_a_share_has_no_bounds():
    rng = np.random.default_rng(1)
    control, positive, method = simulated(rng, 0.0005, 0.03, seed_spread=0.02)
    _, low, high = statistics.share(method, control, positive, statistics.luck([control, positive, method]))
    assert np.isinf([low, high]).any()


def test_one_seed_gives_a_share_without_an_interval():
    control, positive, method = (side[:1] for side in simulated(np.random.default_rng(2), 0.05, 0.02))
    value, low, high = statistics.share(method, control, positive, statistics.luck([control, positive, method]))
    assert np.isfinite(value)
    assert np.isnan([low, high]).all()


def test_differences_without_any_spread_give_the_value_alone():
    control, positive, method = (np.full((2, 6, 1), value) for value in (0.5, 0.7, 0.6))
    value, low, high = statistics.share(method, control, positive, statistics.luck([control, positive, method]))
    assert (low, value, high) == pytest.approx((0.5, 0.5, 0.5))
