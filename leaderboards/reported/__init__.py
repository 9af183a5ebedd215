"""Results that a paper reports, as rows beside the measured rows. They are never ranked or tested with measured rows."""

import csv
from collections.abc import Iterable, Iterator
from importlib import resources
from typing import Any

import pandas as pd

from leaderboards.table import COLUMNS, ON_AVERAGE

TASKS = {"btcv": "btcv", "msd_liver": "msd_liver", "msd_spleen": "msd_spleen", "brats2020": "brats"}
PAPER = "Xing et al. 2023, HybridMIM"


def rows(tasks: Iterable[str]) -> pd.DataFrame:
    """Reported Dice and HD95 of these tasks in the columns of a leaderboard, with `source` = reported; empty if there are none.

    Dice in percent becomes a fraction. HD95 is as printed, since the paper names no unit. Rows whose note names no share of the
    labels used all labels.
    """
    task_names = {task.partition("@")[0] for task in tasks}
    row_of: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in _entries():
        task = TASKS[entry["dataset"]]
        if task not in task_names or entry["metric"] not in ("dice", "hd95"):
            continue
        note = entry["note"]
        key = tuple(entry[name] for name in ("table", "dataset", "method", "backbone", "pretraining", "target"))
        # A note on one number belongs to the row of that number; notes on settings and label fractions make another row.
        setting = "" if ON_AVERAGE in note else note
        row = row_of.setdefault((*key, setting), _row(entry, task))
        if entry["metric"] == "dice":
            row["dice"] = round(float(entry["value"]) / 100, 6)
        else:
            row["hd95_mm"] = float(entry["value"])
        row["note"] = "; ".join(dict.fromkeys([*filter(None, row["note"].split("; ")), *filter(None, [note])]))
    return pd.DataFrame(list(row_of.values()), columns=COLUMNS)


def known_tasks() -> list[str]:
    """The tasks that have reported results."""
    return sorted({TASKS[entry["dataset"]] for entry in _entries()})


def _row(entry: dict[str, str], task: str) -> dict[str, Any]:
    """The columns of a row that do not depend on the metric."""
    note = entry["note"]
    share = float(note.partition("%")[0]) / 100 if note[:1].isdigit() and "% of the labels" in note else 1.0
    mode = {"none": "task-specific", "official-weights": "generic"}.get(entry["pretraining"], entry["pretraining"])
    return {
        "task": task,
        "data": "reported",
        "preset": "paper",
        "mode": mode,
        "protocol": "finetune",
        "label_fraction": share,
        "method": entry["method"],
        "backbone": entry["backbone"],
        "target": entry["target"],
        "source": "reported",
        "metric_policy": "as printed",
        "note": f"{PAPER}, {_source_in_paper(entry['table'])}"
        + ("; official weights" if entry["pretraining"] == "official-weights" else ""),
    }


def _source_in_paper(table: str) -> str:
    """The figure or table of the paper, in words."""
    return f"figure {table.removeprefix('Fig')}" if table.startswith("Fig") else f"table {table}"


def _entries() -> Iterator[dict[str, str]]:
    """The lines of the file with the paper's numbers."""
    path = resources.files("leaderboards.reported") / "hybridmim.csv"
    with path.open(encoding="utf-8") as file:
        yield from csv.DictReader(file)
