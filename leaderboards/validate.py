"""Validation of records and leaderboards from anywhere: complete, in range, unchanged, and averages that follow from cases."""

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from itertools import islice, product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.system.files import digest_file
from leaderboards import board, convergence, reported, statistics, table
from leaderboards.records import STATUS, SUMMARY, RecordError, Run, load_run
from leaderboards.schema import MOST_TRIALS
from leaderboards.table import COLUMNS, EXACT
from leaderboards.text import UNKNOWN, escape_cell

TOLERANCE = 1e-9
PRINTED = 2e-5
"""Relative tolerance for a CSV, which holds six significant digits."""

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
    # The interval over two folds, of which one is won and one is lost by 1, is 0 +- 22; folds of unequal sizes make it wider.
    "delta_ci_low": (-100, 100),
    "delta_ci_high": (-100, 100),
    "p_value_holm": (0, 1),
    "rank": (1, math.inf),
    "step_ms_p50": (0, math.inf),
    "pretrain_seconds": (0, math.inf),
    "surface_dice": (0, 1),
    "surface_dice_ci_low": (-1, 2),
    "surface_dice_ci_high": (-1, 2),
    "surface_tolerance_mm": (0, math.inf),
    "headroom_share": (-math.inf, math.inf),
    "headroom_share_ci_low": (-math.inf, math.inf),
    "headroom_share_ci_high": (-math.inf, math.inf),
    "steps_to_scratch": (1, math.inf),
    "seconds_to_scratch": (0, math.inf),
    "gpu_hours": (0, math.inf),
    "kwh": (0, math.inf),
    "peak_memory_gib": (0, math.inf),
}
LEFT_OUT = re.compile(rf"\d+ {board.LEFT_OUT}", re.ASCII)
POLICY = re.compile(r"empty-is-(?P<empty>worst|skipped|perfect)-v1(?:\+hd95-(?P<hd95>pooled|area-weighted))?")
PLAIN = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?", re.ASCII)
LATER = COLUMNS[COLUMNS.index("label_subset") :]
OLDER = dict.fromkeys(LATER, "") | {"label_subset": "first"}
"""The last columns, which tables of earlier versions lack, and what their rows have in common."""
FROM_RUNS = ("measured", "imported")
"""Sources of rows that follow from run folders."""
SHARED = [*COLUMNS[:8], "metric_policy", "surface_tolerance_mm", "label_subset"]
KEY = [*SHARED, "target", "source"]


def check_run(folder: Path) -> list[str]:
    """The problems of a run folder, one line each; empty where everything follows from the cases."""
    path = folder / "record.json"
    try:
        run = load_run(folder, check_digest=False)  # all problems are listed, and this is one
    except RecordError as error:
        return [str(error)]
    problems = [*_check_digests(run), *_check_aggregates(run), *_check_lists(run), *_check_policy(run)]
    problems += [*_check_validation(run), *_check_tuning(run), *_check_control(run)]
    config = run.record.get("config")
    for name in ("method", "backbone", "task", "mode", "protocol", "preset", "overrides", "seed", "label_fraction"):
        if isinstance(config, dict) and config.get(name, run.record[name]) != run.record[name]:
            problems.append(f"{name} is {run.record[name]!r}, its configuration says {config[name]!r}")
    if folder.resolve().name != run.run_id:
        problems.append(f"run_id is {run.run_id!r}, the folder is called {folder.resolve().name!r}")
    return [f"{path}: {problem}" for problem in problems]


def check_csv(path: Path, runs: Sequence[Run]) -> tuple[list[str], str]:
    """The problems of a leaderboard CSV, one line each; and, in words, what was recomputed from `runs`."""
    try:
        frame = _read_csv(path)
    except (OSError, ValueError, csv.Error) as error:
        return [f"{path}: {' '.join(str(error).split())[:300]}"], ""
    # Rows are checked only if every table cell is valid.
    problems = _check_cells(frame) or _check_rows(frame)
    recomputed = "not recomputed"
    if not problems:
        row_problems, recomputed = _recompute(frame, runs)
        problems += row_problems
    return [f"{path}: {problem}" for problem in problems], recomputed


def _check_digests(run: Run) -> Iterable[str]:
    """The problems of the digests: missing, or different from the files."""
    digests = run.record.get("digests", {})
    if not isinstance(digests, dict):
        yield "digests is no table"
        return
    if not isinstance(digests.get("cases.csv"), str):
        yield "digests has none of cases.csv, so that nobody can tell whether it was changed"
    for name in ("cases.csv", "weights.safetensors"):
        path = run.folder / name
        if name in digests and path.exists() and not path.is_file():
            yield f"{name} is no regular file"
        elif name in digests and path.exists():
            actual = digest_file(path)
            if actual != digests[name]:
                yield f"{name} was changed after the run: its digest is {actual}, the record says {digests[name]}"


