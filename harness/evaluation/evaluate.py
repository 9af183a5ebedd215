"""The last stage of a run: scores every test case on its native grid, exactly once, with any number of processes."""

import csv
import io
import json
import shutil
import time
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from harness.api.task import Case, Task
from harness.compute.processes import Processes
from harness.config.schema import Evaluate, RunConfig
from harness.data import pictures
from harness.data.cases import load_label
from harness.data.image_files import write_label
from harness.data.pictures import Panel, target_numbers
from harness.data.volumes import Volume, check_unchanged
from harness.evaluation import metrics
from harness.evaluation.sliding_window import predict
from harness.system.console import progress
from harness.system.files import check_name, write_atomic

AVERAGED = {"dice": "dice", "hd95": "hd95_mm", "surface_dice": "surface_dice"}
"""The scores that a summary averages, and their columns in `cases.csv`."""

Rows = list[dict[str, Any]]
"""Rows of `cases.csv`: one per target of a case."""


@dataclass(frozen=True)
class Scored:
    """A scored case: its rows of `cases.csv`, its panel, and the seconds that it took."""

    rows: Rows
    panel: pictures.Panel
    seconds: float


@dataclass(frozen=True)
class Scores:
    """A folder with one file per scored case, so that no case is scored again after an interruption.

    Attributes:
        network: digest of the weights; scores of other weights are not used.
        predictions: folder for label maps; None if none are written.
    """

    folder: Path
    network: str
    predictions: Path | None

    def read(self, case: str) -> Scored | None:
        """The scores of a case from an earlier call; None if there are none, or a file is damaged or missing."""
        try:
            with np.load(self._path(case), allow_pickle=False) as file:
                described = json.loads(str(file["described"]))
                if described["network"] != self.network or described["case"] != case:
                    return None
                arrays = {name: file[name] for name in ("image", "reference", "prediction")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if self.predictions is not None and not self.prediction(case).exists():
            return None
        panel = pictures.Panel(case=case, dice=described["dice"], aspect=described["aspect"], **arrays)
        return Scored(described["rows"], panel, described["seconds"])

    def write(self, case: str, scored: Scored) -> None:
        """Write the scores of a case."""
        panel, buffer = scored.panel, io.BytesIO()
        described = {"case": case, "network": self.network, "rows": scored.rows, "seconds": scored.seconds}
        described |= {"dice": panel.dice, "aspect": panel.aspect}
        text = np.array(json.dumps(described))
        np.savez(buffer, described=text, image=panel.image, reference=panel.reference, prediction=panel.prediction)
        write_atomic(self._path(case), buffer.getbuffer())

    def prediction(self, case: str) -> Path:
        """The file for the predicted label map of a case."""
        assert self.predictions is not None
        return self.predictions / f"{check_name(case)}.nii.gz"

    def _path(self, case: str) -> Path:
        return self.folder / f"{check_name(case)}.npz"


def evaluate(
    config: RunConfig,
    task: Task,
    network: nn.Module,
    weights: str,
    volumes: Sequence[Volume],
    folder: Path,
    title: str,
    processes: Processes,
    save_predictions: bool = False,
) -> tuple[dict[str, Any], float]:
    """Score every test case on its native grid; write `cases.csv` and `figures/segmentation.png` in `folder`.

    With `save_predictions`, also write `predictions/CASE.nii.gz`: label maps on the native grid, in the numbering of the
    data. Cases that were scored before an interruption are not scored again.

    Args:
        weights: digest of the network's weights.
        title: of the figure.

    Returns:
        The summary, and the seconds of all cases divided by the number of processes.
    """
    unfinished = folder / ".predictions"
    scores = Scores(folder / "evaluation", weights, unfinished if save_predictions else None)
    _score_all(config, task, network, volumes[processes.rank :: processes.size], scores, processes.main)
    processes.wait()

    def collect() -> tuple[dict[str, Any], float]:
        """Put the scores of all cases together: table, figure, predictions and summary."""
        results = [scores.read(volume.case.id) for volume in volumes]
        scored = [result for result in results if result is not None]
        if len(scored) < len(volumes):
            raise RuntimeError(f"{len(volumes) - len(scored)} cases were not scored")
        rows = [row for result in scored for row in result.rows]
        write_atomic(folder / "cases.csv", cases_table(rows))
        panels = [result.panel for result in scored]
        pictures.segmentation(task, panels, folder / "figures" / "segmentation.png", title)
        if save_predictions:
            # Renamed when complete, so that the folder holds all predictions if it exists.
            shutil.rmtree(folder / "predictions", ignore_errors=True)
            unfinished.replace(folder / "predictions")
        return summarise(task, rows), sum(result.seconds for result in scored) / processes.size

    return processes.decide(collect)


def cases_table(rows: Rows) -> str:
    """The text of `cases.csv`."""
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


@torch.inference_mode()
def _score_all(
    config: RunConfig, task: Task, network: nn.Module, volumes: Sequence[Volume], scores: Scores, show_bar: bool
) -> None:
    """Score those of `volumes` that are not scored yet.

    While one case is predicted, a thread reads the next one and another thread scores the one before. So never more than
    three cases are in memory.
    """
    remaining = [volume for volume in volumes if scores.read(volume.case.id) is None]
    if not remaining:
        return
    scoring = new_scoring(config.evaluate)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        next_image = reader.submit(lambda: remaining[0].image)
        scoring_job = None
        began = time.perf_counter()
        done = len(volumes) - len(remaining)
        bar = progress(remaining, "evaluate", total=len(volumes), visible=show_bar, initial=done)
        for number, volume in enumerate(bar, start=1):
            image = next_image.result()
            if number < len(remaining):
                next_image = reader.submit(lambda volume: volume.image, remaining[number])
            probabilities = predict(task, network, image, config.finetune, config.evaluate)
            if scoring_job is not None:
                scoring_job.result()
            now = time.perf_counter()
            scoring_job = scorer.submit(_score, task, scoring, volume, probabilities, scores, now - began)
            began = now
        if scoring_job is not None:
            scoring_job.result()


def _score(
    task: Task,
    scoring: metrics.Scoring,
    volume: Volume,
    probabilities: NDArray[np.float32],
    scores: Scores,
    seconds: float,
) -> None:
    """Turn the probabilities of one case into masks, score them, and write the scores and the prediction."""
    predicted = volume.geometry.decide(task, probabilities)
    reference, spacing = read_reference(task, volume.case)
    check_unchanged(volume)
    target_scores = metrics.score(predicted, reference, spacing, scoring)
    rows = [
        {"case": volume.case.id, "target": t, **asdict(s)} for t, s in zip(task.targets, target_scores, strict=True)
    ]
    if scores.predictions is not None:
        composed = task.compose(predicted, volume.case.numbering)
        write_label(scores.prediction(volume.case.id), composed, np.asarray(volume.geometry.affine))
    panel = make_panel(task, volume, probabilities, [score.dice for score in target_scores])
    scores.write(volume.case.id, Scored(rows, panel, seconds))


def read_reference(task: Task, case: Case) -> tuple[NDArray[np.bool_], list[float]]:
    """The reference masks (targets, x, y, z) on the native grid, and the spacing of that grid in mm."""
    label, affine, _ = load_label(task, case)
    return task.masks(label), [float(edge) for edge in np.linalg.norm(affine[:3, :3], axis=0)]


def new_scoring(settings: Evaluate) -> metrics.Scoring:
    """The definitions and the policy of the scores, from the settings."""
    return metrics.Scoring(hd95=settings.hd95, empty=settings.empty, tolerance=settings.tolerance)


def summarise(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the scored cases per target, and the average over targets; None where there is no value to average."""
    summary: dict[str, Any] = {}
    for target in task.targets:
        target_rows = [row for row in rows if row["target"] == target]
        values = {name: [row[key] for row in target_rows if row[key] is not None] for name, key in AVERAGED.items()}
        status = [row["status"] for row in target_rows]
        summary[target] = {
            **{name: float(np.mean(numbers)) if numbers else None for name, numbers in values.items()},
            "n_cases": len(values["dice"]),
            "n_missed": status.count("missed"),
            "n_spurious": status.count("spurious"),
            "n_empty": status.count("empty"),
        }
    average = {}
    for name in AVERAGED:
        means = [values[name] for values in summary.values() if values[name] is not None]
        average[name] = float(np.mean(means)) if means else None
    return {**summary, "average": average}


def make_panel(task: Task, volume: Volume, probabilities: NDArray[np.float32], scores: Sequence[float | None]) -> Panel:
    """A panel of the axial slice where the reference is largest.

    Args:
        probabilities: (outputs, x, y, z) on the preprocessed grid.
        scores: Dice per target.
    """
    reference = task.masks(volume.label)
    slice_index = int(reference.any(axis=0).sum(axis=(0, 1)).argmax())
    scored = [value for value in scores if value is not None]
    x, y, _ = volume.geometry.spacing
    return Panel(
        case=volume.case.id,
        dice=float(np.mean(scored)) if scored else 0.0,
        image=volume.crop((0, 0, slice_index), (*volume.shape[:2], 1))[0, :, :, 0],
        reference=target_numbers(reference[..., slice_index]),
        prediction=target_numbers(task.decide(probabilities[..., slice_index : slice_index + 1])[..., 0]),
        aspect=y / x,
    )
