"""Scores a few validation cases while fine-tuning runs, so that a record shows how fast a network learns."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from harness.api.task import Task
from harness.config.schema import RunConfig
from harness.data.volumes import Volume
from harness.evaluation.sliding_window import predict
from harness.system.files import read_json, write_atomic

POINTS = 6
"""Number of steps at which the cases are scored, the last one included."""


@dataclass(frozen=True)
class Validation:
    """A callback of fine-tuning. Its results do not depend on interruptions, and the training does not depend on it.

    Attributes:
        volumes: validation cases; none of them is trained on with its label, or tested.
        steps: number of fine-tuning steps.
        file: where the points are kept.
    """

    config: RunConfig
    task: Task
    volumes: Sequence[Volume]
    steps: int
    file: Path

    @property
    def schedule(self) -> list[int]:
        """The steps at which the cases are scored: the last one, half of it, a quarter, ..., in ascending order."""
        return sorted({max(1, self.steps >> halvings) for halvings in range(POINTS)}) if self.volumes else []

    def __call__(self, module: nn.Module, step: int) -> None:
        """Score the cases if `step` is one of the schedule, and write the point.

        Args:
            module: what fine-tuning trains; its part `network` segments.
        """
        if step not in self.schedule:
            return
        began = time.perf_counter()
        modes = [(part, part.training) for part in module.modules()]
        dice = mean_dice(module.get_submodule("network"), self.config, self.task, self.volumes)
        for part, mode in modes:
            part.training = mode
        points = self._points() | {str(step): {"dice": round(dice, 6), "seconds": time.perf_counter() - began}}
        write_atomic(self.file, json.dumps(points))

    @property
    def is_complete(self) -> bool:
        """Whether the point after the last step is written, if there is any case to score."""
        return not self.volumes or str(self.steps) in self._points()

    def record(self) -> dict[str, Any]:
        """What the record says: the cases, the points (step, mean Dice), and the seconds that all of them took."""
        points = [(step, self._points()[str(step)]) for step in self.schedule if str(step) in self._points()]
        return {
            "cases": [volume.case.id for volume in self.volumes],
            "curve": [[step, point["dice"]] for step, point in points],
            "seconds": round(sum(point["seconds"] for _, point in points), 3),
        }

    def _points(self) -> dict[str, Any]:
        """The points that are written: step -> Dice and seconds."""
        points = read_json(self.file)
        return points if isinstance(points, dict) else {}


def mean_dice(network: nn.Module, config: RunConfig, task: Task, volumes: Sequence[Volume]) -> float:
    """Mean Dice over cases and targets on the grid of preprocessing. A target that neither side has is left out."""
    values = []
    for volume in volumes:
        probabilities = predict(task, network, volume.image, config.finetune, config.evaluate)
        predicted, reference = task.decide(probabilities), task.masks(volume.label)
        for ours, theirs in zip(predicted, reference, strict=True):
            size = int(ours.sum()) + int(theirs.sum())
            if size:
                values.append(2 * int((ours & theirs).sum()) / size)
    return float(np.mean(values)) if values else 0.0
