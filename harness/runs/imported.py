"""Results of other software as a run folder: label maps, or nnU-Net's `summary.json`, for a task's test cases."""

import json
import math
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.api.task import Case, Task
from harness.config.schema import Evaluate
from harness.data.cases import case_bytes, load_label, num_workers
from harness.data.datasets import TaskData
from harness.data.image_names import IMAGE_ENDINGS, stem
from harness.evaluation import metrics
from harness.evaluation.evaluate import Rows, cases_table, new_scoring, read_reference, summarise
from harness.runs.record import RULES, SCHEMA
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.files import digest, digest_file, write_atomic

SUMMARY = "summary.json"
LARGEST = 256 * 2**20  # bytes of a summary that are read
GRID = 1e-3  # mm; largest allowed difference between the affines of a prediction and its reference
EQUAL = 1e-6  # largest difference between our Dice and nnU-Net's, which is computed in double precision


@dataclass(frozen=True)
class Origin:
    """What the user says about imported results: names for the table, seed, and a note."""

    method: str
    backbone: str
    seed: int
    note: str = ""


def import_results(source: Path, data: TaskData, split: str, settings: Evaluate, origin: Origin, runs: Path) -> Path:
    """Score label maps, or take the Dice of a summary; write `cases.csv` and `record.json` in a new folder of `runs`.

    Args:
        source: a folder with one label map per test case, named as the case; or `summary.json`, or a folder that has no label
            map but that.
        split: as in the record.

    Returns:
        The folder.

    Raises:
        UserError: a test case is missing, or a file is not about this case, this grid or these labels.
    """
    task, cases = data.task, data.split.test
    folder, summary = (source, source / SUMMARY) if source.is_dir() else (source.parent, source)
    predictions = _predictions(folder, cases) if source.is_dir() else {}
    if predictions:
        scoring = new_scoring(settings)
        rows = _scored(task, cases, predictions, scoring)
        if summary.is_file():
            _compare(rows, _from_summary(summary, task, cases, settings))
        used = [digest_file(path) for path in predictions.values()]
    elif summary.is_file():
        rows, used = _from_summary(summary, task, cases, settings), [digest_file(summary)]
    else:
        raise UserError(
            f"{source} has neither label maps of the test cases ({cases[0].id}.nii.gz, ...) nor {SUMMARY}: give nnU-Net's "
            "folder of predictions or its `validation` folder"
        )
    record = _record(data, split, settings, origin, "label maps" if predictions else SUMMARY, rows, used)
    target = runs / record["run_id"]
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "cases.csv", cases_table(rows))
    record["digests"] = {"cases.csv": digest_file(target / "cases.csv")}
    write_atomic(target / "record.json", json.dumps(record, indent=1, allow_nan=False))
    return target


def _predictions(folder: Path, cases: list[Case]) -> dict[str, Path]:
    """The label map of each test case; empty if there is none. Raises UserError if some are missing."""
    files = {stem(path): path for path in sorted(folder.iterdir()) if path.name.endswith(IMAGE_ENDINGS)}
    predictions = {case.id: files[case.id] for case in cases if case.id in files}
    missing = [case.id for case in cases if case.id not in files]
    if predictions and missing:
        raise UserError(
            f"{folder} has label maps of {len(predictions)} of {len(cases)} test cases; {missing[0]} is missing: give all, or "
            "the --split whose test cases these are"
        )
    if others := len(files) - len(predictions):
        say(f"not used: {others} images that are no test case")
    return predictions


def _scored(task: Task, cases: list[Case], predictions: Mapping[str, Path], scoring: metrics.Scoring) -> Rows:
    """Rows of `cases.csv` from label maps."""

    def score(case: Case) -> Rows:
        """The rows of a case."""
        path = predictions[case.id]
        label, affine, _ = load_label(task, replace(case, label=path))
        reference, reference_affine, _ = load_label(task, case)
        if label.shape != reference.shape or not np.allclose(affine, reference_affine, atol=GRID):
            raise UserError(
                f"{path} has another grid than {case.label}: shapes {label.shape} and {reference.shape}: give predictions in "
                "the grid of the images"
            )
        spacing = [float(edge) for edge in np.linalg.norm(reference_affine[:3, :3], axis=0)]
        scores = metrics.score(task.masks(label), task.masks(reference), spacing, scoring)
        return [{"case": case.id, "target": t, **asdict(s)} for t, s in zip(task.targets, scores, strict=True)]

    with ThreadPoolExecutor(num_workers(max(map(case_bytes, cases)), len(cases))) as pool:
        scored = list(progress(pool.map(score, cases), "score", total=len(cases)))
    return [row for rows in scored for row in rows]


