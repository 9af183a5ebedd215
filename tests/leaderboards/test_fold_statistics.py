"""The test for pooled folds: false alarms, coverage and power, in simulations whose training sets overlap."""

import numpy as np
import pytest
from scipy import stats

from leaderboards import fold_statistics, statistics

FOLDS, CASES = 5, 20


def labels(folds=FOLDS, cases=CASES):
    return tuple(np.repeat(np.arange(folds), cases))


def simulate(rng, methods=3, effect=0.0, seeds=1, luck=0.01, folds=FOLDS):
    """Dice (seeds, cases, 1) of a control and of methods.

    The luck of a training set is the same for all seeds, and is shared by the folds as far as their training sets are: Nadeau and
    Bengio take n_test over all cases, 1 / folds, for the correlation of two folds. With two seeds, each training has luck too.
    """
    number, tables = folds * CASES, []
    difficulty, shared = rng.normal(0.8, 0.05, number), 1 / folds
    for method in range(methods):
        of_folds = rng.normal(0, luck * np.sqrt(1 - shared), (1, folds)) + rng.normal(0, luck * np.sqrt(shared))
        of_folds = of_folds + rng.normal(0, luck * (seeds > 1), (seeds, folds))
        taste, noise = rng.normal(0, 0.01, number), rng.normal(0, 0.02, (seeds, number))
        values = difficulty + np.repeat(of_folds, CASES, axis=1) + taste + noise
        tables.append((values + (effect if method == 1 else 0))[..., None])
    return tables


def contributions(tables, method=1):
    return (tables[method] - tables[0])[..., 0][None, None]  # (pairs, targets, seeds, cases)


@pytest.mark.parametrize(
    ("seeds", "luck", "folds"), [(1, 0.01, 5), (1, 0.03, 5), (1, 0.0, 5), (1, 0.02, 10), (2, 0.02, 5)]
)
def test_without_an_effect_pooled_folds_fire_in_5_percent_of_tables(seeds, luck, folds):
    rng, fired, number = np.random.default_rng(seeds + folds), 0, 1000
    for _ in range(number):
        tables = simulate(rng, methods=2, seeds=seeds, luck=luck, folds=folds)
        pooled = statistics.luck(tables, labels(folds))
        (p,) = statistics.p_values([(tables[1], tables[0])], pooled)
        fired += p[-1] < 0.05
    assert fired / number <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / number)


def test_the_correction_is_needed_and_is_not_too_careful():
    """With luck that dominates, the test without it fires too often, and the corrected one about as often as it says."""
    rng, plain, corrected, number = np.random.default_rng(3), 0, 0, 2000
    for _ in range(number):
        values = contributions(simulate(rng, methods=2, luck=0.03))
        of_folds = values.reshape(FOLDS, CASES).mean(axis=1)
        plain += stats.ttest_1samp(of_folds, 0).pvalue < 0.05
        corrected += fold_statistics.p_values(values, labels())[0, 0] < 0.05
    assert plain / number > 0.1
    assert 0.03 <= corrected / number <= 0.07


def test_wilcoxon_over_all_cases_would_take_the_luck_of_trainings_for_an_effect():
    rng = np.random.default_rng(4)
    fired = [
        stats.wilcoxon(contributions(simulate(rng, methods=2, luck=0.03))[0, 0, 0]).pvalue < 0.05 for _ in range(200)
    ]
    assert np.mean(fired) > 0.3


def test_a_planted_effect_is_found_and_the_interval_holds_it():
    rng, found, covered = np.random.default_rng(5), 0, 0
    for _ in range(200):
        tables = simulate(rng, effect=0.03, luck=0.005)
        pooled = statistics.luck(tables, labels())
        pairs = [(values, tables[0]) for values in tables[1:]]
        (difference, _), p = statistics.differences(pairs, labels()), statistics.p_values(pairs, pooled)
        found += p[0][-1] < 0.05
        covered += difference.low[-1] <= 0.03 <= difference.high[-1]
        assert (difference.low[-1] > 0) >= (p[0][-1] < 0.05)
    assert found / 200 > 0.9
    assert covered / 200 >= 0.92


def test_the_interval_of_a_share_of_pooled_folds_holds_the_true_share():
    rng, covered, number = np.random.default_rng(6), 0, 400
    for _ in range(number):
        control, method, positive = simulate(rng, effect=0.03)
        _, low, high = statistics.share(method, control, positive + 0.06, statistics.luck([control, method], labels()))
        covered += low <= 0.5 <= high
    assert covered / number >= 0.93


def test_the_p_value_is_that_of_the_formula():
    values = np.array([0.01, 0.02, 0.03, 0.05])
    t = values.mean() / np.sqrt((1 / 4 + 1 / 3) * values.var(ddof=1))
    found = fold_statistics.p_values(np.repeat(values, 3)[None, None, None], labels(4, 3))
    assert found[0, 0] == pytest.approx(2 * stats.t.sf(t, 3))
    low, high = fold_statistics.intervals(np.repeat(values, 3)[None, None, None], labels(4, 3))
    half = stats.t.ppf(0.975, 3) * np.sqrt((1 / 4 + 1 / 3) * values.var(ddof=1))
    assert (low[0, 0], high[0, 0]) == pytest.approx((values.mean() - half, values.mean() + half))
    margin = fold_statistics.margin(np.repeat(values, 3)[None], labels(4, 3))
    assert margin == pytest.approx(values.mean() - half)


def test_values_without_any_spread():
    equal = np.full((1, 1, 1, 6), 0.5)
    assert fold_statistics.p_values(equal, labels(3, 2)) == 0
    assert fold_statistics.p_values(equal - 0.5, labels(3, 2)) == 1


def test_cases_are_drawn_within_their_folds():
    """A difference between folds is no spread of the mean: in every resample each fold has its weight."""
    values = np.where(np.array(labels()) == 0, 0.2, 0.8)[None, :, None]
    within, across = statistics.estimates([values], labels())[0], statistics.estimates([values])[0]
    assert within.high[-1] - within.low[-1] == pytest.approx(0, abs=1e-6)
    assert across.high[-1] - across.low[-1] > 0.05


def test_each_fold_has_draws_of_its_own():
    weights = statistics._case_weights(labels(2, 10))
    assert not np.array_equal(weights[:, :10], weights[:, 10:])
    assert np.allclose(weights[:, :10].sum(axis=1), 10)


@pytest.mark.parametrize(("cases", "folds"), [(15, 15), (15, 10), (15, 5), (14, 7), (40, 10)])
def test_intervals_of_a_mean_cover_it_however_small_the_folds_are(cases, folds):
    rng, covered = np.random.default_rng(cases), 0
    for _ in range(400):
        (estimate,) = statistics.estimates([rng.normal(0.7, 0.1, (1, cases, 1))], tuple(np.arange(cases) % folds))
        covered += estimate.low[-1] <= 0.7 <= estimate.high[-1]
    assert covered / 400 >= 0.92


def test_a_fold_without_a_target_counts_for_nothing():
    rng = np.random.default_rng(8)
    values = rng.normal(0.02, 0.01, (1, 1, 1, 80))
    with_gap = np.concatenate([values, np.full((1, 1, 1, 20), np.nan)], axis=-1)
    four = fold_statistics.p_values(values, labels(4))
    assert fold_statistics.p_values(with_gap, labels(5)) == pytest.approx(four)
    assert np.isfinite(fold_statistics.intervals(with_gap, labels(5))[0]).all()
    one = np.where(np.array(labels(5)) == 0, with_gap, np.nan)
    assert np.isnan(fold_statistics.p_values(one, labels(5))).all()
