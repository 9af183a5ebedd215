"""Pre-training: trains the pretext task of a method on preprocessed volumes, and writes the weights."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.api.method import Method, Source
from harness.api.returned import wrong_images
from harness.api.task import Task
from harness.compute.devices import new_accelerator
from harness.compute.memory import is_out_of_memory, peak_memory
from harness.config.request import Execution
from harness.config.schema import RunConfig
from harness.data import pictures
from harness.data.crops import CropDataset
from harness.data.volumes import Volume
from harness.system.console import say
from harness.system.files import digest_file, write_atomic
from harness.training.finetune import labelled_crops
from harness.training.loop import StageContext, StagePlan, train
from harness.training.method_preparation import PreparationContext
from harness.training.models import Plugins, seed_for
from harness.training.stage_files import assert_unchanged, write_weights
from harness.training.trainer import StageReport

PreparationCache = tuple[Any, Path]
"""The identity that keys every cached value of `Method.prepare`, and the folder of the cache."""

PICTURE = "restoration.png"
"""File beside the weights that shows what the method sees and restores."""


def pretrain(
    config: RunConfig,
    plugins: Plugins,
    task: Task,
    channels: int,
    volumes: Sequence[Volume],
    folder: Path,
    cache: PreparationCache,
    context: StageContext,
    title: str = "",
) -> None:
    """Train the pretext task; write `weights.safetensors`, `history.jsonl` and, last, `stage.json` in `folder`.

    An interrupted pre-training in `folder` goes on from its last checkpoint.

    Args:
        task: of the labels, for a method that uses them.
        channels: of the images.
        title: of the picture.

    Raises:
        UserError, Interrupted: as `harness.training.loop.train`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"pre-training into {folder}")
    processes, accelerator = context.processes, new_accelerator(context.execution.micro_batches)
    method, sources, preparation = processes.first(
        lambda: _prepare(config, plugins, task, channels, volumes, cache, accelerator.device, context.execution)
    )
    method.generator = torch.Generator(accelerator.device)
    settings = config.pretrain
    steps, warmup = settings.schedule(len(volumes))
    plan = StagePlan("pretrain", settings, steps, warmup, seed_for(config.seed, "pretrain steps"))
    length, seed = steps * settings.batch_size, seed_for(config.seed, "pretrain crops")
    data = pretrain_data(config, plugins, task, sources, length, seed)
    if context.watch is not None:
        processes.decide(partial(context.watch, method, 0))
    report = train(plan, method, data, folder / "history.jsonl", accelerator, context, method.after_step)
    processes.decide(partial(_finish, config, method, data, volumes, report, preparation, folder, title, context))


def pretrain_data(
    config: RunConfig, plugins: Plugins, task: Task, sources: Sequence[Any], length: int, seed: int
) -> CropDataset:
    """`length` random crops, changed by the method's `transform`; with labels, those that fine-tuning would draw."""
    if plugins.method.uses_labels:
        return labelled_crops(config.finetune, config.pretrain, task, sources, length, seed)
    transform = plugins.method.transform(config.method_settings)
    return CropDataset(sources, config.pretrain.crop, length, seed, transform)


def _prepare(
    config: RunConfig,
    plugins: Plugins,
    task: Task,
    channels: int,
    volumes: Sequence[Volume],
    cache: PreparationCache,
    device: torch.device,
    execution: Execution,
) -> tuple[Method, Sequence[Source], PreparationContext]:
    """Build the method and call its `prepare`. Returns the method, the sources of its samples, and cost and report."""
    torch.manual_seed(seed_for(config.seed, "pretrain init"))
    method = plugins.new_method(config, channels)
    identity, folder = cache
    seed = seed_for(config.seed, "method prepare")
    preparation = PreparationContext(
        seed, device, config.pretrain.crop, config.pretrain, identity, folder, execution=execution
    )
    preparation.task = task if plugins.method.uses_labels else None
    torch.manual_seed(seed)
    return method, preparation.prepare(method, volumes), preparation


def _finish(
    config: RunConfig,
    method: Method,
    data: CropDataset,
    volumes: Sequence[Volume],
    report: StageReport,
    preparation: PreparationContext,
    folder: Path,
    title: str,
    context: StageContext,
) -> None:
    """Write the weights, the picture and, last, the report of the stage."""
    context.check()
    device = next(method.parameters()).device
    assert_unchanged(volumes, folder)
    weights = folder / "weights.safetensors"
    write_weights(method.weights(), weights, context.lineage)
    stage = {
        **asdict(report),
        "prepare_seconds": preparation.seconds,
        "prepared": preparation.values,
        "memory": peak_memory(device),
        "weights": digest_file(weights),
    }
    _draw_restoration(method, data, config, device, folder / PICTURE, title)
    write_atomic(folder / "stage.json", json.dumps(stage))


@torch.inference_mode()
def _draw_restoration(
    method: Method, data: CropDataset, config: RunConfig, device: torch.device, path: Path, title: str
) -> None:
    """Draw what the method sees and restores, if `Method.show` returns images."""
    assert method.generator is not None
    method.generator.manual_seed(seed_for(config.seed, "pretrain picture"))
    samples = [data[index] for index in range(max(2, min(3, config.pretrain.batch_size)))]
    batch = {name: torch.stack([torch.as_tensor(sample[name]) for sample in samples]).to(device) for name in samples[0]}
    try:
        images = method.eval().show(batch)
    # A plugin is foreign code, and a picture must not cost a training.
    except Exception as error:
        # Whole crops in fp32 may need more memory than the training steps, which may have used micro-batches or bf16.
        lacks_memory = isinstance(error, RuntimeError) and is_out_of_memory(error)
        why = f"its crops do not fit the memory of {device}" if lacks_memory else f"{type(error).__name__}: {error}"
        say(f"no {path.name}: {' '.join(why.split())[:300]}; the training does not depend on it")
        return
    if wrong := wrong_images(images):
        say(f"no {path.name}: {wrong}; the training does not depend on it")
    elif images:
        if config.prepared.get("normalisation") == "ZScore":
            images = {name: (value + 3) / 6 for name, value in images.items()}  # three deviations to both sides
        arrays = {name: value.float().clamp(0, 1).cpu().numpy() for name, value in images.items()}
        pictures.restoration(arrays, path, title)
