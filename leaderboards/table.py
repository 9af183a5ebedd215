"""The leaderboard as CSV, Markdown, LaTeX, and text for the terminal. The columns of the CSV are a contract."""

import tempfile
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.cells import cell_len

from leaderboards.board import Group, Table, drawn_text
from leaderboards.calibration import share_text
from leaderboards.statistics import Estimate
from leaderboards.text import UNKNOWN, align, escape_cell, escape_latex, escape_markdown, fit, printable, seen_text

COLUMNS = [
    *("task", "data", "preset", "mode", "protocol", "label_fraction", "method", "backbone", "n_seeds", "target"),
    *("dice", "dice_ci_low", "dice_ci_high", "hd95_mm", "hd95_ci_low", "hd95_ci_high", "n_cases", "n_missed"),
    *("delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high", "p_value_holm", "rank", "step_ms_p50"),
    *("pretrain_seconds", "source", "run_ids", "n_test_seen"),
    *("surface_dice", "surface_dice_ci_low", "surface_dice_ci_high", "surface_tolerance_mm", "metric_policy", "note"),
    *("label_subset", "control", "headroom_share", "headroom_share_ci_low", "headroom_share_ci_high"),
    *("steps_to_scratch", "seconds_to_scratch", "gpu_hours", "kwh", "peak_memory_gib"),
]
"""The columns of the CSV, in an order that is a contract (docs/leaderboards.md); new columns are added only at the end."""

EXACT = ("label_fraction", "surface_tolerance_mm")
"""Columns whose numbers tell rows apart, so that they are written with every digit."""


class EndingError(Exception):
    """A file's ending names no format that tables are written in."""


def build(tables: Sequence[Table]) -> pd.DataFrame:
    """One row per table, method, backbone and target (`average` too), in the columns of `COLUMNS`.

    A value that cannot be computed is empty.
    """
    return pd.DataFrame([row for table in tables for row in _rows(table)], columns=COLUMNS)


