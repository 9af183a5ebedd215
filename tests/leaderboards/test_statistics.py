"""Do the statistics tell the truth? Against plain formulas, and in simulations with a known answer."""

import numpy as np
import pytest
from scipy import stats

from leaderboards import statistics

TRUE = 0.8


def simulate(rng, seeds=3, cases=44, methods=5, seed_luck=0.005, effect=0.0, targets=1):
    """Dice of methods that share cases: a case's difficulty, a run's luck, a method's taste for a case, noise."""
    difficulty = rng.normal(TRUE, 0.05, (1, cases, 1))
    tables = []
    for method in range(methods):
        luck, taste = rng.normal(0, seed_luck, (seeds, 1, 1)), rng.normal(0, 0.01, (1, cases, 1))
        noise = rng.normal(0, 0.02, (seeds, cases, targets))
        tables.append(difficulty + luck + taste + noise + (effect if method == 1 else 0))
    return tables


def corrected(tables):
    control, *others = tables
    found = statistics.p_values([(values, control) for values in others], statistics.luck(tables))
    return statistics.holm([p[-1] for p in found])


@pytest.mark.parametrize(
    ("seeds", "cases", "luck"),
    [(3, 44, 0.005), (3, 44, 0.0), (3, 44, 0.02), (2, 44, 0.01), (5, 30, 0.01), (3, 8, 0.01)],
)
def test_without_an_effect_the_corrected_tests_fire_in_at_most_5_percent_of_tables(seeds, cases, luck):
    rng = np.random.default_rng(seeds * cases)
    fired = sum(min(corrected(simulate(rng, seeds, cases, seed_luck=luck))) < 0.05 for _ in range(400))
    # 5 % of 400 and two standard errors of a proportion.
    assert fired / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_without_an_effect_cases_without_any_target_do_not_make_the_tests_fire():
    rng, fired = np.random.default_rng(0), 0
    for _ in range(400):
        tables = simulate(rng, 3, 24, seed_luck=0.02)
        for values in tables:
            values[:, 8:] = np.nan
        fired += min(corrected(tables)) < 0.05
    assert fired / 400 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 400)


def test_wilcoxon_alone_would_take_the_luck_of_seeds_for_an_effect():
    rng = np.random.default_rng(0)
    fired = 0
    for _ in range(200):
        control, *others = simulate(rng, seed_luck=0.02)
        differences = [(values - control).mean(axis=(0, 2)) for values in others]
        fired += min(statistics.holm([stats.wilcoxon(each).pvalue for each in differences])) < 0.05
    assert fired / 200 > 0.5


def test_a_planted_effect_is_found():
    rng = np.random.default_rng(1)
    found = [corrected(simulate(rng, effect=0.05)) for _ in range(100)]
    assert np.mean([p[0] < 0.05 for p in found]) > 0.95
    assert np.mean([min(p[1:]) < 0.05 for p in found]) < 0.08


@pytest.mark.parametrize(("seeds", "cases", "luck"), [(3, 44, 0.005), (3, 20, 0.005), (5, 44, 0.02), (1, 30, 0.0)])
def test_intervals_of_a_mean_cover_it_in_93_to_97_percent(seeds, cases, luck):
    rng = np.random.default_rng(seeds + cases)
    drawn = [simulate(rng, seeds, cases, methods=1, seed_luck=luck)[0] for _ in range(1000)]
    covered = np.mean([each.low[-1] <= TRUE <= each.high[-1] for each in statistics.estimates(drawn)])
    assert 0.93 <= covered <= 0.97


@pytest.mark.parametrize("luck", [0.0, 0.005, 0.01])
def test_intervals_of_a_difference_cover_it_in_93_percent_or_more(luck):
    rng = np.random.default_rng(7)
    pairs = []
    for _ in range(400):
        control, other = simulate(rng, methods=2, seed_luck=luck, effect=0.03)
        pairs.append((other, control))
    covered = np.mean([each.low[-1] <= 0.03 <= each.high[-1] for each in statistics.differences(pairs)])
    assert covered >= 0.93


def test_skewed_values_are_covered_as_well():
    """Dice near 1 with a tail of failures, as real test sets have."""
    rng = np.random.default_rng(2)
    draw = [rng.beta(12, 2, (1, 40, 1)) for _ in range(600)]
    covered = np.mean([each.low[-1] <= 12 / 14 <= each.high[-1] for each in statistics.estimates(draw)])
    assert 0.92 <= covered <= 0.97


