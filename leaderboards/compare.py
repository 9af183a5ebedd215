"""Two methods, or two runs, case by case."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from leaderboards import board, statistics
from leaderboards.board import Group, NotComparableError, Table
from leaderboards.records import Run
from leaderboards.text import printable


@dataclass(frozen=True)
class Comparison:
    """The first minus the second, over the seeds that both have.

    Attributes:
        cases: one row per case and target (and "average"), with both Dice and HD95 and the differences; means over seeds.
        summary: one row per target and average.
    """

    title: str
    names: tuple[str, str]
    seeds: list[int]
    cases: pd.DataFrame
    summary: pd.DataFrame
    note: str

    def __str__(self) -> str:
        first, second = map(printable, self.names)
        seeds = ", ".join(map(str, self.seeds))
        average = self.cases[self.cases["target"] == "average"].sort_values("difference")
        shown = average if len(average) <= 10 else pd.concat([average.head(5), average.tail(5)])
        heading = "cases" if len(average) <= 10 else "the five cases that lose most, and the five that win most"
        parts = [
            f"{printable(self.title)}\nA = {first}\nB = {second}\nseeds {seeds}",
            self.summary.to_string(index=False, na_rep="-", float_format="%.4f"),
            f"{heading}:\n" + shown.drop(columns="target").to_string(index=False, na_rep="-", float_format="%.4f"),
        ]
        return "\n\n".join([*parts, *([self.note] if self.note else [])])


def compare_methods(tables: Sequence[Table], first: str, second: str) -> list[Comparison]:
    """Two methods wherever they share a table and a backbone.

    Raises:
        NotComparableError: they share none; the message says which fields differ.
    """
    found = []
    for table in tables:
        for one in (group for group in table.groups if group.method == first):
            for other in (group for group in table.groups if group.method == second):
                if one.backbone == other.backbone:
                    title = f"{table.title}, backbone {one.backbone}"
                    found.append(_compare(title, table, one.runs, other.runs, (one.name, other.name)))
    if not found:
        raise NotComparableError(_why_not(tables, first, second))
    return found


def compare_runs(first: Run, second: Run) -> Comparison:
    """Two runs. Raises NotComparableError where they share no table."""
    different = board.differing(first, second)
    if different:
        raise NotComparableError(f"{first.run_id} and {second.run_id} differ in {', '.join(different)}")
    (table,) = board.gather([first])
    return _compare(table.title, table, [first], [second], (first.run_id, second.run_id))


def _compare(title: str, table: Table, first: list[Run], second: list[Run], names: tuple[str, str]) -> Comparison:
    if len(first) > 1 or len(second) > 1:
        first, second = board.paired(first, second)
        if not first:
            raise NotComparableError(f"{names[0]} and {names[1]} have no seed in common")
    dice, hd95 = ([board.stack(side, field) for side in (first, second)] for field in ("dice", "hd95"))
    difference = statistics.difference(dice[0], dice[1])
    means = [statistics.estimate(each).mean for each in (*dice, *hd95)]
    (p,) = statistics.p_values([(dice[0], dice[1])], statistics.luck(dice))
    over_seeds = [statistics.nanmean(each, 0) for each in (*dice, *hd95)]
    per_case = [np.column_stack([each, statistics.nanmean(each, 1)]) for each in over_seeds]
    frames, summary = [], []
    for number, target in enumerate(table.names):
        a, b, far_a, far_b = (each[:, number] for each in per_case)
        frames.append(
            pd.DataFrame(
                {"case": first[0].cases, "target": target, "dice_a": a, "dice_b": b, "difference": a - b}
                | {"hd95_a": far_a, "hd95_b": far_b}
            )
        )
        summary.append(
            {
                "target": target,
                **dict(zip(("dice_a", "dice_b", "hd95_a", "hd95_b"), (each[number] for each in means), strict=True)),
                "difference": difference.mean[number],
                "ci_low": difference.low[number],
                "ci_high": difference.high[number],
                "p": p[number],
                "wins": int((a > b).sum()),
                "ties": int((a == b).sum()),
                "losses": int((a < b).sum()),
            }
        )
    note = statistics.why_no_test(len(first), len(first[0].cases)) or "p is of this pair alone: no correction"
    seeds = [run.seed for run in first]
    return Comparison(title, names, seeds, pd.concat(frames, ignore_index=True), pd.DataFrame(summary), note)


def _why_not(tables: Sequence[Table], first: str, second: str) -> str:
    def members(name: str) -> list[Group]:
        return [group for table in tables for group in table.groups if group.method == name]

    pairs = [(one, other) for one in members(first) for other in members(second)]
    differences: list[list[str]] = []
    for one, other in pairs:
        found = board.differing(one.runs[0], other.runs[0])
        if one.backbone != other.backbone:
            found = [*found, f"backbone ({one.backbone} and {other.backbone})"]
        differences.append(found)
    fewest = sorted(differences, key=lambda found: len(found))[0]
    return f"{first} and {second} share no table: they differ in {', '.join(fewest)}"
