"""Runs -> the leaderboard: one CSV whose columns are a contract, and a table for the terminal."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from leaderboards import statistics
from leaderboards.records import Run

COLUMNS = [
    *("task", "data", "preset", "mode", "protocol", "label_fraction", "method", "backbone", "n_seeds", "target"),
    *("dice", "dice_ci_low", "dice_ci_high", "hd95_mm", "hd95_ci_low", "hd95_ci_high", "n_cases", "n_missed"),
    *("delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high", "p_value_holm", "rank", "step_ms_p50"),
    *("pretrain_seconds", "source", "run_ids", "n_test_seen"),
]
CONTROL = "scratch"
TABLE = COLUMNS[:6]


def build(runs: Sequence[Run]) -> pd.DataFrame:
    """One row per table, method, backbone and target (`average` too), in the columns of `COLUMNS`.

    Runs share a table, and are compared, only where task, data, preset, mode, protocol, label fraction, metric
    policy and test cases are the same. What cannot be computed is empty. The control pre-trains on nothing, so it stands
    in the tables of both modes.
    """
    tables: dict[tuple[Any, ...], dict[tuple[str, str], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        tables[run.table][run.method, run.backbone].append(run)
    for run in [run for run in runs if run.record["method"] == CONTROL]:
        for other in tables:
            if other != run.table and without_mode(other) == without_mode(run.table):
                tables[other][run.method, run.backbone].append(run)
    rows = [row for key in sorted(tables) for row in _rows(key, tables[key])]
    return pd.DataFrame(rows, columns=COLUMNS)


def without_mode(table: tuple[Any, ...]) -> tuple[Any, ...]:
    """A table's key (`Run.table`) but for what was pre-trained on: the controls of its rows are found under it."""
    place = TABLE.index("mode")
    return (*table[:place], *table[place + 1 :])


def write_csv(frame: pd.DataFrame, path: Path) -> None:
    """The CSV, by rename; text that a spreadsheet would take for a formula is escaped with an apostrophe."""
    safe = frame.copy()
    for column in safe.columns[safe.dtypes.map(lambda kind: not pd.api.types.is_numeric_dtype(kind))]:
        safe[column] = safe[column].map(
            lambda text: f"'{text}" if isinstance(text, str) and text[:1] in "=+-@\t\r" else text
        )
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    safe.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)


def render(frame: pd.DataFrame) -> str:
    """The tables for a terminal, the best average first; phantom data is marked as such."""
    if frame.empty:
        return "no finished runs"
    parts = []
    for key, rows in frame.groupby(TABLE, sort=False):
        task, data, preset, mode, protocol, fraction = map(str, key if isinstance(key, tuple) else (key,))
        mark = "PHANTOM DATA, says nothing about any method - " if data.startswith("phantom") else ""
        mark += "TEST CASES WERE TRAINED OR PRE-TRAINED ON (column seen) - " if rows["n_test_seen"].any() else ""
        heading = f"{mark}{task}, {data}, preset {preset}, {mode}, {protocol}, {float(fraction):.0%} of the labels"
        parts.append("\n".join([heading, *_grid(rows)]))
    return "\n\n".join(parts)


def _rows(key: tuple[Any, ...], groups: dict[tuple[str, str], list[Run]]) -> list[dict[str, Any]]:
    """The rows of one table, ranked, with the paired difference to the control on the same backbone."""
    fixed = dict(zip(TABLE, key, strict=False))
    targets = next(iter(groups.values()))[0].targets
    rows = []
    for number, target in [(None, "average"), *enumerate(targets)]:
        mine = []
        for (method, backbone), runs in sorted(groups.items()):
            row = fixed | {"method": method, "backbone": backbone, "target": target} | _measured(runs, number)
            control = groups.get((CONTROL, backbone))
            if control is not None and method != CONTROL:
                row |= _against(runs, control, number)
            mine.append(row)
        _rank(mine)
        rows += mine
    return rows


def _stack(runs: Sequence[Run], field: str, number: int | None) -> statistics.Values:
    """(seeds, cases, targets), or one target of it."""
    values = np.stack([getattr(run, field) for run in runs])
    return values if number is None else values[:, :, [number]]