def test_means_are_means_of_the_targets_means():
    values = np.array([[[0.5, 1.0], [0.7, np.nan]], [[0.9, 0.8], [0.1, np.nan]]])
    found = statistics.estimate(values)
    assert found.mean == pytest.approx([0.55, 0.9, 0.725])
    assert found.draws.shape == (statistics.RESAMPLES, 3)


def test_the_interval_agrees_with_the_t_interval_where_that_is_right():
    values = np.random.default_rng(0).normal(0.7, 0.1, (1, 60, 1))
    found = statistics.estimate(values)
    low, high = stats.t.interval(0.95, 59, values.mean(), stats.sem(values.ravel()))
    assert found.low[-1] == pytest.approx(low, abs=0.1 * (high - low))
    assert found.high[-1] == pytest.approx(high, abs=0.1 * (high - low))


def test_what_cannot_be_computed_is_nan():
    nothing = statistics.estimate(np.full((2, 5, 1), np.nan))
    assert np.isnan([nothing.mean[-1], nothing.low[-1], nothing.high[-1]]).all()
    single = statistics.estimate(np.full((2, 1, 1), 0.5))
    assert single.mean[-1] == 0.5
    assert np.isnan(single.low[-1])


def test_batches_give_what_one_at_a_time_gives():
    rng = np.random.default_rng(0)
    groups = [rng.random((seeds, 12, 3)) for seeds in (1, 3, 3, 2)] + [np.full((3, 12, 3), np.nan)]
    groups[1][0, 3, 1] = np.nan
    for one, many in zip(map(statistics.estimate, groups), statistics.estimates(groups), strict=True):
        for mine, theirs in ((one.mean, many.mean), (one.low, many.low), (one.high, many.high)):
            np.testing.assert_allclose(mine, theirs)


def test_signed_rank_is_scipys_for_each_pair():
    rng = np.random.default_rng(3)
    rows = rng.normal(0.01, 0.03, (6, 20))
    rows[1, 4] = np.nan
    rows[2, 5] = 0
    rows[3, 6] = -rows[3, 7]
    expected = [stats.wilcoxon(row[~np.isnan(row)]).pvalue for row in rows]
    assert statistics._signed_rank(rows) == pytest.approx(expected)


def test_no_test_without_seeds_or_cases():
    rng = np.random.default_rng(0)
    for shape, says in (((1, 20, 1), "one seed"), ((3, 5, 1), "5 cases")):
        first, second = rng.random(shape), rng.random(shape)
        (found,) = statistics.p_values([(first, second)], statistics.luck([first, second]))
        assert np.isnan(found).all()
        assert says in statistics.why_no_test(*shape[:2])
    assert statistics.why_no_test(2, 6) == ""


def test_holm():
    expected = [pytest.approx(0.03), pytest.approx(np.nan, nan_ok=True), pytest.approx(0.06), pytest.approx(0.06)]
    assert statistics.holm([0.01, np.nan, 0.04, 0.03]) == expected


def test_differences_refuse_what_is_not_paired():
    with pytest.raises(ValueError, match="same seeds"):
        statistics.difference(np.zeros((2, 5, 1)), np.zeros((3, 5, 1)))


def test_a_spurious_structure_counts_against_a_method_in_its_test_as_in_its_difference():
    """Ten cases have the structure, where the first is a little better; in ten it makes one up, and the second does not."""
    rng = np.random.default_rng(0)
    second = np.full((2, 20, 1), np.nan)
    second[:, :10] = 0.8 + rng.normal(0, 0.01, (2, 10, 1))
    first = second + 0.01
    first[:, 10:] = 0.0
    delta = statistics.difference(first, second).mean[-1]
    tested = statistics._contributions(first[None], second[None])[0, -1]
    assert delta < -0.3
    assert tested.mean() < -0.3
    (p,) = statistics.p_values([(first, second)], statistics.luck([first, second]))
    assert 0 < p[-1] < 0.1  # not the 0.002 of the ten cases where the first is better