def _check_aggregates(run: Run) -> Iterable[str]:
    """The averages and counts of the record that do not follow from the cases."""
    metrics = run.record["metrics"]
    fields = {"dice": run.dice, "hd95": run.hd95, "surface_dice": run.surface_dice}
    for name, values in fields.items():
        means = statistics.nanmean(values, 0)
        expected = dict(zip(run.targets, means, strict=True)) | {"average": float(statistics.nanmean(means, 0))}
        for target, value in expected.items():
            stated = metrics.get(target, {}).get(name)
            if name == "surface_dice" and stated is None and math.isnan(value):
                continue
            if not _equal(stated, value):
                yield f"{target} {name} is {stated}, its cases give {'nothing' if math.isnan(value) else f'{value:.12g}'}"
    for number, target in enumerate(run.targets):
        column = run.status[:, number]
        counts = {"n_cases": int((~np.isnan(run.dice[:, number])).sum())}
        counts |= {f"n_{name}": int((column == index).sum()) for index, name in enumerate(STATUS) if index}
        for name, count in counts.items():
            if metrics[target].get(name) != count:
                yield f"{target} {name} is {metrics[target].get(name)}, its cases give {count}"


def _check_lists(run: Run) -> Iterable[str]:
    """The problems of the lists of cases: missing, wrong, or test cases that were trained on and not counted."""
    data = run.record["data"]
    lists = {name: data.get(name) for name in ("train", "test", "pretrain")}
    for name, cases in lists.items():
        if cases is None and not (run.imported and name != "test"):
            yield f"data has no list of the {name} cases, so that nobody can tell what was seen"
    if lists["test"] is not None and tuple(sorted(lists["test"])) != run.cases:
        yield f"data.test names {len(lists['test'])} cases, cases.csv scores {len(run.cases)}, not the same ones"
    for name in ("train", "test"):
        if lists[name] is not None and data.get(f"n_{name}") != len(lists[name]):
            yield f"data.n_{name} is {data.get(f'n_{name}')}, the list has {len(lists[name])}"
    overlap = data.get("overlap") or []
    overlapping = {case for pair in overlap if isinstance(pair, list) for case in pair}
    seen = (set(lists["train"] or ()) | set(lists["pretrain"] or ()) | overlapping) & set(run.cases)
    if len(seen) > (run.num_test_seen or 0):
        yield f"{len(seen)} test cases were trained or pre-trained on ({min(seen)} ...), n_test_seen is {run.num_test_seen}"
    lineage = run.record.get("lineage") or {}
    unknown = any(not each.get("scans", False) for each in lineage.get("foreign", []))
    if run.record["data"]["n_test_seen"] == 0 and (unknown or lineage.get("num_without_signatures")):
        yield "n_test_seen is 0, its lineage says that nobody knows"


def _check_validation(run: Run) -> Iterable[str]:
    """The problems of the validation cases: trained on, tested, or not those that the curve is about."""
    data, validation = run.record["data"], run.record.get("validation", {})
    held_out, scored = data.get("validation") or [], validation.get("cases", [])
    for name in ("train", "pretrain", "test"):
        cases = data.get(name) or []
        if len(set(cases)) < len(cases):
            yield f"data.{name} names a case twice"
        if both := set(cases) & {*held_out, *scored}:
            yield f"{len(both)} validation cases are {name} cases ({min(both)} ...)"
    if scored and sorted(scored) != sorted(held_out):
        yield f"validation scores {len(scored)} cases, data.validation names {len(held_out)}, not the same ones"
    if len(set(scored)) < len(scored) or (validation.get("curve") and not scored):
        yield "validation has a case twice, or a curve without cases"
    settings = run.record.get("config", {})
    finetune = settings.get("finetune") if isinstance(settings, dict) else None
    steps = finetune.get("steps") if isinstance(finetune, dict) else None
    if isinstance(steps, int) and any(step > steps for step, _ in validation.get("curve", [])):
        yield f"validation has a step beyond the {steps} of fine-tuning"


