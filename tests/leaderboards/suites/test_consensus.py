"""Consensus ranks against SciPy, printed tables and a second implementation of the resampling."""

import numpy as np
import pytest
from scipy import stats

from leaderboards import records
from leaderboards.suites.consensus import _friedman, _rank_draws, _task_weights, consensus
from tests.leaderboards.made import tables, write_dice

METHODS = ("scratch", "better", "worse")


def suite_of(folder, tasks=3, seeds=3, methods=METHODS, spread=0.01, gains=(0.0, 0.02, -0.02)):
    """Tables of a made suite; every run has luck of its own."""
    rng = np.random.default_rng(7)
    for task in range(tasks):
        difficulty = rng.normal(0.8, 0.05, 12)
        for seed in range(seeds):
            for method, gain in zip(methods, gains, strict=True):
                dice = difficulty + gain + rng.normal(0, spread) + rng.normal(0, 0.01, 12)
                write_dice(folder, method, seed, dice, task=f"task{task}")
    return tables(folder)


def by_hand(made, methods, resamples=1500):
    """Mean ranks in resamples of tasks, seeds and cases, one after another in plain loops; spread as in the package."""
    rng = np.random.default_rng(1)
    dice = [[np.stack([run.dice[:, 0] for run in group.runs]) for group in ordered(table, methods)] for table in made]
    means = []
    for _ in range(resamples):
        ranks = []
        for rows in dice:
            num_seeds, num_cases = rows[0].shape
            seeds = (
                1 + (rng.multinomial(num_seeds, [1 / num_seeds] * num_seeds) - 1) * (num_seeds / (num_seeds - 1)) ** 0.5
            )
            cases = (
                1 + (rng.multinomial(num_cases, [1 / num_cases] * num_cases) - 1) * (num_cases / (num_cases - 1)) ** 0.5
            )
            centre = [row.mean() for row in rows]
            drawn = [seeds @ row @ cases / num_seeds / num_cases for row in rows]
            ranks.append((centre, drawn))
        tasks = len(ranks)
        weights = 1 + (rng.multinomial(tasks, [1 / tasks] * tasks) - 1) * (tasks / (tasks - 1)) ** 0.5
        freedom = 2  # of three seeds, whose luck is most of the spread here
        widening = stats.t.ppf(0.975, freedom) / stats.norm.ppf(0.975)
        moved = [np.array(centre) + (np.array(drawn) - centre) * widening for centre, drawn in ranks]
        means.append(np.clip(weights @ np.stack([stats.rankdata(-each) for each in moved]) / tasks, 1, len(methods)))
    return np.percentile(means, [2.5, 97.5], axis=0)


def ordered(table, methods):
    return [next(group for group in table.groups if group.name == name) for name in methods]


def test_ranks_borda_and_order_are_those_of_the_means(tmp_path):
    made = suite_of(tmp_path)
    found = consensus(made)
    assert found.methods == ("better (unet)", "scratch (unet)", "worse (unet)")
    means = np.array([[group.dice.mean[-1] for group in ordered(table, found.methods)] for table in made])
    assert found.ranks.tolist() == stats.rankdata(-means, axis=1).tolist()
    assert found.mean_rank.tolist() == pytest.approx(found.ranks.mean(axis=0).tolist())
    assert found.borda.tolist() == [sum(3 - rank for rank in column) for column in found.ranks.T]
    assert found.friedman_p == pytest.approx(stats.friedmanchisquare(*means.T).pvalue)


def test_intervals_are_those_of_a_second_implementation(tmp_path):
    made = suite_of(tmp_path, tasks=5, spread=0.03)
    found = consensus(made)
    assert found.no_interval == ""
    low, high = by_hand(made, found.methods)
    assert found.low.tolist() == pytest.approx(low.tolist(), abs=0.25)
    assert found.high.tolist() == pytest.approx(high.tolist(), abs=0.25)
    assert (found.high - found.low).min() > 0.5
    assert found.first.sum() == pytest.approx(1)


@pytest.mark.parametrize(("methods", "tables_", "difference"), [(4, 14, 1.25), (3, 30, 0.605), (10, 10, 4.284)])
def test_the_critical_difference_is_the_published_one(methods, tables_, difference):
    """Demsar 2006: q of table 5(a) is 2.569 for 4 methods, 2.343 for 3, 3.164 for 10; 1.25 is his own example."""
    ranks = np.tile(np.arange(1.0, methods + 1), (tables_, 1))
    assert _friedman(ranks)[1] == pytest.approx(difference, abs=0.006)


def test_methods_within_the_critical_difference_share_a_bar(tmp_path):
    found = consensus(suite_of(tmp_path, tasks=2))
    assert found.critical_difference == pytest.approx(2.344 * np.sqrt(3 * 4 / 12), abs=0.01)
    assert found.cliques == [(0, 2)]
    apart = consensus(suite_of(tmp_path / "more", tasks=12, gains=(0.0, 0.1, -0.1)))
    assert apart.critical_difference < 1
    assert apart.cliques == []


def test_a_method_that_lacks_a_task_is_named_and_not_ranked(tmp_path):
    made = suite_of(tmp_path)
    for seed in range(3):
        write_dice(tmp_path, "new", seed, np.full(12, 0.9), task="task1")
    found = consensus(tables(tmp_path))
    assert "new (unet)" not in found.methods
    assert found.incomplete == {"new (unet)": [0, 2]}
    assert found.ranks.tolist() == consensus(made).ranks.tolist()


def test_one_seed_has_no_interval(tmp_path):
    found = consensus(suite_of(tmp_path, seeds=1))
    assert np.isnan([found.low, found.high, found.first]).all()
    assert found.mean_rank.tolist() == sorted(found.mean_rank)
    assert found.no_interval.endswith("on task0: one seed, whose luck cannot be told from the method")


def test_the_luck_of_a_seed_differs_between_tasks(tmp_path):
    """The same rows as two tables: their ranks vary as much, and a resample that is lucky for one is not so for the other."""
    (table,) = suite_of(tmp_path, tasks=1, spread=0.03)
    first, second = (_rank_draws(ordered(table, [group.name for group in table.groups]), stream) for stream in (0, 1))
    assert np.sort(first, axis=0).tolist() == np.sort(second, axis=0).tolist()
    assert first[:, 0].std() > 0.3
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.1


def test_tasks_count_equally_however_many_tables_they_have(tmp_path):
    made = suite_of(tmp_path)
    again = sorted(tmp_path.iterdir())
    for folder in again:
        run = records.load_run(folder)
        if run.record["task"] == "task0":  # a second table of the same task, where scratch is the best
            dice = run.dice[:, 0] + (0.2 if run.record["method"] == "scratch" else 0)
            write_dice(tmp_path, run.record["method"], run.seed, dice, task="task0", preset="small")
    found = consensus(tables(tmp_path))
    assert found.ranks.shape == (3, 3)
    ranks = dict(zip(found.methods, found.ranks.T, strict=True))
    assert ranks["scratch (unet)"].tolist() == [1.5, 2, 2]
    assert ranks["better (unet)"].tolist() == [1.5, 1, 1]
    assert consensus(made).mean_rank.tolist() == [1, 2, 3]


def test_weights_of_tasks_have_the_variance_of_independent_draws():
    weights = 6 * _task_weights(6)
    assert weights.sum(axis=1) == pytest.approx(np.full(len(weights), 6.0))
    assert weights.var(axis=0) == pytest.approx(np.ones(6), abs=0.12)  # 5/6 of a multinomial, spread by 6/5
    assert _task_weights(1).tolist() == [[1.0]] * len(weights)