def _from_summary(path: Path, task: Task, cases: list[Case], settings: Evaluate) -> Rows:
    """Rows of `cases.csv` with Dice alone, from nnU-Net's `summary.json`.

    The number of voxels of each reference (`n_ref`) must be that of ours, which proves that case, grid and labels are the same.
    """
    entries = _read_summary(path)
    missing = [case.id for case in cases if case.id not in entries]
    if missing:
        raise UserError(
            f"{path} lacks {len(missing)} of {len(cases)} test cases, for instance {missing[0]}: give the summary of all, or "
            "the --split whose test cases these are"
        )
    rows: Rows = []
    for case in cases:
        by_values = {_values(name): counts for name, counts in entries[case.id].items()}
        masks, _ = read_reference(task, case)
        for (target, values), mask in zip(task.targets.items(), masks, strict=True):
            counts = by_values.get(frozenset(values))
            if not isinstance(counts, dict):
                raise UserError(
                    f"{path}: case {case.id} has no label {', '.join(map(str, values))}, which is {target!r} here; it has "
                    f"{', '.join(map(repr, entries[case.id]))}: import the predictions instead"
                )
            rows.append(_summary_row(path, case.id, target, counts, int(mask.sum()), settings))
    return rows


def _read_summary(path: Path) -> dict[str, dict[str, Any]]:
    """Case -> label -> counts of a summary."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
        per_case = content["metric_per_case"]
        return {stem(Path(str(each["prediction_file"]).replace("\\", "/"))): dict(each["metrics"]) for each in per_case}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is no summary of nnU-Net ({type(error).__name__}: {' '.join(str(error).split())[:80]}): give the "
            f"{SUMMARY} of a `validation` folder"
        ) from None


def _values(name: str) -> frozenset[int]:
    """The label values that a summary names: `1`, or `(1, 2)` for a region."""
    return frozenset(int(digits) for digits in re.findall(r"\d{1,9}", name))


def _summary_row(
    path: Path, case: str, target: str, counts: Mapping[str, Any], reference: int, settings: Evaluate
) -> dict[str, Any]:
    """One row of `cases.csv`, without distances."""
    numbers = [counts.get(name) for name in ("TP", "FP", "FN", "n_ref")]
    if not all(isinstance(number, int | float) and 0 <= number < math.inf for number in numbers):
        raise UserError(f"{path}: case {case}, {target!r} lacks TP, FP, FN or n_ref: is it damaged?")
    hits, extra, lost, stated = (round(float(number)) for number in numbers if number is not None)
    if stated != reference or hits + lost != reference:
        raise UserError(
            f"{path}: case {case}, {target!r} has {stated} reference voxels, here it has {reference}: these are other labels, "
            "another grid or another case"
        )
    if not reference and not extra:
        dice = 1.0 if settings.empty == "perfect" else None
        return {"case": case, "target": target, **asdict(metrics.Score("empty", dice, None, None))}
    status = "spurious" if not reference else "scored" if hits + extra else "missed"
    return {
        "case": case,
        "target": target,
        **asdict(metrics.Score(status, 2 * hits / (2 * hits + extra + lost), None, None)),
    }


def _compare(ours: Rows, theirs: Rows) -> None:
    """Say how far the Dice of the label maps is from that of the summary beside them. Raises UserError if they differ."""
    pairs = zip(ours, theirs, strict=True)
    differences = [(abs((a["dice"] or 0) - (b["dice"] or 0)), a["case"], a["target"]) for a, b in pairs]
    most, case, target = max(differences)
    if most > EQUAL:
        raise UserError(
            f"the label map of {case} gives another Dice of {target!r} than {SUMMARY} beside it, by {most:.2g}: import one of "
            "them alone"
        )
    say(f"{SUMMARY} beside the label maps has the same Dice")


def _record(
    data: TaskData, split: str, settings: Evaluate, origin: Origin, kind: str, rows: Rows, used: list[str]
) -> dict[str, Any]:
    """The record of imported results, without the digests of its files."""
    task, scoring = data.task, new_scoring(settings)
    about = [asdict(origin), kind, used, data.fingerprint, split, settings.model_dump(mode="json")]
    name = re.sub(r"[^A-Za-z0-9.]+", "_", origin.method).strip("_.")[:60] or "results"
    return {
        "schema": SCHEMA,
        "rules": RULES,
        "run_id": f"imported-{task.name}-{name}-s{origin.seed}-{digest(about)[:10]}",
        "imported": {"kind": kind, "note": origin.note, "files": len(used)},
        "method": origin.method,
        "backbone": origin.backbone,
        "task": task.name,
        "task_version": task.version,
        "mode": "task-specific",
        "protocol": "finetune",
        "preset": "imported",
        "overrides": {},
        "label_fraction": 1.0,
        "seed": origin.seed,
        "data": {
            "source": "phantom" if data.phantom else "real",
            "fingerprint": data.fingerprint,
            "licence": task.licence,
            "n_test": len(data.split.test),
            "test": [case.id for case in data.split.test],
            "label_subset": "per seed",
            "split": split,
            "split_by": data.split.by,
            "n_test_seen": None,
        },
        "metrics": summarise(task, rows),
        "metric_policy": scoring.policy,
        "metric_definitions": {"hd95": scoring.hd95, "surface_dice_tolerance_mm": scoring.tolerance, "unit": "mm"},
        "timing": {"pretrain_step": None, "seconds": {}},
        "citations": [],
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