def _check_tuning(run: Run) -> Iterable[str]:
    """The problems of what a record says about tuning: trials that the grid does not give, or another choice than the result."""
    if run.tuning is None:
        return
    axes = [word.partition("=") for word in run.tuning["grid"].split()]
    combinations = product(*(values.split(",") for _, _, values in axes))
    expected = [
        dict(zip((key for key, _, _ in axes), values, strict=True)) for values in islice(combinations, MOST_TRIALS + 1)
    ]
    tried = [trial["settings"] for trial in run.tuning["trials"]]
    if tried != expected:
        yield f"tuning has {len(tried)} trials, its grid gives {len(expected)}, not the same ones"
    chosen, config = run.tuning["trials"][run.tuning["chosen"]]["settings"], run.record.get("config")
    for key, value in chosen.items() if config is not None else ():
        section, _, name = key.partition(".")
        settings = config.get(section) if isinstance(config, dict) else None
        stated = settings.get(name) if isinstance(settings, dict) else None
        if not _equal(stated, _number_or_nan(value)):
            yield f"tuning chose {key}={value[:40]}, its configuration says {str(stated)[:40]}"
    for trial in run.tuning["trials"]:
        if "curve" in trial and not (trial["curve"] and _equal(trial["dice"], trial["curve"][-1][1])):
            yield f"a trial has the validation Dice {trial['dice']}, its curve ends elsewhere"
    curve = run.record.get("validation", {}).get("curve", [])
    if not curve or not _equal(run.tuning["trials"][run.tuning["chosen"]]["dice"], curve[-1][1]):
        yield "the chosen trial has another validation Dice than the run, or the run has no validation cases"


def _check_control(run: Run) -> Iterable[str]:
    """The problems of what a record says about its method's role, and of the draw of its labelled cases."""
    record = run.record
    method, labels = record["method"], record.get("uses_labels", False)
    if method in ("scratch", "untrained") and (labels or "pretrain" in record["timing"]["seconds"]):
        yield f"{method} pre-trains nothing and uses no labels before fine-tuning, the record says otherwise"
    if method == "supervised" and not labels:
        yield "supervised uses labels, the record says that it does not"
    subset = record["data"].get("label_subset", "first")
    if (subset == "first") != (record.get("rules", 1) == 1):
        yield f"label_subset is {subset!r} under rules {record.get('rules', 1)}: first belongs to rules 1, a draw to rules 2"


def _check_policy(run: Run) -> Iterable[str]:
    """The problems of the metric policy: unknown, or values that do not follow it."""
    policy = run.record["metric_policy"]
    match = POLICY.fullmatch(policy)
    if match is None:
        yield f"metric_policy is {policy!r:.80}, which this version does not know"
        return
    definition = run.record.get("metric_definitions", {}).get("hd95", "max-directed")
    if (match["hd95"] or "max-directed") != definition:
        yield f"metric_policy is {policy!r}, HD95 is said to be {definition!r}"
    one_sided = (run.status == 1) | (run.status == 2)
    if run.imported and run.imported["kind"] == SUMMARY:
        return  # it has no distances
    lacking = np.isnan(run.hd95[one_sided])
    if (lacking.any() and match["empty"] != "skipped") or (not lacking.all() and match["empty"] == "skipped"):
        yield f"{int(lacking.sum())} of {lacking.size} structures that were missed or made up have no HD95 under {policy}"


def _read_csv(path: Path) -> pd.DataFrame:
    """The table cells as text. Raises ValueError for another dialect or other columns.

    Columns that came later get the value that all rows of earlier versions have.
    """
    text = path.read_text(encoding="utf-8-sig")
    first_line = text.partition("\n")[0].strip()
    for separator, name in ((";", "semicolons"), ("\t", "tabs"), ("|", "bars")):
        if first_line.count(separator) >= len(COLUMNS) // 2:
            raise ValueError(f"separated by {name}, give commas and a decimal point: save it as plain CSV")
    rows = list(csv.reader(io.StringIO(text), strict=True))
    header = rows[0] if rows else []
    if len(set(header)) < len(header):
        raise ValueError("has a column twice")
    needed = [column for column in COLUMNS if column not in OLDER]
    if header[: len(needed)] == needed and len(rows) == 1:
        raise ValueError("has no rows")
    if header[: len(COLUMNS)] != COLUMNS and not (len(header) >= len(needed) and header == COLUMNS[: len(header)]):
        lacking = [column for column in COLUMNS if column not in header]
        problem = f"lacks the columns {', '.join(lacking)}" if lacking else "has its columns in another order"
        raise ValueError(f"{problem}: a leaderboard begins with {','.join(COLUMNS[:4])}, ...")
    for number, row in enumerate(rows[1:], 2):
        if len(row) != len(header):
            raise ValueError(f"line {number} has {len(row)} cells, its header {len(header)}: is it truncated?")
    frame = pd.DataFrame(rows[1:], columns=header, dtype=str)
    reported_rows = frame["source"] == "reported"
    for column, value in OLDER.items():
        if column not in frame:
            frame[column] = np.where(reported_rows, "", value)
    frame.attrs["stated"] = header
    return frame


