"""Fine-tuning: transfer into a fresh network, a new head, supervised training."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from harness.api.task import Task
from harness.compute import memory
from harness.compute.devices import new_accelerator
from harness.config.schema import Finetune, RunConfig
from harness.data.crops import CropDataset
from harness.data.volumes import Volume
from harness.system.files import digest_file, write_atomic
from harness.training import protocols
from harness.training.loop import StageContext, train
from harness.training.models import Plugins, seed_for
from harness.training.segmenter import Segmenter
from harness.training.stage_files import assert_unchanged, write_weights
from harness.training.transfer import transfer


class Augment:
    """Fine-tuning augmentation of section IV-C: flip, rotation by 90 degrees, intensity scaling and shift."""

    def __init__(self, settings: Finetune) -> None:
        self.settings = settings

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """`image` and `target` (C, x, y, z) -> the same, turned alike; intensities change in the image only."""
        image, target, settings = sample["image"], sample["target"], self.settings
        for axis in (1, 2, 3):
            if rng.random() < settings.flip:
                image, target = np.flip(image, axis), np.flip(target, axis)
        # Only planes whose sides are equal keep the crop's shape.
        planes = [(a, b) for a, b in combinations((1, 2, 3), 2) if image.shape[a] == image.shape[b]]
        if planes and rng.random() < settings.rotate:
            plane, turns = planes[rng.integers(len(planes))], int(rng.integers(1, 4))
            image, target = np.rot90(image, turns, plane), np.rot90(target, turns, plane)
        if rng.random() < settings.scale:
            image = image * np.float32(rng.uniform(0.9, 1.1))
        if rng.random() < settings.shift:
            image = image + np.float32(rng.uniform(-0.1, 0.1))
        return {"image": np.ascontiguousarray(image), "target": np.ascontiguousarray(target)}


def finetune_data(config: RunConfig, task: Task, volumes: Sequence[Volume], length: int, seed: int) -> CropDataset:
    """Labelled crops, augmented."""
    settings = config.finetune
    return CropDataset(volumes, settings.crop, length, seed, Augment(settings), task, settings.foreground)


def finetune(
    config: RunConfig,
    plugins: Plugins,
    task: Task,
    volumes: Sequence[Volume],
    weights: Mapping[str, Tensor],
    folder: Path,
    carried: StageContext,
    repeat_stem: bool = False,
    head: str = "",
) -> None:
    """Fresh backbone, transfer, new head, supervised training; leaves `weights.safetensors` and, last, `finetune.json`.

    The initial values and the crops depend on the seed only, so that `scratch` is a matched control. What the protocol
    fixes is the same afterwards, by its digest. What was begun in `folder` goes on from its last checkpoint; `head` is what
    the history begins with.
    """
    accelerator = new_accelerator(carried.how.micro_batches)
    torch.manual_seed(seed_for(config.seed, "finetune init"))
    backbone = plugins.new_backbone(config, len(task.channels))
    report = transfer(backbone, weights, repeat_stem)
    network = protocols.with_head(backbone, task.num_outputs, config.protocol)
    fixed = protocols.fixed(network, config.protocol)
    before = protocols.digest_modules(fixed)
    settings = config.finetune
    steps, warmup = settings.schedule(len(volumes))
    length, seed = steps * settings.batch_size, seed_for(config.seed, "finetune crops")
    data = finetune_data(config, task, volumes, length, seed)
    segmenter = Segmenter(network, task.overlapping, fixed)
    trained = train(
        *(segmenter, data, settings, steps, warmup, accelerator, folder / "history.jsonl", "finetune"),
        seed=seed_for(config.seed, "finetune steps"),
        carried=carried,
        head=head,
    )
    if protocols.digest_modules(fixed) != before:
        raise RuntimeError(f"protocol {config.protocol!r}: what is fixed was changed by training")
    frozen = {"digest": before, "tensors": sum(len(module.state_dict()) for module in fixed)} if fixed else None

    def finish() -> None:
        carried.check()
        assert_unchanged(volumes, folder)
        path = folder / "weights.safetensors"
        write_weights(network.state_dict(), path)
        transferred = report.as_record() | {"text": str(report), "frozen": frozen}
        found = {"memory": memory.peak_memory(accelerator.device), "weights": digest_file(path)}
        stage = {"trained": asdict(trained), "transfer": transferred, **found}
        write_atomic(folder / "finetune.json", json.dumps(stage))

    carried.team.decide(finish)