def test_the_average_that_is_tested_is_the_average_that_is_shown():
    """A target that half of the cases lack counts as much as one that all have."""
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 3, 12, 2))
    first[:, 6:, 1] = second[:, 6:, 1] = np.nan
    first[:, 9:] = second[:, 9:] = np.nan  # cases that have no target at all
    tested = statistics._contributions(first[None], second[None])[0]
    shown = statistics.difference(first, second).mean
    assert np.nanmean(tested[-1]) == pytest.approx(shown[-1])
    assert np.nanmean(tested[1]) == pytest.approx(shown[1])


def test_cases_without_any_target_change_no_test_of_the_average():
    rng = np.random.default_rng(1)
    first, second = rng.random((2, 3, 12, 2))
    padded = [np.concatenate([side, np.full((3, 24, 2), np.nan)], axis=1) for side in (first, second)]
    pooled = statistics.luck([first, second])
    assert statistics.luck(padded).variance == pytest.approx(pooled.variance)
    np.testing.assert_allclose(
        statistics.p_values([tuple(padded)], pooled)[0], statistics.p_values([(first, second)], pooled)[0]
    )
    assert statistics.moments(*padded, pooled) == pytest.approx(statistics.moments(first, second, pooled))


def test_intervals_of_sparse_targets_stay_in_range():
    values = np.full((2, 12, 1), np.nan)
    values[0, 0], values[1, 5], values[1, 7] = 0.9, 0.2, 0.5
    found = statistics.estimate(values)
    assert not found.high[-1] > 1
    assert not found.low[-1] < 0


def test_area_under_the_curve():
    flat = [statistics.estimate(np.full((2, 6, 1), 0.7))] * 3
    assert statistics.area_under_curve([0.1, 0.2, 1.0], flat) == pytest.approx((0.7, 0.7, 0.7))
    rising = [statistics.estimate(np.full((2, 6, 1), value)) for value in (0.0, 1.0)]
    assert statistics.area_under_curve([0.5, 1.0], rising)[0] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="two points"):
        statistics.area_under_curve([1.0], flat[:1])
    with pytest.raises(ValueError, match="ascending"):
        statistics.area_under_curve([1.0, 0.5], flat[:2])


def test_a_p_value_is_the_larger_of_wilcoxons_and_of_clarks_t_test():
    """Clark's quasi-F for crossed seeds and cases, from its formula; the seeds' luck is the larger of two estimates."""
    rng = np.random.default_rng(4)
    for luck, number in ((0.02, 3), (0.001, 3), (0.01, 2)):
        tables = simulate(rng, seeds=number, cases=15, seed_luck=luck, effect=0.012)
        pooled = statistics.luck(tables)
        run_means = [table[:, :, 0].mean(axis=1) for table in tables]
        assert pooled.variance[-1] == pytest.approx(np.mean([means.var(ddof=1) for means in run_means]))
        assert pooled.freedom == len(tables) * (number - 1)
        found = statistics.p_values([(tables[1], tables[0])], pooled)[0][-1]
        change = (tables[1] - tables[0])[:, :, 0]
        per_case = change.mean(axis=0)
        seeds = max(change.mean(axis=1).var(ddof=1), 2 * pooled.variance[-1]) / number
        cases = per_case.var(ddof=1) / 15
        freedom = (seeds + cases) ** 2 / (seeds**2 / pooled.freedom + cases**2 / 14)
        crossed = 2 * stats.t.sf(abs(per_case.mean()) / np.sqrt(seeds + cases), freedom)
        assert found == pytest.approx(max(crossed, stats.wilcoxon(per_case).pvalue), rel=1e-9)
        assert statistics.p_values([(tables[0], tables[1])], pooled)[0][-1] == pytest.approx(found)


def test_what_two_methods_share_is_not_in_the_interval_of_their_difference():
    first = simulate(np.random.default_rng(5), methods=1, seed_luck=0.01)[0]
    found = statistics.difference(first, first - 0.1)
    assert found.high[-1] - found.low[-1] < 1e-9


def test_the_area_is_the_trapezoidal_rules():
    fractions, dice = [0.1, 0.2, 0.5, 1.0], [0.3, 0.6, 0.7, 0.75]
    parts = [statistics.estimate(np.full((2, 6, 2), value)) for value in dice]
    assert statistics.area_under_curve(fractions, parts)[0] == pytest.approx(np.trapezoid(dice, fractions) / 0.9)
