"""Results of other software as a run folder: label maps, or nnU-Net's `summary.json`, for a task's test cases."""

import json
import re
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError

from harness.api.task import Case, Task
from harness.config.schema import Evaluate
from harness.data.cases import case_bytes, load_label, num_workers
from harness.data.datasets import TaskData
from harness.data.image_files import corners_apart
from harness.data.image_names import IMAGE_ENDINGS, stem
from harness.evaluation import metrics
from harness.evaluation.evaluate import Rows, cases_table, new_scoring, read_reference, summarise
from harness.runs.record import RULES, SCHEMA
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.files import digest, digest_file, write_atomic
from leaderboards.records import SUMMARY
from leaderboards.schema import Record

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


class Counts(BaseModel):
    """Numbers of voxels of one label of one case."""

    model_config = ConfigDict(strict=True)
    TP: NonNegativeInt
    FP: NonNegativeInt
    FN: NonNegativeInt
    n_ref: NonNegativeInt
    n_pred: NonNegativeInt | None = None


class _PerCase(BaseModel):
    """One case of a summary."""

    prediction_file: Annotated[str, Field(max_length=10_000)]
    metrics: dict[str, Counts]


class _Summary(BaseModel):
    """What is read of nnU-Net's `summary.json`."""

    metric_per_case: list[_PerCase]


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
    if summary.exists() and not summary.is_file():
        raise UserError(f"{summary} is no regular file: take it out, or restore it")
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
            f"{source} has neither label maps of the test cases ({cases[0].id}.nii.gz, ..., without a channel's number) nor "
            f"{SUMMARY}: give nnU-Net's folder of predictions or its `validation` folder"
        )
    record = _record(data, split, settings, origin, "label maps" if predictions else SUMMARY, rows, used)
    try:
        Record.model_validate(record)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(
            f"{'.'.join(map(str, problem['loc']))} = {problem['input']!r:.60} cannot be used: {problem['msg']}"
        ) from None
    target = runs / record["run_id"]
    target.mkdir(parents=True, exist_ok=True)
    write_atomic(target / "cases.csv", cases_table(rows))
    record["digests"] = {"cases.csv": digest_file(target / "cases.csv")}
    write_atomic(target / "record.json", json.dumps(record, indent=1, allow_nan=False))
    return target


def _predictions(folder: Path, cases: list[Case]) -> dict[str, Path]:
    """The label map of each test case; empty if there is none. Raises UserError if some are missing."""
    files: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.name.endswith(IMAGE_ENDINGS):
            other = files.setdefault(stem(path), path)
            if other is not path:
                raise UserError(f"{other} and {path.name} are of one case: take one of them out")
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
        if label.shape != reference.shape:
            raise UserError(
                f"{path} has the shape {label.shape}, {case.label} has {reference.shape}: give predictions in the grid of the "
                "images"
            )
        if not np.allclose(affine, reference_affine, atol=GRID):
            apart = corners_apart(label.shape, affine, reference_affine)
            raise UserError(
                f"{path} and {case.label} have affines that place voxels up to {apart:.3g} voxels apart: give predictions in the "
                "grid of the images, turned as they are"
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
        by_values = _by_values(path, case.id, entries[case.id])
        masks, _ = read_reference(task, case)
        for (target, values), mask in zip(task.targets.items(), masks, strict=True):
            counts = by_values.get(frozenset(values))
            if counts is None:
                raise UserError(
                    f"{path}: case {case.id} has no label {', '.join(map(str, values))}, which is {target!r} here; it has "
                    f"{', '.join(ascii(name)[:40] for name in list(entries[case.id])[:20])}: import the predictions instead"
                )
            about = f"{path}: case {case.id}, {target!r}"
            rows.append(_summary_row(about, case.id, target, counts, int(mask.sum()), mask.size, settings))
    return rows


def _read_summary(path: Path) -> dict[str, dict[str, Counts]]:
    """Case -> label -> counts of a summary. Raises UserError if it is none, or names a case twice."""
    try:
        if path.stat().st_size > LARGEST:
            raise ValueError(f"more than {LARGEST >> 20} MiB")
        per_case = _Summary.model_validate_json(path.read_text(encoding="utf-8")).metric_per_case
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part)[:40] for part in problem["loc"])
        raise UserError(
            f"{path} is no summary of nnU-Net: {where} = {problem['input']!r:.40}: {problem['msg']}; give the {SUMMARY} of a "
            "`validation` folder"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is no summary of nnU-Net ({type(error).__name__}: {' '.join(str(error).split())[:80]}): give the "
            f"{SUMMARY} of a `validation` folder"
        ) from None
    entries: dict[str, dict[str, Counts]] = {}
    for each in per_case:
        name = stem(Path(each.prediction_file.replace("\\", "/")))
        if entries.setdefault(name, each.metrics) is not each.metrics:
            raise UserError(f"{path} has two entries of {name[:80]}: keep one")
    return entries


def _by_values(path: Path, case: str, entry: Mapping[str, Counts]) -> dict[frozenset[int], Counts]:
    """Label values -> counts. A label is named `1`, a region `(1, 2)`. Raises UserError for two names of one label."""
    found: dict[frozenset[int], Counts] = {}
    for name, counts in entry.items():
        if re.fullmatch(r"\d{1,9}|\(\d{1,9}(, ?\d{1,9})*,?\)", name, re.ASCII):
            values = frozenset(int(digits) for digits in re.findall(r"\d+", name))
            if values in found:
                raise UserError(f"{path}: case {case} has two entries of label {name}: keep one")
            found[values] = counts
    return found


def _summary_row(
    about: str, case: str, target: str, counts: Counts, reference: int, voxels: int, settings: Evaluate
) -> dict[str, Any]:
    """One row of `cases.csv`, without distances.

    Args:
        about: case and target, for messages.
        reference: number of voxels that the target has here.
        voxels: of the whole grid.
    """
    hits, extra, lost = counts.TP, counts.FP, counts.FN
    if counts.n_ref != reference or hits + lost != reference:
        raise UserError(
            f"{about} has {counts.n_ref} reference voxels (TP + FN: {hits + lost}), here it has {reference}: these are other "
            "labels, another grid or another case"
        )
    if hits + extra > voxels or counts.n_pred not in (None, hits + extra):
        raise UserError(
            f"{about} has TP {hits}, FP {extra} and n_pred {counts.n_pred}, on a grid of {voxels} voxels: which is right?"
        )
    if not reference and not extra:
        dice = 1.0 if settings.empty == "perfect" else None
        return {"case": case, "target": target, **asdict(metrics.Score("empty", dice, None, None))}
    status = "spurious" if not reference else "scored" if hits + extra else "missed"
    dice = 2 * hits / (2 * hits + extra + lost)
    return {"case": case, "target": target, **asdict(metrics.Score(status, dice, None, None))}


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
