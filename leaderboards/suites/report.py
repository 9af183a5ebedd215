"""The report of a suite: its tables, the consensus over them, and what may be claimed; as text, CSV, Markdown and a figure."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from leaderboards import table as tables_as_text
from leaderboards.board import Table, gather, short_names, without_mode
from leaderboards.figures import plain, save
from leaderboards.records import Run
from leaderboards.suites.claims import PRIOR, Claim, all_claims, claims_against_scratch
from leaderboards.suites.consensus import Consensus, consensus
from leaderboards.text import align, counted, escape_cell, escape_markdown, fit, printable

SIGNIFICANT = 0.05


def tables_of_methods(runs: Sequence[Run]) -> list[Table]:
    """The tables of runs, without those that have controls only where another mode's table has them, too."""
    tables = gather(runs)
    with_methods = [any(not (group.control or group.imported) for group in table.groups) for table in tables]
    served = {without_mode(table.key) for table, methods in zip(tables, with_methods, strict=True) if methods}
    return [
        table
        for table, methods in zip(tables, with_methods, strict=True)
        if methods or without_mode(table.key) not in served
    ]


@dataclass(frozen=True)
class Report:
    """The verdict over the tables of a suite. `prior`: standard deviation of the true differences, see `claims`."""

    name: str
    tables: Sequence[Table]
    prior: float = PRIOR

    @cached_property
    def consensus(self) -> Consensus:
        """The consensus ranks over all tables."""
        return consensus(self.tables)

    @cached_property
    def against_scratch(self) -> list[Claim]:
        """Each method beside scratch, in each table and over all."""
        return claims_against_scratch(self.tables, self.consensus.methods, self.prior)

    @cached_property
    def pairs(self) -> list[Claim]:
        """All pairs of methods, in each table and over all."""
        return all_claims(self.tables, self.consensus.methods, self.prior)

    @cached_property
    def names(self) -> dict[str, str]:
        """Names of rows -> the same without what all of them share: settings, and the backbone."""
        rows = {group.name: group for table in self.tables for group in table.groups}
        methods = short_names([group.method for group in rows.values()])
        alone = len({group.backbone for group in rows.values()}) == 1
        short = {
            name: methods[row.method] if alone else f"{methods[row.method]} ({row.backbone})"
            for name, row in rows.items()
        }
        return short if len(set(short.values())) == len(short) else {name: name for name in rows}

    def consensus_frame(self) -> pd.DataFrame:
        """One row per method, the best mean rank first. docs/suites.md says what the columns are."""
        ranks, rows = self.consensus, []
        for index, name in enumerate(ranks.methods):
            own = [claim.of(name) for claim in self.against_scratch if name in (claim.first, claim.second)]
            own = [] if any(group.is_control for group in self._groups(name)) else own
            overall = next((claim for claim in own if claim.table is None), None)
            significant = [claim.difference > 0 for claim in own if claim.p < SIGNIFICANT]
            rows.append(
                {
                    "method": self.names[name],
                    "mean_rank": ranks.mean_rank[index],
                    "mean_rank_ci_low": ranks.low[index],
                    "mean_rank_ci_high": ranks.high[index],
                    "share_first": ranks.first[index],
                    "borda": ranks.borda[index],
                    "delta_dice_vs_scratch": overall.difference if overall else np.nan,
                    "delta_ci_low": overall.low if overall else np.nan,
                    "delta_ci_high": overall.high if overall else np.nan,
                    "wins": sum(significant) if overall else np.nan,
                    "losses": len(significant) - sum(significant) if overall else np.nan,
                    "probability_not_better": overall.false if overall else np.nan,
                    "hours": sum(group.seconds for group in self._groups(name)) / 3600,
                }
            )
        return pd.DataFrame(rows)

    def claims_frame(self) -> pd.DataFrame:
        """One row per pair of methods and table, and per pair over all tables (`task` is "all")."""
        rows = [
            {
                "task": "all" if claim.table is None else self.tables[claim.table].shared("task"),
                "table": None if claim.table is None else claim.table + 1,
                "first": self.names[claim.first],
                "second": self.names[claim.second],
                "difference": claim.difference,
                "ci_low": claim.low,
                "ci_high": claim.high,
                "p_value_holm": claim.p,
                "probability_false": claim.false,
            }
            for claim in self.pairs
        ]
        return pd.DataFrame(rows)

    def sentences(self) -> list[str]:
        """What a reader must know about the consensus, one sentence each."""
        ranks, num_tasks = self.consensus, len({table.shared("task") for table in self.tables})
        said = []
        if any(str(table.shared("data")).startswith("phantom") for table in self.tables):
            said.append("PHANTOM DATA in it: the verdict says nothing about any method")
        if num_tasks < 6:
            said.append(f"{counted(num_tasks, 'task')}: the ranks say little about other tasks")
        if np.isfinite(ranks.friedman_p):
            verdict = "differ" if ranks.friedman_p < SIGNIFICANT else "cannot be told apart"
            said.append(
                f"the methods {verdict} (Friedman p = {ranks.friedman_p:.3g}); mean ranks closer than "
                f"{ranks.critical_difference:.2f} cannot be told apart (Nemenyi)"
            )
        if ranks.no_interval:
            said.append(f"no intervals of the mean ranks: {ranks.no_interval}")
        for name, tables in ranks.incomplete.items():
            lacking = ", ".join(str(self.tables[number].shared("task")) for number in tables)
            said.append(f"{self.names[name]} is not in the consensus: no run for {lacking}")
        return said

    def text(self, width: int | None = None) -> str:
        """The whole report for a terminal of `width` characters; None for a file."""
        blocks = [tables_as_text.render(self.tables, width=width)]
        if self.consensus.methods:
            rows = _cells(self.consensus_frame())
            gone: list[str] = []
            if width is not None:
                rows, gone = fit(rows, ["hours", "Borda", "first", "wins/losses", "mean rank [95 %]"], width)
            left_out = [f"left out, as the terminal is narrow: {', '.join(gone)}"] if gone else []
            lines = [f"{self.name}: consensus over {counted(len(self.tables), 'table')}", *align(rows)]
            blocks.append(
                "\n".join([*map(printable, lines), *tables_as_text.indented(self.sentences() + left_out, width)])
            )
        else:
            said = tables_as_text.indented(self.sentences(), width)
            blocks.append("\n".join([f"{self.name}: no method is in every table", *said]))
        return "\n\n".join(blocks)

    def write(self, folder: Path) -> list[Path]:
        """Write the report into a folder: tables.csv, consensus.csv, claims.csv, report.md and the diagram. Returns the paths."""
        folder.mkdir(parents=True, exist_ok=True)
        rows, ranked = tables_as_text.build(self.tables), self.consensus_frame()
        cells = _cells(ranked)
        tables_as_text.write(rows, folder / "tables.csv")
        frames = {"consensus.csv": ranked, "claims.csv": self.claims_frame()}
        for name, frame in frames.items():
            for column in frame.columns[[not pd.api.types.is_numeric_dtype(kind) for kind in frame.dtypes]]:
                frame[column] = frame[column].map(escape_cell)
            frame.to_csv(folder / name, index=False, float_format="%.6g", lineterminator="\n")
        figure = [] if np.isnan(self.consensus.critical_difference) else _draw(self, folder / "critical_difference")
        picture = f"![{escape_markdown(self._caption())}]({figure[0].name})\n\n" if figure else ""
        table = [
            _row(cells[0]),
            _row(["---"] * len(cells[0])),
            *map(_row, [list(map(escape_markdown, row)) for row in cells[1:]]),
        ]
        said = "".join(f"- {escape_markdown(sentence)}\n" for sentence in self.sentences())
        heading = f"# {escape_markdown(self.name)}\n\n"
        body = tables_as_text.markdown(rows, tables_as_text.warnings_of(self.tables))
        (folder / "report.md").write_text(
            f"{heading}{picture}" + "\n".join(table) + f"\n\n{said}\n{body}", encoding="utf-8"
        )
        return [folder / name for name in ("report.md", "tables.csv", *frames)] + figure

    def _groups(self, name: str) -> list:
        """The rows of this name, in all tables."""
        return [group for table in self.tables for group in table.groups if group.name == name]

    def _caption(self) -> str:
        """The diagram in words."""
        ranks = self.consensus
        listed = ", ".join(
            f"{self.names[name]} {rank:.2f}" for name, rank in zip(ranks.methods, ranks.mean_rank, strict=True)
        )
        return f"Mean ranks, the best first: {listed}; critical difference {ranks.critical_difference:.2f}"


