"""Trains a method's own pretext task on real hippocampi, for the slow tests which show that it is learned."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch.utils.data import DataLoader

from harness import Batch, Method, VolumeSource
from harness.compute.devices import new_accelerator
from harness.config.request import Request
from harness.config.schema import RunConfig
from harness.data.crops import CropDataset
from harness.data.volumes import preprocess_cases
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.training.loop import StageContext, StagePlan, train
from harness.training.method_preparation import PreparationContext
from harness.training.models import seed_for

TRAIN, HELD_OUT = 40, 16  # cases


@dataclass
class Learned:
    """A method after its pre-training, with crops of cases that it was not trained on.

    Attributes:
        before, after: mean of each weighted loss term on the held-out crops, with the initial and with the trained weights.
        curves: the terms of every training step, one row per step.
        crops: held-out samples, as the method's batches.
    """

    method: Method
    before: dict[str, float]
    after: dict[str, float]
    curves: pd.DataFrame
    crops: list[Batch]

    def last(self, term: str, steps: int = 50) -> float:
        """Mean of a term over the last training steps."""
        return float(self.curves[term].tail(steps).mean())


def learn(root: Path, folder: Path, name: str, backbone: str, steps: int, settings: Sequence[str] = ()) -> Learned:
    """Train method `name` on 40 real cases for `steps` steps, as `harness run --preset demo` does.

    Args:
        root: the folder of MSD Hippocampus.
        folder: for the cache and the history.
        settings: `field=value`, as for `--set`.
    """
    chosen = ("pretrain.warmup_steps=20", f"pretrain.steps={steps}", *settings)
    request = Request(
        method=name, backbone=backbone, task="msd_hippocampus", preset="demo", data=root, settings=chosen, runs=folder
    )
    run_plan = plan(request, *locate(request))
    config, cases = run_plan.config, [*run_plan.train[:TRAIN], *run_plan.test[:HELD_OUT]]
    volumes = preprocess_cases(run_plan.task, cases, run_plan.data.inventory.digests, folder / "cache")
    torch.manual_seed(seed_for(config.seed, "pretrain init"))
    method = run_plan.plugins.new_method(config, run_plan.pretrain_channels)
    accelerator = new_accelerator()
    method.to(accelerator.device)
    method.generator = torch.Generator(accelerator.device)
    preparation = PreparationContext(
        0, accelerator.device, config.pretrain.crop, config.pretrain, [name], folder / "prepared"
    )
    sources = preparation.prepare(method, volumes[:TRAIN])
    method.to(accelerator.device)
    transform = run_plan.plugins.method.transform(config.method_settings)
    data = CropDataset(sources, config.pretrain.crop, steps * config.pretrain.batch_size, 0, transform)
    held_out = CropDataset(held_out_sources(volumes[TRAIN:], sources), config.pretrain.crop, 64, 1, transform)
    crops = list(batches(held_out, config))
    before = terms_on(method, crops)
    history = folder / "history.jsonl"
    train(
        StagePlan("pretrain", config.pretrain, steps, 20),
        method,
        data,
        history,
        accelerator,
        StageContext(quiet=True),
        method.after_step,
    )
    curves = pd.DataFrame(list(pd.read_json(history, lines=True)["terms"]))
    return Learned(method, before, terms_on(method, crops), curves, crops)


def real_volumes(root: Path, folder: Path, number: int) -> Sequence[VolumeSource]:
    """Preprocessed volumes of the first `number` training cases of MSD Hippocampus; `folder` is for the cache."""
    request = Request(method="scratch", backbone="unet", task="msd_hippocampus", preset="demo", data=root, runs=folder)
    run_plan = plan(request, *locate(request))
    cases = run_plan.train[:number]
    return preprocess_cases(run_plan.task, cases, run_plan.data.inventory.digests, folder / "cache")


def held_out_sources(volumes: Sequence[Any], sources: Sequence[Any]) -> Sequence[Any]:
    """The held-out volumes, or if samples are crops of a method's own choice (TransVW's words), the same crops of them."""
    if type(sources[0]) is type(volumes[0]):
        return volumes
    crops = {tuple(value for name, value in vars(source).items() if name != "volume"): source for source in sources}
    return [replace(source, volume=volume) for source in crops.values() for volume in volumes]


def batches(data: CropDataset, config: RunConfig) -> Iterator[Batch]:
    """The batches of a data set, without shuffling."""
    yield from DataLoader(data, batch_size=config.pretrain.batch_size)


@torch.no_grad()
def terms_on(method: Method, crops: Sequence[Batch]) -> dict[str, float]:
    """Mean of every loss term over batches. The same masks and dropout are drawn in every call."""
    assert method.generator is not None
    method.generator.manual_seed(0)
    torch.manual_seed(0)
    method.train()
    rows = [{name: float(term) for name, term in method(batch).items()} for batch in crops]
    return {str(name): float(mean) for name, mean in pd.DataFrame(rows).mean().items()}


def row(method: str, backbone: str, steps: int, quantity: str, prior: float, before: float, after: float) -> str:
    """A row of a learning table: what an input-independent prediction reaches, and the method before and after training."""
    return f"| {method} | {backbone} | {steps} | {quantity} | {prior:.4g} | {before:.4g} | {after:.4g} |"
