"""Are records and leaderboards from anywhere whole, in range, unchanged, and do their averages follow from their cases?"""

import csv
import hashlib
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from leaderboards import board, table
from leaderboards.records import STATUS, RecordError, Run, load_run
from leaderboards.table import COLUMNS

TOLERANCE = 1e-9
PRINTED = 2e-5
"""Relative; a CSV holds six significant digits."""

NUMBERS = {
    "label_fraction": (0, 1),
    "n_seeds": (1, math.inf),
    "dice": (0, 1),
    "dice_ci_low": (-1, 2),
    "dice_ci_high": (-1, 2),
    "hd95_mm": (0, math.inf),
    "hd95_ci_low": (-math.inf, math.inf),
    "hd95_ci_high": (0, math.inf),
    "n_cases": (0, math.inf),
    "n_missed": (0, math.inf),
    "delta_dice_vs_scratch": (-1, 1),
    "delta_ci_low": (-2, 2),
    "delta_ci_high": (-2, 2),
    "p_value_holm": (0, 1),
    "rank": (1, math.inf),
    "step_ms_p50": (0, math.inf),
    "pretrain_seconds": (0, math.inf),
    "n_test_seen": (0, math.inf),
    "surface_dice": (0, 1),
}
KEY = [*COLUMNS[:8], "target", "metric_policy", "source"]


def check_run(folder: Path) -> list[str]:
    """What is wrong with a run folder, one line each; empty where everything follows from the cases."""
    path = folder / "record.json"
    try:
        run = load_run(folder)
    except RecordError as error:
        return [str(error)]
    found = [*_check_digests(run), *_check_aggregates(run), *_check_lists(run), *_check_policy(run)]
    config = run.record.get("config")
    for name in ("method", "backbone", "mode", "protocol", "preset", "seed", "label_fraction"):
        if isinstance(config, dict) and config.get(name, run.record[name]) != run.record[name]:
            found.append(f"{name} is {run.record[name]!r}, its configuration says {config[name]!r}")
    if folder.resolve().name != run.run_id:
        found.append(f"run_id is {run.run_id!r}, the folder is called {folder.resolve().name!r}")
    return [f"{path}: {problem}" for problem in found]


def check_csv(path: Path, runs: Sequence[Run]) -> tuple[list[str], str]:
    """What is wrong with a leaderboard CSV, one line each, and what was recomputed from `runs`."""
    try:
        frame = _read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        return [f"{path}: {' '.join(str(error).split())[:300]}"], ""
    # Rows can be looked at once every cell is what it should be.
    found = _check_cells(frame) or _check_rows(frame)
    recomputed = "not recomputed"
    if not found:
        problems, recomputed = _recompute(frame, runs)
        found += problems
    return [f"{path}: {problem}" for problem in found], recomputed


def _check_digests(run: Run) -> Iterable[str]:
    digests = run.record.get("digests", {})
    if not isinstance(digests, dict):
        yield "digests is no table"
        return
    for name in ("cases.csv", "weights.safetensors"):
        path = run.folder / name
        if name in digests and path.exists():
            with path.open("rb") as file:
                actual = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
            if actual != digests[name]:
                yield f"{name} was changed after the run: its digest is {actual}, the record says {digests[name]}"


def _check_aggregates(run: Run) -> Iterable[str]:
    """Every average and count of the record, from the cases."""
    metrics = run.record["metrics"]
    fields = {"dice": run.dice, "hd95": run.hd95, "surface_dice": run.surface_dice}
    for name, values in fields.items():
        means = [_mean(column) for column in values.T]
        expected = dict(zip(run.targets, means, strict=True)) | {"average": _mean(np.array(means, dtype=float))}
        for target, value in expected.items():
            stated = metrics.get(target, {}).get(name)
            if name == "surface_dice" and stated is None and math.isnan(value):
                continue
            if not _equal(stated, value):
                yield f"{target} {name} is {stated}, its cases give {'nothing' if math.isnan(value) else f'{value:.12g}'}"
    for number, target in enumerate(run.targets):
        stated = metrics[target].get("n_cases"), metrics[target].get("n_missed")
        counted = int((~np.isnan(run.dice[:, number])).sum()), int(run.missed[:, number].sum())
        if stated != counted:
            yield f"{target} counts (cases, missed) are {stated}, its cases give {counted}"


def _check_lists(run: Run) -> Iterable[str]:
    data = run.record["data"]
    lists = {name: data.get(name) for name in ("train", "test", "pretrain")}
    for name, cases in lists.items():
        if cases is not None and (not isinstance(cases, list) or not all(isinstance(case, str) for case in cases)):
            yield f"data.{name} is no list of cases"
            return
    if lists["test"] is not None and tuple(sorted(lists["test"])) != run.cases:
        yield f"data.test names {len(lists['test'])} cases, cases.csv scores {len(run.cases)}, not the same ones"
    for name in ("train", "test"):
        if lists[name] is not None and data.get(f"n_{name}") != len(lists[name]):
            yield f"data.n_{name} is {data.get(f'n_{name}')}, the list has {len(lists[name])}"
    seen = set(lists["train"] or ()) & set(lists["test"] or ())
    if len(seen) > run.num_test_seen:
        yield f"{len(seen)} test cases were trained on ({min(seen)} ...), n_test_seen says {run.num_test_seen}"


