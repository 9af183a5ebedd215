"""Comparison of two methods, or of two runs, case by case."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd

from harness.system.errors import UserError, unknown
from leaderboards import board, statistics
from leaderboards.board import Group, NotComparableError, Table
from leaderboards.records import Run
from leaderboards.text import printable


@dataclass(frozen=True)
class Comparison:
    """The first minus the second, over the seeds that both have.

    Attributes:
        cases: one row per case and target (and "average"): Dice and HD95 of both and the difference in Dice, means over seeds.
        summary: one row per target, and one for the average.
        note: what a reader must know about the p-values.
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
        rows = average if len(average) <= 10 else pd.concat([average.head(5), average.tail(5)])
        heading = (
            "cases"
            if len(average) <= 10
            else "the five cases with the lowest differences, and the five with the highest"
        )
        blocks = [
            f"{printable(self.title)}\nA = {first}\nB = {second}\nseeds {seeds}",
            self.summary.to_string(index=False, na_rep="-", float_format="%.4f"),
            f"{heading}:\n" + rows.drop(columns="target").to_string(index=False, na_rep="-", float_format="%.4f"),
        ]
        return "\n\n".join([*blocks, *([self.note] if self.note else [])])


def compare_methods(tables: Sequence[Table], first: str, second: str) -> list[Comparison]:
    """Compare two methods in every table and on every backbone that both have.

    Args:
        first, second: as the rows name them. The settings in braces may be left out where only one row has the name.

    Raises:
        UserError: a name that no row or more than one has.
        NotComparableError: they share no table; the message says which fields differ.
    """
    first, second = (_named(name, tables) for name in (first, second))
    comparisons = []
    for table in tables:
        for one in (group for group in table.groups if group.method == first):
            for other in (group for group in table.groups if group.method == second):
                if one.backbone == other.backbone:
                    title = f"{table.title}, backbone {one.backbone}"
                    sides = board.paired(one.runs, other.runs)
                    if not sides[0]:
                        raise NotComparableError(f"{one.name} and {other.name} have no seed in common")
                    compared = _compare(title, table, *sides, (one.name, other.name), table.luck)
                    comparisons.append(replace(compared, note="\n".join([compared.note, *table.sentences])))
    if not comparisons:
        raise NotComparableError(_why_not(tables, first, second))
    return comparisons


def _named(name: str, tables: Sequence[Table]) -> str:
    """The method that a name stands for, with its settings. Raises UserError for none and for several."""
    methods = {group.method for table in tables for group in table.groups}
    same = sorted(method for method in methods if method.partition("{")[0] == name)
    if name in methods or len(same) == 1:
        return name if name in methods else same[0]
    if same:
        raise UserError(f"{name!r} is {len(same)} methods here: give one of {', '.join(map(repr, same))}")
    raise unknown("method among these runs", name, methods)


def compare_runs(first: Run, second: Run) -> Comparison:
    """Compare two runs. Raises NotComparableError where they do not belong to one table."""
    different = board.differing(first, second)
    if different:
        raise NotComparableError(f"{first.run_id} and {second.run_id} differ in {', '.join(different)}")
    (table,) = board.gather([first])
    luck = statistics.luck([board.stack([run], "dice") for run in (first, second)], first.folds)
    return _compare(table.title, table, [first], [second], (first.run_id, second.run_id), luck)


def _compare(
    title: str, table: Table, first: list[Run], second: list[Run], names: tuple[str, str], luck: statistics.Luck
) -> Comparison:
    """Compare the runs of two rows of a table, paired in their order.

    Args:
        names: of the two, for the reader.
        luck: of the seeds, as the test takes it: that of the whole table, so that the p-value is the table's before correction.
    """
    dice, hd95 = ([board.stack(side, field) for side in (first, second)] for field in ("dice", "hd95"))
    folds = first[0].folds
    (difference,) = statistics.differences([(dice[0], dice[1])], folds)
    means = [statistics.estimate(values).mean for values in (*dice, *hd95)]
    (p,) = statistics.p_values([(dice[0], dice[1])], luck)
    over_seeds = [statistics.nanmean(values, 0) for values in (*dice, *hd95)]
    per_case = [np.column_stack([values, statistics.nanmean(values, 1)]) for values in over_seeds]
    frames, summary = [], []
    for index, target in enumerate(table.names):
        a, b, hd95_a, hd95_b = (values[:, index] for values in per_case)
        frames.append(
            pd.DataFrame(
                {"case": first[0].cases, "target": target, "dice_a": a, "dice_b": b, "difference": a - b}
                | {"hd95_a": hd95_a, "hd95_b": hd95_b}
            )
        )
        summary.append(
            {
                "target": target,
                **dict(zip(("dice_a", "dice_b", "hd95_a", "hd95_b"), (values[index] for values in means), strict=True)),
                "difference": difference.mean[index],
                "ci_low": difference.low[index],
                "ci_high": difference.high[index],
                "p": p[index],
                "wins": int((a > b).sum()),
                "ties": int((a == b).sum()),
                "losses": int((a < b).sum()),
            }
        )
    note = statistics.why_no_test(len(first), len(first[0].cases), folds) or "p is of this pair alone: no correction"
    if imported := board.imported_note([*first, *second]):
        note = imported
        summary = [row | {"p": np.nan} for row in summary]
    seeds = [run.seed for run in first]
    return Comparison(title, names, seeds, pd.concat(frames, ignore_index=True), pd.DataFrame(summary), note)


def _why_not(tables: Sequence[Table], first: str, second: str) -> str:
    """Why two methods share no table: the fewest fields in which two of their rows differ."""

    def members(name: str) -> list[Group]:
        """The rows of a method in all tables."""
        return [group for table in tables for group in table.groups if group.method == name]

    pairs = [(one, other) for one in members(first) for other in members(second)]
    differences: list[list[str]] = []
    for one, other in pairs:
        fields = board.differing(one.runs[0], other.runs[0])
        if one.backbone != other.backbone:
            fields = [*fields, f"backbone ({one.backbone} and {other.backbone})"]
        differences.append(fields)
    fewest = sorted(differences, key=lambda fields: len(fields))[0]
    return f"{first} and {second} share no table: they differ in {', '.join(fewest)}"