def _row(cells: Sequence[str]) -> str:
    """One line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


def _cells(frame: pd.DataFrame) -> list[list[str]]:
    """Headings and rows of the consensus as text."""
    headings = [
        "method",
        "mean rank [95 %]",
        "first",
        "Borda",
        "vs scratch [95 %]",
        "wins/losses",
        "not better",
        "hours",
    ]
    rows = []
    for row in frame.to_dict("records"):
        known = not np.isnan(row["delta_dice_vs_scratch"])
        rows.append(
            [
                str(row["method"]),
                _interval(row, "mean_rank", "mean_rank", ".2f"),
                "-" if np.isnan(row["share_first"]) else f"{row['share_first']:.0%}",
                f"{row['borda']:g}",
                _interval(row, "delta_dice_vs_scratch", "delta", "+.4f") if known else "-",
                f"{row['wins']:.0f}/{row['losses']:.0f}" if known else "-",
                _probability(row["probability_not_better"]),
                f"{row['hours']:.2f}",
            ]
        )
    return [headings, *rows]


def _probability(value: float) -> str:
    """A probability in percent; a hyphen for NaN. One that is not 0 does not look like 0."""
    if np.isnan(value):
        return "-"
    return "<0.1%" if 0 < value < 0.0005 else f"{value:.1%}"


def _interval(row: dict, value: str, ends: str, form: str) -> str:
    """A value with its interval, where there is one."""
    low, high = row[f"{ends}_ci_low"], row[f"{ends}_ci_high"]
    return f"{row[value]:{form}}" + ("" if np.isnan(low) else f" [{low:{form}}, {high:{form}}]")


def _draw(report: Report, path: Path) -> list[Path]:
    """Draw the critical-difference diagram (Demsar 2006, figure 1). Returns the paths."""
    ranks = report.consensus
    number, cliques = len(ranks.methods), ranks.cliques

    def draw(axes: Axes) -> None:
        """Draw into the axes: a row per method, and at the right a bar beside the methods of a clique."""
        rows = np.arange(number)
        errors = np.nan_to_num([ranks.mean_rank - ranks.low, ranks.high - ranks.mean_rank]).clip(0)
        axes.errorbar(
            ranks.mean_rank, rows, xerr=errors, marker="o", color="black", linestyle="", capsize=2, linewidth=0.8
        )
        for column, (start, stop) in enumerate(cliques):
            axes.plot([number + 0.3 + 0.15 * column] * 2, [start - 0.2, stop + 0.2], color="0.55", linewidth=4)
        axes.set_yticks(rows, [plain(report.names[name]) for name in ranks.methods])
        axes.set_ylim(number - 0.4, -0.6)
        axes.set_xlim(0.8, number + 0.3 + 0.15 * len(cliques))
        axes.set_xticks(range(1, number + 1))
        axes.set_xlabel(
            "mean rank with 95 % interval; methods beside one grey bar\n"
            f"are not told apart (critical difference {ranks.critical_difference:.2f})"
        )

    save(path, (6.5, 1.6 + 0.3 * number), f"{report.name}: mean rank over {counted(len(report.tables), 'table')}", draw)
    return [path.with_suffix(".png"), path.with_suffix(".svg")]
