"""Pre-training: the pretext task of a method, from prepared volumes to weights."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from harness.api.method import Method, Source
from harness.compute import memory
from harness.compute.devices import new_accelerator
from harness.config.request import Execution
from harness.config.schema import RunConfig
from harness.data import pictures
from harness.data.crops import CropDataset
from harness.data.volumes import Volume
from harness.system.console import say
from harness.system.files import digest_file, write_atomic
from harness.training.loop import StageContext, train
from harness.training.method_preparation import PreparationContext
from harness.training.models import Plugins, freeze, seed_for
from harness.training.stage_files import assert_unchanged, write_weights
from harness.training.trainer import StageReport

Discovery = tuple[Any, Path]
"""What a method's preparation depends on, and the folder that keeps what it found."""

PICTURE = "restoration.png"


def pretrain(
    config: RunConfig,
    plugins: Plugins,
    channels: int,
    volumes: Sequence[Volume],
    folder: Path,
    discovery: Discovery,
    carried: StageContext,
    title: str = "",
) -> None:
    """Run the pretext task and leave `weights.safetensors`, `history.jsonl` and, last, `stage.json` in `folder`.

    What was begun there goes on from its last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"pre-training into {folder}")
    team, accelerator = carried.team, new_accelerator(carried.how.micro_batches)
    method, sources, prepared = team.first(
        lambda: prepared_method(config, plugins, channels, volumes, discovery, accelerator.device, carried.how)
    )
    method.generator = torch.Generator(accelerator.device)
    settings = config.pretrain
    steps, warmup = settings.schedule(len(volumes))
    data = pretrain_data(config, plugins, sources, steps * settings.batch_size, seed_for(config.seed, "pretrain crops"))
    seed, history = seed_for(config.seed, "pretrain steps"), folder / "history.jsonl"
    trained = train(
        *(method, data, settings, steps, warmup, accelerator, history, "pretrain"),
        after_step=method.after_step,
        seed=seed,
        carried=carried,
    )
    team.decide(partial(_finish_pretraining, config, method, data, volumes, trained, prepared, folder, title, carried))


def _finish_pretraining(
    config: RunConfig,
    method: Method,
    data: CropDataset,
    volumes: Sequence[Volume],
    trained: StageReport,
    prepared: dict[str, Any],
    folder: Path,
    title: str,
    carried: StageContext,
) -> None:
    carried.check()
    device = next(method.parameters()).device
    assert_unchanged(volumes, folder)
    weights = folder / "weights.safetensors"
    write_weights(method.weights(), weights)
    stage = asdict(trained) | prepared | {"memory": memory.peak_memory(device), "weights": digest_file(weights)}
    _show(method, data, config, device, folder / PICTURE, title)
    write_atomic(folder / "stage.json", json.dumps(stage))


def pretrain_data(
    config: RunConfig, plugins: Plugins, sources: Sequence[Source], length: int, seed: int
) -> CropDataset:
    """Crops as the method sees them."""
    transform = plugins.method.transform(config.method_settings)
    return CropDataset(sources, config.pretrain.crop, length, seed, transform)


@torch.inference_mode()
def _show(method: Method, data: CropDataset, config: RunConfig, device: torch.device, path: Path, title: str) -> None:
    """A picture of what the method sees and restores, where it has something to show."""
    assert method.generator is not None
    method.generator.manual_seed(seed_for(config.seed, "pretrain picture"))
    samples = [data[place] for place in range(max(2, min(3, config.pretrain.batch_size)))]
    batch = {name: torch.stack([torch.as_tensor(each[name]) for each in samples]).to(device) for name in samples[0]}
    shown = method.eval().show(batch)
    if shown:
        images = {name: value.float().clamp(0, 1).cpu().numpy() for name, value in shown.items()}
        pictures.restoration(images, path, title)


def prepared_method(
    config: RunConfig,
    plugins: Plugins,
    channels: int,
    volumes: Sequence[Volume],
    discovery: Discovery,
    device: torch.device,
    how: Execution,
) -> tuple[Method, Sequence[Source], dict[str, Any]]:
    """The method with what it froze and prepared, what to sample from, and what preparing cost and found."""
    torch.manual_seed(seed_for(config.seed, "pretrain init"))
    method = plugins.method(config.method_settings, plugins.new_backbone(config, channels))
    freeze(method)
    identity, kept = discovery
    seed = seed_for(config.seed, "method prepare")
    workshop = PreparationContext(seed, device, config.pretrain.crop, config.pretrain, identity, kept, how=how)
    torch.manual_seed(seed)
    began = time.perf_counter()
    sources = method.prepare(volumes, workshop)
    seconds = time.perf_counter() - began + workshop.remembered
    return method, sources, {"prepare_seconds": seconds, "prepared": workshop.values}
