"""The last stage of a run: every test case scored in its native grid, once, however many processes share the work."""

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
from harness.data.pictures import Panel, numbered
from harness.data.volumes import Volume
from harness.evaluation import metrics
from harness.evaluation.sliding_window import predict
from harness.system.console import progress
from harness.system.files import check_name, write_atomic

AVERAGED = {"dice": "dice", "hd95": "hd95_mm", "surface_dice": "surface_dice"}
"""What a summary averages, and the column of `cases.csv` that has it."""

Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Scored:
    """One case, scored: its rows of `cases.csv`, its panel, and the seconds that it took."""

    rows: Rows
    panel: pictures.Panel
    seconds: float


@dataclass(frozen=True)
class Scores:
    """Where scored cases are kept until all of them are, a file each, so that none is scored twice.

    Attributes:
        network: digest of the weights; scores of others do not count.
        predictions: where label maps go; None: nowhere.
    """

    folder: Path
    network: str
    predictions: Path | None

    def read(self, case: str) -> Scored | None:
        """What was found before; None where there is none, or not all of it."""
        try:
            with np.load(self._path(case), allow_pickle=False) as kept:
                described = json.loads(str(kept["described"]))
                if described["network"] != self.network or described["case"] != case:
                    return None
                arrays = {name: kept[name] for name in ("image", "reference", "prediction")}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        if self.predictions is not None and not self.prediction(case).exists():
            return None
        panel = pictures.Panel(case=case, dice=described["dice"], aspect=described["aspect"], **arrays)
        return Scored(described["rows"], panel, described["seconds"])

    def write(self, case: str, scored: Scored) -> None:
        """Keep what was found."""
        panel, buffer = scored.panel, io.BytesIO()
        described = {"case": case, "network": self.network, "rows": scored.rows, "seconds": scored.seconds}
        described |= {"dice": panel.dice, "aspect": panel.aspect}
        text = np.array(json.dumps(described))
        np.savez(buffer, described=text, image=panel.image, reference=panel.reference, prediction=panel.prediction)
        write_atomic(self._path(case), buffer.getbuffer())

    def prediction(self, case: str) -> Path:
        """The label map of a case."""
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
    """Score every test case in its native grid; leaves `cases.csv` and `figures/segmentation.png` in `folder`.

    With `save_predictions`, also `predictions/CASE.nii.gz`: label maps on the native grid, in the numbering of the data.
    Cases that were scored before an interruption are not scored again. Returns the summary and the seconds of all cases.

    Args:
        weights: digest of the network's weights.
    """
    unfinished = folder / ".predictions"
    scores = Scores(folder / "evaluation", weights, unfinished if save_predictions else None)
    _score_all(config, task, network, volumes[processes.rank :: processes.size], scores, processes.main)
    processes.wait()

    def collect() -> tuple[dict[str, Any], float]:
        found = [scores.read(volume.case.id) for volume in volumes]
        scored = [each for each in found if each is not None]
        if len(scored) < len(volumes):
            raise RuntimeError(f"{len(volumes) - len(scored)} cases were not scored")
        rows = [row for each in scored for row in each.rows]
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(folder / "cases.csv", table.getvalue())
        panels = [each.panel for each in scored]
        pictures.segmentation(task, panels, folder / "figures" / "segmentation.png", title)
        if save_predictions:
            # By rename: where the folder is, all predictions are in it.
            shutil.rmtree(folder / "predictions", ignore_errors=True)
            unfinished.replace(folder / "predictions")
        return summarise(task, rows), sum(each.seconds for each in scored) / processes.size

    return processes.decide(collect)


