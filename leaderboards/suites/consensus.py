"""Consensus ranks of methods over the tables of several tasks.

Sources: Wiesenfarth et al. 2021 (doi 10.1038/s41598-021-82017-6) for ranks that are resampled over tasks and cases; Demsar 2006,
"Statistical comparisons of classifiers over multiple data sets", section 3.2, for Friedman's test and the critical difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from leaderboards.board import Group, Table, paired, stack
from leaderboards.ranks import least_freedom, widen
from leaderboards.statistics import RESAMPLES, Values, why_no_test


@dataclass(frozen=True)
class Consensus:
    """The ranks of the methods that every table has.

    Attributes:
        methods: names of rows, as `Group.name`, the best mean rank first.
        ranks: by the mean Dice, (tasks, methods); the mean over a task's tables. Equal means share the mean of their ranks.
        mean_rank: mean over the tasks, (methods). `low`, `high`: 95 % intervals over tasks, seeds and cases; NaN where a row of
            a table has one seed or few cases.
        first: share of the resamples in which a method has the smallest mean rank; NaN as the intervals.
        borda: number of methods that a method beats, summed over the tasks; half for equal means.
        friedman_p: p-value of Friedman's test that all methods are equal; NaN with fewer than three methods or two tasks.
        critical_difference: two mean ranks that are closer cannot be told apart (Nemenyi, 5 %); NaN as `friedman_p`.
        no_interval: why there are no intervals; empty where there are.
        incomplete: rows that some table lacks -> the numbers of these tables.
    """

    methods: tuple[str, ...]
    ranks: Values
    mean_rank: Values
    low: Values
    high: Values
    first: Values
    borda: Values
    friedman_p: float
    critical_difference: float
    no_interval: str
    incomplete: dict[str, list[int]]

    @property
    def cliques(self) -> list[tuple[int, int]]:
        """First and last index of each largest run of methods whose mean ranks lie within the critical difference."""
        spans: list[tuple[int, int]] = []
        for start, rank in enumerate(self.mean_rank):
            stop = int(np.flatnonzero(self.mean_rank <= rank + self.critical_difference)[-1])
            if stop > start and (not spans or stop > spans[-1][1]):
                spans.append((start, stop))
        return spans


def consensus(tables: Sequence[Table]) -> Consensus:
    """The consensus over the tables of the rows that are ranked in all of them.

    A task is resampled with all its tables, and in each table seeds and cases are. Each table has draws of its own.
    """
    rows = [{group.name: group for group in table.groups if group.is_ranked} for table in tables]
    everyone = dict.fromkeys(name for members in rows for name in members)
    lacking = {name: [number for number, members in enumerate(rows) if name not in members] for name in everyone}
    names = [name for name, missing in lacking.items() if not missing]
    groups = [[members[name] for name in names] for members in rows]
    means = np.array([[group.dice.mean[-1] for group in each] for each in groups]).reshape(len(tables), len(names))
    tasks = [str(table.shared("task")) for table in tables]
    ranks = _per_task(stats.rankdata(-means, axis=1), tasks)
    order = np.lexsort((-means.mean(axis=0), ranks.mean(axis=0)))
    rows_in_order = [[each[index] for index in order] for each in groups]
    no_interval = _why_no_interval(tables, rows_in_order)
    unknown = np.full(len(names), np.nan)
    low, high, first = (unknown,) * 3 if no_interval or len(names) < 2 else _resampled(tasks, rows_in_order)
    friedman_p, difference = _friedman(ranks)
    return Consensus(
        methods=tuple(names[index] for index in order),
        ranks=ranks[:, order],
        mean_rank=ranks.mean(axis=0)[order],
        low=low,
        high=high,
        first=first,
        borda=(len(names) - ranks).sum(axis=0)[order],
        friedman_p=friedman_p,
        critical_difference=difference,
        no_interval=no_interval,
        incomplete={name: missing for name, missing in lacking.items() if missing},
    )


def _why_no_interval(tables: Sequence[Table], groups: Sequence[Sequence[Group]]) -> str:
    """The table and row whose ranks cannot be resampled, and why; empty if all can."""
    for table, rows in zip(tables, groups, strict=True):
        for group in rows:
            runs, _ = paired(group.runs, rows[0].runs)
            if not runs:
                return f"{group.name} and {rows[0].name} share no seed on {table.shared('task')}"
            if why := why_no_test(len(runs), len(runs[0].cases), table.folds):
                return f"{group.name} on {table.shared('task')}: {why.removeprefix('no p-value: ')}"
    return ""


def _resampled(tasks: Sequence[str], groups: Sequence[Sequence[Group]]) -> tuple[Values, Values, Values]:
    """Ends of the intervals of the mean ranks, and the share of the resamples in which each is the smallest; (methods) each.

    Args:
        tasks: the task of each table.
        groups: the rows of each table, all in one order.
    """
    draws = np.stack([_rank_draws(each, stream) for stream, each in enumerate(groups)])  # (tables, RESAMPLES, methods)
    of_tasks = _per_task(draws, tasks)
    mean_ranks = np.einsum("rt,trm->rm", _task_weights(len(of_tasks)), of_tasks).clip(1, draws.shape[2])
    low, high = np.percentile(mean_ranks, [2.5, 97.5], axis=0)
    best = mean_ranks == mean_ranks.min(axis=1, keepdims=True)
    return low, high, (best / best.sum(axis=1, keepdims=True)).mean(axis=0)


def _per_task(values: Values, tasks: Sequence[str]) -> Values:
    """Means over the tables of each task: (tables, ...) -> (tasks, ...)."""
    labels = np.array(tasks)
    return np.stack([values[labels == task].mean(axis=0) for task in dict.fromkeys(tasks)])


def _rank_draws(groups: Sequence[Group], stream: int) -> Values:
    """Ranks of the rows of one table in each resample of its seeds and cases, (RESAMPLES, methods)."""
    means = np.array([group.dice.mean[-1] for group in groups])
    draws = np.stack([group.dice.draws[:, -1] for group in groups], axis=1).astype(float)
    pairs = [paired(groups[0].runs, group.runs) for group in groups[1:]]
    freedom = least_freedom([(stack(first, "dice"), stack(second, "dice")) for first, second in pairs])
    ranks: Values = stats.rankdata(-widen(draws, means, freedom), axis=1)
    # Tables with equally many seeds use the same weights, which would make the luck of a seed the same in all tasks.
    return np.random.default_rng((stream, len(groups))).permutation(ranks)


def _task_weights(number: int) -> Values:
    """Weights of the tasks in each resample, (RESAMPLES, tasks), spread as those of seeds and cases; their sum is 1."""
    drawn = np.random.default_rng(number).multinomial(number, np.full(number, 1 / number), size=RESAMPLES).astype(float)
    weights = drawn if number < 2 else 1 + (drawn - 1) * np.sqrt(number / (number - 1))
    return weights / number


def _friedman(ranks: Values) -> tuple[float, float]:
    """p-value of Friedman's test, and the critical difference of mean ranks; NaN where there is too little for them."""
    num_tasks, number = ranks.shape
    if number < 3 or num_tasks < 2:
        return np.nan, np.nan
    quantile = stats.studentized_range.ppf(0.95, number, np.inf) / np.sqrt(2)
    difference = quantile * np.sqrt(number * (number + 1) / (6 * num_tasks))
    return float(stats.friedmanchisquare(*ranks.T).pvalue), float(difference)