def _check_cells(frame: pd.DataFrame) -> list[str]:
    """The table cells that are no number in their range, and unknown sources."""
    problems = []
    for column, (low, high) in NUMBERS.items():
        for line, cell in enumerate(frame[column], 2):
            value = None if not cell else float(cell) if PLAIN.fullmatch(cell) else math.nan
            if value is not None and not (math.isfinite(value) and low <= value <= high):
                problems.append(
                    f"line {line}: {column} is {cell[:40]!r}, give a number in {low:g}..{high:g}, or nothing"
                )
    for line, cell in enumerate(frame["n_test_seen"], 2):
        if cell not in ("", UNKNOWN) and not (cell.isascii() and cell.isdecimal()):
            problems.append(f"line {line}: n_test_seen is {cell[:40]!r}, give a number, {UNKNOWN} or nothing")
    for line, cell in enumerate(frame["source"], 2):
        if cell not in (*FROM_RUNS, "reported"):
            problems.append(f"line {line}: source is {cell[:40]!r}, give measured, imported or reported")
    return problems


def _check_rows(frame: pd.DataFrame) -> list[str]:
    """The rows that are duplicates, contradict themselves or lack something."""
    problems = []
    # Notes distinguish the reported results of several tables of a paper.
    duplicates = frame.duplicated([*KEY, "run_ids", "note"]) | frame[frame["source"].isin(FROM_RUNS)].duplicated(
        KEY
    ).reindex(frame.index, fill_value=False)
    problems += [
        f"line {line + 2}: a second row of {'/'.join(frame.loc[line, KEY])[:160]}" for line in frame.index[duplicates]
    ]
    numbers = frame[list(NUMBERS)].replace("", "nan").astype(float)
    for value, low, high in (
        ("dice", "dice_ci_low", "dice_ci_high"),
        ("delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high"),
    ):
        wrong = (numbers[low] > numbers[value] + 1e-6) | (numbers[high] < numbers[value] - 1e-6)
        problems += [f"line {line + 2}: {value} lies outside its interval" for line in frame.index[wrong]]
    imported = (frame["source"] == "imported") & (frame[["rank", "p_value_holm"]] != "").any(axis=1)
    problems += [f"line {line + 2}: an imported row has a rank or a p-value" for line in frame.index[imported]]
    measured = frame["source"].isin(FROM_RUNS)
    reported = ~measured & (frame[["rank", "p_value_holm", "run_ids"]] != "").any(axis=1)
    problems += [f"line {line + 2}: a reported row has a rank, a p-value or run ids" for line in frame.index[reported]]
    nameless = measured & (frame["run_ids"] == "")
    problems += [f"line {line + 2}: a {frame.loc[line, 'source']} row names no run" for line in frame.index[nameless]]
    for _, rows in frame[measured].groupby(SHARED, sort=False):
        dice = numbers.loc[rows.index, "dice"]
        average, targets = dice[rows["target"] == "average"], dice[rows["target"] != "average"]
        expected = float(statistics.nanmean(targets.to_numpy(), 0))
        if len(average) == 1 and len(targets) and not _equal(average.iloc[0], expected, PRINTED):
            line = average.index[0] + 2
            problems.append(f"line {line}: the average Dice is {average.iloc[0]:.6g}, its targets' is {expected:.6g}")
    return problems