def write(frame: pd.DataFrame, path: Path, warnings: Sequence[str] = ()) -> None:
    """Write CSV, Markdown or LaTeX, by the ending of the name, atomically.

    Args:
        warnings: see `warnings_of`; they stand below Markdown and LaTeX. A CSV holds rows alone.

    Raises:
        EndingError: another ending.
    """
    writers: dict[str, Callable[[pd.DataFrame], str]] = {
        ".csv": _csv,
        ".md": partial(markdown, warnings=warnings),
        ".tex": partial(latex, warnings=warnings),
    }
    if path.suffix not in writers:
        raise EndingError(f"{path.name} ends in {path.suffix or 'nothing'}, give one of {', '.join(writers)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    # Write into a new folder: a partial file with a name that can be guessed might be a link to another file.
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        written = Path(folder) / path.name
        written.write_text(writers[path.suffix](frame), encoding="utf-8")
        written.replace(path)


def warnings_of(tables: Iterable[Table]) -> list[str]:
    """What a reader must know about each table, and each row that had not converged; one sentence each, with the table."""
    return [
        f"{table.title}: {sentence}"
        for table in tables
        for sentence in [
            *table.sentences,
            *(f"{group.name}: {group.unconverged}" for group in table.groups if group.unconverged),
        ]
    ]


def render(tables: Sequence[Table], reported: pd.DataFrame | None = None, width: int | None = None) -> str:
    """The tables as text, rows by rank, with notes.

    Args:
        reported: results of papers, which are shown below them.
        width: of the terminal. A wider table is shown without the settings that all rows share, then without columns.
    """
    blocks = []
    for whole in tables:
        table, rows, said = whole, _grid(whole), []
        if width is not None and max(map(cell_len, align(rows))) > width:
            table = whole.with_short_names()
            rows, gone = fit(_grid(table), _leave_out(table), width)
            why = "left out, as the terminal is narrow (harness leaderboard build --wide shows all)"
            said = [f"{why}: {', '.join(gone)}"] if gone else []
        notes = dict.fromkeys(f"{group.name}: {group.note}" for group in table.groups if _worth_saying(group))
        said += [*table.sentences, *list(notes)[:20]]
        blocks.append("\n".join([*_wrapped(table.title, width), *map(printable, align(rows)), *indented(said, width)]))
    if reported is not None and not reported.empty:
        averages = reported[reported["target"] == "average"][
            ["task", "mode", "method", "backbone", "dice", "hd95_mm", "note"]
        ]
        text = averages.to_string(index=False, na_rep="-", float_format="%.4f")
        blocks.append(
            f"reported elsewhere (other data, presets and code: never ranked or tested with the above)\n{text}"
        )
    return "\n\n".join(blocks) or "no finished runs"


def markdown(frame: pd.DataFrame, warnings: Sequence[str] = ()) -> str:
    """One Markdown table per group of comparable rows: averages over targets, and Dice per target. Below them the warnings."""
    blocks = []
    for heading, columns, rows in _averages(frame):
        lines = ["| " + " | ".join(map(escape_markdown, line)) + " |" for line in (columns, *rows)]
        lines.insert(1, "|" + "|".join(["---"] * len(columns)) + "|")
        blocks.append("\n".join([f"### {escape_markdown(heading)}", "", *lines]))
    if warnings:
        blocks.append("\n".join(f"- {escape_markdown(warning)}" for warning in warnings))
    return "\n\n".join([*blocks, ""])


def latex(frame: pd.DataFrame, warnings: Sequence[str] = ()) -> str:
    """One booktabs tabular per group of comparable rows: averages over targets, and Dice per target. Below them the warnings."""
    blocks = []
    for heading, columns, rows in _averages(frame):
        first, *lines = [" & ".join(map(escape_latex, line)) + r" \\" for line in (columns, *rows)]
        begin = rf"\begin{{tabular}}{{rll{'r' * (len(columns) - 3)}}}"
        body = [r"\toprule", first, r"\midrule", *lines, r"\bottomrule", r"\end{tabular}"]
        blocks.append("\n".join([f"% {printable(heading)}", begin, *body]))
    if warnings:
        blocks.append("\n\n".join(map(escape_latex, warnings)))
    return "\n\n".join([*blocks, ""])


def _rows(table: Table) -> Iterable[dict[str, Any]]:
    """The rows of one table, the averages first."""
    last = len(table.targets)
    for number in [last, *range(last)]:
        ranks = table.ranks(number)
        for group, rank in zip(table.groups, ranks, strict=True):
            yield {
                **dict(zip(COLUMNS[:6], table.key, strict=False)),
                "method": group.method,
                "backbone": group.backbone,
                "target": table.names[number],
                **_measured(group, number, number == last),
                "rank": rank,
                "metric_policy": table.shared("metric_policy"),
                "label_subset": table.shared("label_subset"),
                "control": group.control,
                **(_share(table, group) | _to_scratch(table, group) if number == last else {}),
            }


def _share(table: Table, group: Group) -> dict[str, float | None]:
    """The columns of a row's share of the headroom."""
    interval = table.share(group)
    columns = ("headroom_share", "headroom_share_ci_low", "headroom_share_ci_high")
    # An end may be infinite, which no CSV should hold.
    return dict(zip(columns, (_value(end) if np.isfinite(end) else None for end in interval or ()), strict=False))


def _to_scratch(table: Table, group: Group) -> dict[str, float]:
    """The columns of the budget in which a row is as good as scratch at its end."""
    return dict(zip(("steps_to_scratch", "seconds_to_scratch"), table.to_scratch(group) or (), strict=False))


def _measured(group: Group, number: int, average: bool) -> dict[str, Any]:
    """The columns of a row for target `number`, or for the average over targets."""
    scored = [~np.isnan(run.dice) if average else ~np.isnan(run.dice[:, [number]]) for run in group.runs]
    missed = [run.missed if average else run.missed[:, number] for run in group.runs]
    row = {
        "n_seeds": len(group.runs),
        "n_cases": int(np.any([values.any(axis=1) for values in scored], axis=0).sum()),
        "n_missed": int(sum(values.sum() for values in missed)),
        "step_ms_p50": group.step_ms,
        "pretrain_seconds": group.pretrain_seconds,
        "gpu_hours": group.gpu_hours,
        "kwh": group.kwh,
        "peak_memory_gib": group.peak_memory,
        "source": "imported" if group.imported else "measured",
        "run_ids": " ".join(sorted(run.run_id for run in group.members)),
        "n_test_seen": seen_text(group.num_test_seen),
        "p_value_holm": _value(group.p[number]),
        "surface_tolerance_mm": group.runs[0].record.get("metric_definitions", {}).get("surface_dice_tolerance_mm"),
        "note": group.note,
    }
    estimates = (
        ("dice", "dice", group.dice),
        ("hd95_mm", "hd95", group.hd95),
        ("surface_dice", "surface_dice", group.surface_dice),
        ("delta_dice_vs_scratch", "delta", group.delta),
    )
    for name, ends, estimate in estimates:
        if estimate is not None:
            row |= _with_ends(name, ends, estimate, number)
    return row


def _with_ends(name: str, ends: str, estimate: Estimate, number: int) -> dict[str, float | None]:
    """The columns of an estimate: mean, and both ends of its interval."""
    values = estimate.mean[number], estimate.low[number], estimate.high[number]
    return dict(zip((name, f"{ends}_ci_low", f"{ends}_ci_high"), map(_value, values), strict=True))


def _value(number: float) -> float | None:
    """A number for a table cell; None for NaN."""
    return None if np.isnan(number) else float(number)


def _csv(frame: pd.DataFrame) -> str:
    """The frame as CSV: six digits, every digit in the columns `EXACT`, texts escaped."""
    safe = frame.copy()
    for column in EXACT:
        safe[column] = [_digits(value) for value in safe[column]]
    for column in safe.columns[safe.dtypes.map(lambda kind: not pd.api.types.is_numeric_dtype(kind))]:
        safe[column] = safe[column].map(escape_cell)
    text: str = safe.to_csv(index=False, float_format="%.6g", lineterminator="\n")
    return text


def _digits(value: float | None) -> str:
    """A number with six digits, or with every digit where six would change it; empty for NaN."""
    if value is None or np.isnan(value):
        return ""
    short = f"{value:.6g}"
    return short if float(short) == value else repr(float(value))


def _grid(table: Table) -> list[list[str]]:
    """Heading and rows of a table for the terminal."""
    seen = any(group.num_test_seen != 0 for group in table.groups)
    heading = ["rank", "method", "backbone", "seeds", "Dice [95 % CI]", "vs scratch [95 % CI]", "p (Holm)", "HD95 mm"]
    shares = any(each.shares for each in table.calibrations)
    heading += [
        *(["of headroom [95 % CI]"] if shares else []),
        *table.targets,
        "cases",
        "missed",
        *(["seen"] if seen else []),
        "pretrain s",
        "ms/step",
    ]
    lines = []
    for rank, group in zip(table.ranks(), table.groups, strict=True):
        row = _measured(group, len(table.targets), average=True)
        lines.append(
            [
                _number(rank, ".0f"),
                group.method,
                group.backbone,
                str(row["n_seeds"]),
                _interval(row, "dice", "dice", ".4f"),
                _interval(row, "delta_dice_vs_scratch", "delta", "+.4f"),
                _number(row["p_value_holm"], ".3g"),
                _number(row["hd95_mm"], ".2f"),
                *([share_text(table.share(group))] if shares else []),
                *(_number(value, ".4f") for value in group.dice.mean[:-1]),
                str(row["n_cases"]),
                str(row["n_missed"]),
                *([str(row["n_test_seen"])] if seen else []),
                _number(row["pretrain_seconds"], ".0f"),
                _number(row["step_ms_p50"], ".0f"),
            ]
        )
    return [heading, *sorted(lines, key=lambda line: (float(line[0]) if line[0] != "-" else np.inf, line[1], line[2]))]


def _wrapped(text: str, width: int | None) -> list[str]:
    """A text as lines of at most `width` characters; one line for None."""
    return [printable(text)] if width is None else textwrap.wrap(printable(text), max(20, width))


def indented(sentences: Sequence[str], width: int | None) -> list[str]:
    """Sentences as indented lines."""
    return [f"  {line}" for sentence in sentences for line in _wrapped(sentence, None if width is None else width - 2)]


def _leave_out(table: Table) -> list[str]:
    """Columns of `_grid` that a narrow terminal does without, the least missed first."""
    backbones = ["backbone"] if len({group.backbone for group in table.groups}) == 1 else []
    return [
        *("ms/step", *reversed(table.targets), "missed", "cases", "of headroom [95 % CI]", "pretrain s", "seeds"),
        *(*backbones, "HD95 mm", "p (Holm)"),
    ]


def _worth_saying(group: Group) -> bool:
    """Whether the note of a row is printed below the table."""
    return bool(group.note) and group.note != "the control"


HEADINGS = ["rank", "method", "backbone", "seeds", "Dice", "vs scratch", "p (Holm)", "HD95 (mm)", "pre-training (s)"]


def _averages(frame: pd.DataFrame) -> Iterable[tuple[str, list[str], list[list[str]]]]:
    """Heading, names of the columns, and rows of table cells, for each group of rows that share a table."""
    shared = [*COLUMNS[:6], "metric_policy", "source", "label_subset"]
    # Imported rows are shown beside measured ones; their names say what they are.
    imported = frame["source"] == "imported"
    frame = frame.assign(imported=imported, source=frame["source"].where(~imported, "measured"))
    for key, group in frame.groupby(shared, sort=False, dropna=False):
        average, single = group[group["target"] == "average"], group[group["target"] != "average"]
        targets = list(dict.fromkeys(single["target"]))
        targets = targets if len(targets) > 1 else []  # one target is its own average
        dice = {(*_row_key(row), row["target"]): row["dice"] for row in single.to_dict("records")}
        reported = (average["source"] == "reported").all()
        rows = [
            [
                _number(row["rank"], ".0f"),
                row["method"],
                row["backbone"],
                _number(row["n_seeds"], ".0f"),
                _interval(row, "dice", "dice", ".4f"),
                *(_number(dice.get((*_row_key(row), target)), ".4f") for target in targets),
                _interval(row, "delta_dice_vs_scratch", "delta", "+.4f"),
                _number(row["p_value_holm"], ".3g"),
                _interval(row, "hd95_mm", "hd95", ".2f"),
                _number(row["pretrain_seconds"], ".0f"),
                # Several tables of a paper have rows of one name.
                *([row["note"]] if reported else []),
            ]
            for row in average.sort_values(["rank", "method", "backbone"]).to_dict("records")
        ]
        at = HEADINGS.index("Dice") + 1
        columns = [*HEADINGS[:at], *targets, *HEADINGS[at:], *(["reported in"] if reported else [])]
        yield _heading(key, average), columns, rows


ON_AVERAGE = "average"
"""What the notes of papers' numbers say that are about the average alone."""


def _row_key(row: Any) -> tuple[Any, ...]:
    """What the rows of one method have in common over its targets."""
    method, backbone, run_ids, note = (
        "" if pd.isna(row[name]) else str(row[name]) for name in ("method", "backbone", "run_ids", "note")
    )
    # The notes of reported rows tell rows of one name apart, except those on the average alone.
    return method, backbone, run_ids, "; ".join(part for part in note.split("; ") if ON_AVERAGE not in part)


def _heading(key: Any, average: pd.DataFrame) -> str:
    """The heading of a table: warnings, then what its rows share."""
    task, data, preset, mode, protocol, fraction, policy, source, subset = map(str, key)
    mark = "PHANTOM DATA, says nothing about any method: " if data.startswith("phantom") else ""
    if average["n_test_seen"].map(lambda cell: str(cell).isdecimal() and int(cell) > 0).any():
        mark += "TEST CASES WERE TRAINED OR PRE-TRAINED ON: "
    if (average["n_test_seen"] == UNKNOWN)[~average["imported"]].any():
        mark += "TEST CASES MAY HAVE BEEN TRAINED ON, NOBODY KNOWS: "
    share = "" if fraction in ("nan", "") else f", {float(fraction):.0%} of the labels"
    share += drawn_text(subset.replace("nan", "")) if share and float(fraction) < 1 else ""
    return f"{mark}{task}, {data}, preset {preset}, {mode}, {protocol}{share}, {policy}, {source}"


def _interval(row: Any, value: str, ends: str, form: str) -> str:
    """A value with its interval; a hyphen without a value."""
    if pd.isna(row.get(value)):
        return "-"
    if pd.isna(row.get(f"{ends}_ci_low")):
        return format(row[value], form)
    return f"{row[value]:{form}} [{row[f'{ends}_ci_low']:{form}}, {row[f'{ends}_ci_high']:{form}}]"


def _number(value: Any, form: str) -> str:
    """A formatted number; a hyphen for None or NaN."""
    return "-" if value is None or pd.isna(value) else format(value, form)