def _check_policy(run: Run) -> Iterable[str]:
    policy = run.record["metric_policy"]
    empty = np.isnan(run.dice)
    if policy.startswith("empty-is-perfect") and empty.any():
        yield f"under {policy} every case has a Dice, {int(empty.sum())} have none"
    if policy.startswith("empty-is-worst") and np.isnan(run.hd95[~empty]).any():
        yield f"under {policy} every case that has a Dice has an HD95, {int(np.isnan(run.hd95[~empty]).sum())} have none"
    for target, entry in run.record["metrics"].items():
        if target != "average" and isinstance(entry, dict):
            counts = [entry.get(f"n_{status}", 0) for status in STATUS[1:]]
            if any(not isinstance(count, int) or count < 0 or count > len(run.cases) for count in counts):
                yield f"{target} counts {counts} of {STATUS[1:]} do not fit {len(run.cases)} cases"


def _read_csv(path: Path) -> pd.DataFrame:
    """The cells as text. Raises ValueError for another dialect or other columns."""
    text = path.read_text(encoding="utf-8-sig")
    first = text.partition("\n")[0].strip()
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if first.count(separator) >= len(COLUMNS) // 2:
            raise ValueError(f"separated by {name}, due are commas and a decimal point: save it as plain CSV")
    rows = list(csv.reader(io.StringIO(text), strict=True))
    header = rows[0] if rows else []
    if header[: len(COLUMNS)] != COLUMNS:
        lacking = [column for column in COLUMNS if column not in header]
        wrong = f"lacks the columns {', '.join(lacking)}" if lacking else "has its columns in another order"
        raise ValueError(f"{wrong}: a leaderboard begins with {','.join(COLUMNS[:4])}, ...")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} cells, its header {len(header)}: is it truncated?")
    return pd.DataFrame(rows[1:], columns=header, dtype=str)


def _check_cells(frame: pd.DataFrame) -> list[str]:
    found = []
    for column, (low, high) in NUMBERS.items():
        for line, cell in enumerate(frame[column], 2):
            try:
                value = float(cell) if cell else None
            except ValueError:
                value = math.nan
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                found.append(
                    f"line {line}: {column} is {cell[:40]!r}, due is a number in {low:g}..{high:g}, or nothing"
                )
    for line, cell in enumerate(frame["source"], 2):
        if cell not in ("measured", "reported"):
            found.append(f"line {line}: source is {cell[:40]!r}, due is measured or reported")
    return found


def _check_rows(frame: pd.DataFrame) -> list[str]:
    found = []
    # Reported results of several tables of a paper are told apart by their notes.
    twice = frame.duplicated([*KEY, "run_ids", "note"]) | frame[frame["source"] == "measured"].duplicated(KEY).reindex(
        frame.index, fill_value=False
    )
    found += [f"line {line + 2}: a second row of {'/'.join(frame.loc[line, KEY])[:160]}" for line in frame.index[twice]]
    numbers = frame[list(NUMBERS)].replace("", "nan").astype(float)
    for value, low, high in (
        ("dice", "dice_ci_low", "dice_ci_high"),
        ("delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high"),
    ):
        wrong = (numbers[low] > numbers[value] + 1e-6) | (numbers[high] < numbers[value] - 1e-6)
        found += [f"line {line + 2}: {value} lies outside its interval" for line in frame.index[wrong]]
    measured = frame["source"] == "measured"
    reported = ~measured & (frame[["rank", "p_value_holm", "run_ids"]] != "").any(axis=1)
    found += [f"line {line + 2}: a reported row has a rank, a p-value or run ids" for line in frame.index[reported]]
    nameless = measured & (frame["run_ids"] == "")
    found += [f"line {line + 2}: a measured row names no run" for line in frame.index[nameless]]
    for _, rows in frame[measured].groupby([*KEY[:8], "metric_policy"], sort=False):
        dice = numbers.loc[rows.index, "dice"]
        average, targets = dice[rows["target"] == "average"], dice[rows["target"] != "average"]
        if len(average) == 1 and len(targets) and not _equal(average.iloc[0], _mean(targets.to_numpy()), PRINTED):
            found.append(
                f"line {average.index[0] + 2}: the average Dice is {average.iloc[0]:.6g}, its targets' is {targets.mean():.6g}"
            )
    return found


def _recompute(frame: pd.DataFrame, runs: Sequence[Run]) -> tuple[list[str], str]:
    """Every measured row again from the per-case values of its runs, as far as these are at hand."""
    measured = frame[frame["source"] == "measured"]
    wanted = {run_id for cell in measured["run_ids"] for run_id in cell.split()}
    known = [run for run in runs if run.run_id in wanted]
    lacking = wanted - {run.run_id for run in known}
    if lacking:
        return [], f"not recomputed: {len(lacking)} of its {len(wanted)} runs are not at hand ({min(lacking)} ...)"
    fresh = table.build(board.gather(known))
    for column in fresh.columns:
        fresh[column] = fresh[column].map(table.escape)
    fresh["label_fraction"] = fresh["label_fraction"].map("{:.6g}".format)
    again = {tuple(row[name] for name in KEY): row for row in fresh.to_dict("records")}
    found = []
    for line, row in zip(measured.index + 2, measured.to_dict("records"), strict=True):
        mine = again.get(tuple(row[name] for name in KEY))
        if mine is None:
            found.append(f"line {line}: its runs give no such row")
            continue
        for column in NUMBERS:
            stated, value = row[column], mine[column]
            if not _equal(float(stated) if stated else None, math.nan if value is None else float(value), PRINTED):
                found.append(f"line {line}: {column} is {stated or 'empty'}, its cases give {value}")
    return found, f"{len(measured)} rows recomputed from {len(known)} runs"


def _mean(values: np.ndarray[Any, Any]) -> float:
    there = values[~np.isnan(values)]
    return float(there.mean()) if len(there) else math.nan


def _equal(stated: Any, value: float, tolerance: float = TOLERANCE) -> bool:
    if stated is None or (isinstance(stated, float) and math.isnan(stated)):
        return math.isnan(value)
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return False
    return math.isclose(stated, value, rel_tol=tolerance, abs_tol=tolerance)