@torch.inference_mode()
def _score_all(
    config: RunConfig, task: Task, network: nn.Module, volumes: Sequence[Volume], scores: Scores, shown: bool
) -> None:
    """Those of `volumes` that are not scored yet.

    While one case is predicted, the one after it is read and the one before it is scored, never more: memory is that of
    three cases, however many there are.
    """
    left = [volume for volume in volumes if scores.read(volume.case.id) is None]
    if not left:
        return
    scoring = new_scoring(config.evaluate)
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        upcoming = reader.submit(lambda: left[0].image)
        before = None
        began = time.perf_counter()
        bar = progress(left, "evaluate", total=len(volumes), shown=shown, initial=len(volumes) - len(left))
        for number, volume in enumerate(bar, start=1):
            image = upcoming.result()
            if number < len(left):
                upcoming = reader.submit(lambda following: following.image, left[number])
            probabilities = predict(task, network, image, config.finetune, config.evaluate)
            if before is not None:
                before.result()
            now = time.perf_counter()
            before = scorer.submit(_score, task, scoring, volume, probabilities, scores, now - began)
            began = now
        if before is not None:
            before.result()


def _score(
    task: Task,
    scoring: metrics.Scoring,
    volume: Volume,
    probabilities: NDArray[np.float32],
    scores: Scores,
    seconds: float,
) -> None:
    """Decide, score and write one case."""
    predicted = volume.geometry.decide(task, probabilities)
    reference, spacing = read_reference(task, volume.case)
    by_target = metrics.score(predicted, reference, spacing, scoring)
    rows = [{"case": volume.case.id, "target": t, **asdict(s)} for t, s in zip(task.targets, by_target, strict=True)]
    if scores.predictions is not None:
        composed = task.compose(predicted, volume.case.numbering)
        write_label(scores.prediction(volume.case.id), composed, np.asarray(volume.geometry.affine))
    panel = make_panel(task, volume, probabilities, [each.dice for each in by_target])
    scores.write(volume.case.id, Scored(rows, panel, seconds))


def read_reference(task: Task, case: Case) -> tuple[NDArray[np.bool_], list[float]]:
    """The reference masks (targets, x, y, z) on the native grid, and the spacing of that grid in mm."""
    label, affine, _ = load_label(task, case)
    return task.masks(label), [float(edge) for edge in np.linalg.norm(affine[:3, :3], axis=0)]


def new_scoring(settings: Evaluate) -> metrics.Scoring:
    """What is scored, as the settings say."""
    return metrics.Scoring(hd95=settings.hd95, empty=settings.empty, tolerance=settings.tolerance)


def summarise(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per-target means over the scored cases, and the average over targets; None where nothing can be averaged."""
    summary: dict[str, Any] = {}
    for target in task.targets:
        mine = [row for row in rows if row["target"] == target]
        values = {name: [row[key] for row in mine if row[key] is not None] for name, key in AVERAGED.items()}
        status = [row["status"] for row in mine]
        summary[target] = {
            **{name: float(np.mean(found)) if found else None for name, found in values.items()},
            "n_cases": len(values["dice"]),
            "n_missed": status.count("missed"),
            "n_spurious": status.count("spurious"),
            "n_empty": status.count("empty"),
        }
    average = {}
    for name in AVERAGED:
        found = [values[name] for values in summary.values() if values[name] is not None]
        average[name] = float(np.mean(found)) if found else None
    return {**summary, "average": average}


def make_panel(task: Task, volume: Volume, probabilities: NDArray[np.float32], scores: Sequence[float | None]) -> Panel:
    """The slice with the largest reference; `probabilities` (outputs, x, y, z) on the prepared grid."""
    reference = task.masks(volume.label)
    middle = int(reference.any(axis=0).sum(axis=(0, 1)).argmax())
    scored = [value for value in scores if value is not None]
    x, y, _ = volume.geometry.spacing
    return Panel(
        case=volume.case.id,
        dice=float(np.mean(scored)) if scored else 0.0,
        image=volume.crop((0, 0, middle), (*volume.shape[:2], 1))[0, :, :, 0],
        reference=numbered(reference[..., middle]),
        prediction=numbered(task.decide(probabilities[..., middle : middle + 1])[..., 0]),
        aspect=y / x,
    )