def _recompute(frame: pd.DataFrame, runs: Sequence[Run]) -> tuple[list[str], str]:
    """Compute every measured or imported row again from the per-case values of its runs, where all of these are in `runs`.

    Returns:
        the problems, one line each; and, in words, what was recomputed.
    """
    problems = _check_reported(frame[frame["source"] == "reported"])
    measured = frame[frame["source"].isin(FROM_RUNS)]
    run_ids = {run_id for cell in measured["run_ids"] for run_id in cell.split()}
    own_runs = [run for run in runs if run.run_id in run_ids]
    lacking = sorted(run_ids - {run.run_id for run in own_runs})
    if lacking and own_runs:
        return [
            *problems,
            f"{len(lacking)} of its {len(run_ids)} runs are not at hand ({lacking[0]:.80} ...)",
        ], "not recomputed"
    if lacking:
        return problems, f"not recomputed: none of its {len(run_ids)} runs is at hand ({lacking[0]:.80} ...)"
    fresh = table.build(board.gather(own_runs))
    for column in fresh.columns:
        fresh[column] = fresh[column].map(escape_cell)
    for column in EXACT:
        fresh[column] = fresh[column].map(_digits)
    if set(LATER) - set(frame.attrs["stated"]):
        fresh["note"] = fresh["note"].map(_older_note)
    recomputed_rows = {tuple(row[name] for name in KEY): row for row in fresh.to_dict("records")}
    for line, row in zip(measured.index + 2, measured.to_dict("records"), strict=True):
        row |= {column: _digits(row[column]) for column in EXACT}
        recomputed = recomputed_rows.pop(tuple(row[name] for name in KEY), None)
        if recomputed is None:
            problems.append(f"line {line}: its runs give no such row")
            continue
        # Runs that were left out are not at hand.
        row["note"], recomputed["note"] = (_without_left_out(str(each["note"])) for each in (row, recomputed))
        for column in ("run_ids", "note", "n_test_seen"):
            if row[column] != str(recomputed[column]):
                problems.append(
                    f"line {line}: {column} is {row[column]!r:.80}, its runs give {recomputed[column]!r:.80}"
                )
        for column in NUMBERS.keys() & set(frame.attrs["stated"]):
            stated, value = row[column], recomputed[column]
            value = _or_nan(value)
            if not _equal(float(stated) if stated else None, value, PRINTED):
                problems.append(f"line {line}: {column} is {stated or 'empty'}, its cases give {value:.6g}")
    problems += [f"lacks the row of {'/'.join(map(str, key))[:160]}, which its runs give" for key in recomputed_rows]
    groups = {(run.table, run.method, run.backbone) for run in own_runs}
    others = [run for run in runs if (run.table, run.method, run.backbone) in groups and run.run_id not in run_ids]
    remark = f"; {len(others)} more runs of these rows are at hand and not in it" if others else ""
    return problems, f"{len(measured)} rows recomputed from {len(own_runs)} runs{remark}"


def _without_left_out(note: str) -> str:
    """The note of a row without the number of runs that it leaves out."""
    return "; ".join(part for part in note.split("; ") if not LEFT_OUT.fullmatch(part))


def _older_note(note: str) -> str:
    """The note of a row as versions before 0.5.0 wrote it, which did not have all sentences."""
    later = convergence.LABEL_MARK, board.SEEDS_MARK
    return "; ".join(part for part in note.split("; ") if not part.startswith(later))


def _check_reported(frame: pd.DataFrame) -> list[str]:
    """The reported rows that differ from the results which papers are known to report."""
    reported_rows = reported.rows(frame["task"])
    names = [*KEY[:5], "method", "backbone", "target", "note"]
    values: dict[tuple[str, ...], list[tuple[float, ...]]] = {}
    for row in reported_rows.to_dict("records"):
        key = tuple(escape_cell(row[name]) for name in names)
        values.setdefault(key, []).append(tuple(_or_nan(row[name]) for name in ("label_fraction", "dice", "hd95_mm")))
    problems = []
    for line, row in zip(frame.index + 2, frame.to_dict("records"), strict=True):
        stated = tuple(_or_nan(row[name]) for name in ("label_fraction", "dice", "hd95_mm"))
        candidates = values.get(tuple(row[name] for name in names), [])
        if not any(
            all(_equal(a, b, PRINTED) for a, b in zip(stated, values_of_row, strict=True))
            for values_of_row in candidates
        ):
            problems.append(f"line {line}: no such result is known to be reported")
    return problems


def _or_nan(value: Any) -> float:
    """A table cell as a number; NaN for an empty one."""
    return math.nan if value is None or value == "" else float(value)


def _number_or_nan(text: str) -> float:
    """The number that a text states; NaN if it states none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def _digits(cell: Any) -> str:
    """A number in one spelling with every digit, to compare cells that tell rows apart; empty for an empty cell."""
    value = _or_nan(cell)
    return "" if math.isnan(value) else repr(value)


def _equal(stated: Any, value: float, tolerance: float = TOLERANCE) -> bool:
    """Whether a stated number is `value`, within the tolerance; None and NaN are equal."""
    if stated is None or (isinstance(stated, float) and math.isnan(stated)):
        return math.isnan(value)
    if isinstance(stated, bool) or not isinstance(stated, int | float):
        return False
    return math.isclose(stated, value, rel_tol=tolerance, abs_tol=tolerance)