def _measured(runs: Sequence[Run], number: int | None) -> dict[str, Any]:
    dice, hd95, missed = (_stack(runs, field, number) for field in ("dice", "hd95", "missed"))
    timing = [run.record["timing"] for run in runs]
    steps = [t["pretrain_step"]["step"]["p50_ms"] for t in timing if t.get("pretrain_step")]
    seconds = [t["seconds"]["pretrain"] + t["seconds"]["method_prepare"] for t in timing if "pretrain" in t["seconds"]]
    return {
        "n_seeds": len({run.record["seed"] for run in runs}),
        "dice": statistics.mean(dice),
        **_ends("dice_ci", statistics.interval(dice)),
        "hd95_mm": statistics.mean(hd95),
        **_ends("hd95_ci", statistics.interval(hd95)),
        "n_cases": int((~np.isnan(dice)).any(axis=(0, 2)).sum()),
        "n_missed": int(missed.sum()),
        "step_ms_p50": float(np.median(steps)) if steps else None,
        "pretrain_seconds": float(np.mean(seconds)) if seconds else None,
        "source": "measured",
        "run_ids": " ".join(sorted(run.record["run_id"] for run in runs)),
        "n_test_seen": max(run.num_test_seen for run in runs),
    }


def _against(runs: Sequence[Run], control: Sequence[Run], number: int | None) -> dict[str, Any]:
    # Paired by seed as well: a seed that only one side has says nothing about the difference.
    shared = {run.record["seed"] for run in runs} & {run.record["seed"] for run in control}
    if not shared:
        return {}
    mine, theirs = (
        _stack([run for run in side if run.record["seed"] in shared], "dice", number) for side in (runs, control)
    )
    here, there = statistics.mean(mine), statistics.mean(theirs)
    return {
        "delta_dice_vs_scratch": None if here is None or there is None else here - there,
        **_ends("delta_ci", statistics.paired_interval(mine, theirs)),
        "p_value_holm": statistics.p_value(mine, theirs),
    }


def _rank(rows: list[dict[str, Any]]) -> None:
    corrected = statistics.holm([row.get("p_value_holm") for row in rows])
    scored = sorted((row["dice"] for row in rows if row["dice"] is not None), reverse=True)
    for row, p in zip(rows, corrected, strict=True):
        row["p_value_holm"] = p
        row["rank"] = None if row["dice"] is None else scored.index(row["dice"]) + 1


def _ends(name: str, interval: statistics.Interval) -> dict[str, float | None]:
    low, high = interval if interval is not None else (None, None)
    return {f"{name}_low": low, f"{name}_high": high}


def _grid(rows: pd.DataFrame) -> list[str]:
    targets = [target for target in rows["target"].unique() if target != "average"]
    heading = [
        "rank",
        "method",
        "backbone",
        "seeds",
        "Dice [95 % CI]",
        "vs scratch [95 % CI]",
        "HD95 mm",
        *targets,
        "cases",
        "missed",
        *(["seen"] if rows["n_test_seen"].any() else []),
        "pretrain s",
        "ms/step",
    ]
    lines = [heading]
    average = rows[rows["target"] == "average"].sort_values(["rank", "method"])
    for _, row in average.iterrows():
        same = rows[(rows["method"] == row["method"]) & (rows["backbone"] == row["backbone"])].set_index("target")
        lines.append(
            [
                _number(row["rank"], ".0f"),
                row["method"],
                row["backbone"],
                str(row["n_seeds"]),
                _with_interval(row, "dice", "dice_ci", ".4f"),
                _with_interval(row, "delta_dice_vs_scratch", "delta_ci", "+.4f"),
                _number(row["hd95_mm"], ".2f"),
                *(_number(same.loc[target, "dice"], ".4f") for target in targets),
                str(row["n_cases"]),
                str(row["n_missed"]),
                *([str(row["n_test_seen"])] if rows["n_test_seen"].any() else []),
                _number(row["pretrain_seconds"], ".0f"),
                _number(row["step_ms_p50"], ".0f"),
            ]
        )
    widths = [max(len(line[column]) for line in lines) for column in range(len(heading))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]


def _with_interval(row: "pd.Series[Any]", value: str, ends: str, form: str) -> str:
    if pd.isna(row[value]):
        return "-"
    if pd.isna(row[f"{ends}_low"]):
        return format(row[value], form)
    return f"{row[value]:{form}} [{row[f'{ends}_low']:{form}}, {row[f'{ends}_high']:{form}}]"


def _number(value: Any, form: str) -> str:
    return "-" if pd.isna(value) else format(value, form)
