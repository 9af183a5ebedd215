"""Probes features while pre-training runs: a dense linear probe on validation cases, and the effective rank."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from harness.api.backbone import Backbone
from harness.api.losses import segmentation_loss
from harness.api.method import Method
from harness.api.task import Task
from harness.config.schema import RunConfig
from harness.data.crops import CropDataset
from harness.data.volumes import Volume
from harness.evaluation.validation import mean_dice
from harness.system.console import say
from harness.system.files import read_json, write_atomic
from harness.training.effective_rank import effective_ranks
from harness.training.models import Plugins, seed_for
from harness.training.protocols import LinearProbe
from harness.training.transfer import transfer

CROPS = 16
"""Number of labelled crops to which the linear probe is fitted."""

ITERATIONS = 40
"""Iterations of L-BFGS in which it is fitted."""

PENALTY = 1e-3
"""Factor on the sum of the squared weights, of features of unit variance: few labelled cases would else be learnt by heart."""

COLLAPSED_RANK, COLLAPSED_SHARE = 2, 0.1
"""The deepest features have collapsed below this effective rank, or below this share of the one before training."""


@dataclass(frozen=True)
class Probe:
    """A callback of pre-training. The training does not depend on it, nor its results on interruptions.

    At step 0, every `pretrain.probe_every` steps and at the last step, the weights that fine-tuning would start from are
    loaded into a new encoder. One linear layer on its frozen features is fitted to labelled training crops, as the protocol
    `linear` trains it, and is scored on the validation cases.

    Attributes:
        labelled: training cases whose labels are used.
        validation: cases that the probe is scored on.
        steps: number of pre-training steps.
        file: where the points are kept.
    """

    config: RunConfig
    plugins: Plugins
    task: Task
    labelled: Sequence[Volume]
    validation: Sequence[Volume]
    steps: int
    file: Path

    def __call__(self, method: nn.Module, step: int) -> None:
        """Measure the features if `step` is due and not measured yet, say the result, and write it."""
        assert isinstance(method, Method)
        every, points = self.config.pretrain.probe_every, self._points()
        if (step % every and step != self.steps) or str(step) in points:
            return
        began = time.perf_counter()
        dice, rank = self.measure(method.weights(), next(method.parameters()).device)
        points[str(step)] = {"dice": round(dice, 6), "rank": round(rank, 3), "seconds": time.perf_counter() - began}
        write_atomic(self.file, json.dumps(points))
        say(f"probe at step {step}: {self._sentence(points, step)}")

    def measure(self, weights: dict[str, Tensor], device: torch.device) -> tuple[float, float]:
        """Mean Dice of a linear probe on the validation cases, and the effective rank of the deepest features."""
        # The next training step seeds its own draws (`Trainer.seed_step`), so it does not notice.
        torch.manual_seed(seed_for(self.config.seed, "probe"))
        backbone = self.plugins.new_backbone(self.config, len(self.task.channels)).to(device)
        transfer(backbone, weights, False)
        crops = self._crops(self.labelled, self.config.finetune.foreground)
        probe = fit_probe(
            backbone.eval(), [(image.to(device), target.to(device)) for image, target in crops], self.task
        )
        images = [image[0] for image, _ in self._crops(self.validation, 0.0)]
        dice = mean_dice(probe, self.config, self.task, self.validation)
        return dice, effective_ranks(backbone, images)[-1]

    def record(self) -> dict[str, Any]:
        """What the record says: the points (step, Dice, effective rank), and the first step at which features had collapsed."""
        points = {int(step): point for step, point in self._points().items()}
        ordered = sorted(points)
        collapsed = [step for step in ordered if has_collapsed(points[step]["rank"], points[ordered[0]]["rank"])]
        return {
            "points": [[step, points[step]["dice"], points[step]["rank"]] for step in ordered],
            "collapsed": collapsed[0] if collapsed else None,
            "seconds": round(sum(point["seconds"] for point in points.values()), 3),
        }

    def _crops(self, volumes: Sequence[Volume], foreground: float) -> list[tuple[Tensor, Tensor]]:
        """Crops of some cases, (1, C, x, y, z) each with its target; the same ones at every step."""
        crop, seed = self.config.finetune.crop, seed_for(self.config.seed, "probe crops")
        data = CropDataset(volumes, crop, CROPS, seed, task=self.task, foreground=foreground)
        samples = [data[index] for index in range(CROPS)]
        return [(torch.as_tensor(each["image"])[None], torch.as_tensor(each["target"])[None]) for each in samples]

    def _sentence(self, points: dict[str, Any], step: int) -> str:
        """A point in words, beside the one before training."""
        first, point = points[min(points, key=int)], points[str(step)]
        collapsed = has_collapsed(point["rank"], first["rank"])
        return (
            f"linear Dice {point['dice']:.4f} (before training {first['dice']:.4f}), effective rank {point['rank']:.1f} "
            f"({first['rank']:.1f})" + (": THE FEATURES HAVE COLLAPSED" if collapsed else "")
        )

    def _points(self) -> dict[str, Any]:
        """The points that are written: step -> Dice, rank and seconds."""
        points = read_json(self.file)
        return points if isinstance(points, dict) else {}


def has_collapsed(rank: float, before: float) -> bool:
    """Whether features of this effective rank have collapsed. Features that were as poor before training have not."""
    return rank < before / 2 and (rank < COLLAPSED_RANK or rank < COLLAPSED_SHARE * before)


def fit_probe(backbone: Backbone, crops: Sequence[tuple[Tensor, Tensor]], task: Task) -> LinearProbe:
    """A linear probe on the frozen features of a backbone, fitted with the loss of fine-tuning by L-BFGS.

    Args:
        crops: images (1, C, x, y, z) and targets (1, ..., x, y, z), as the loss takes them.
    """
    probe = LinearProbe(backbone, task.num_outputs).to(crops[0][0].device)
    with torch.no_grad():
        pyramids = [backbone.encode(image) for image, _ in crops]
    # Features of unit variance: L-BFGS would need many more iterations where channels differ in scale.
    levels = [torch.cat([level.flatten(2) for level in each], dim=2)[0].float() for each in zip(*pyramids, strict=True)]
    mean = torch.cat([level.mean(dim=1) for level in levels])
    scale = torch.cat([level.std(dim=1) for level in levels]).clamp_min(1e-6)
    weight = torch.zeros(task.num_outputs, len(mean), device=mean.device, requires_grad=True)
    bias = torch.zeros(task.num_outputs, device=mean.device, requires_grad=True)
    images, targets = (torch.cat(side) for side in zip(*crops, strict=True))
    features = [torch.cat(level).float() for level in zip(*pyramids, strict=True)]
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        """The loss on all crops, with gradients."""
        optimizer.zero_grad()
        scaled = weight / scale
        logits = probe.logits(features, scaled, bias - scaled @ mean, images.shape[2:])
        value: Tensor = sum(
            segmentation_loss(logits, targets, task.overlapping).values(), PENALTY * weight.square().sum()
        )
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        scaled = weight / scale
        probe.probe.weight.copy_(scaled.view_as(probe.probe.weight))
        assert probe.probe.bias is not None
        probe.probe.bias.copy_(bias - scaled @ mean)
    return probe
