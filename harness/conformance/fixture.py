"""A small method on a small backbone with made-up volumes, for the conformance checks."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from harness.api.backbone import Backbone
from harness.api.method import Batch, Method, Source, Transform
from harness.api.registry import Registry
from harness.api.returned import wrong_terms
from harness.api.settings import Triple, build
from harness.api.task import Task
from harness.compute.processes import SingleProcess
from harness.config.schema import Training
from harness.data.arrays import cut, random_origin
from harness.data.crops import CropDataset
from harness.training.loop import NonFiniteError, StageContext, StagePlan, TrainingLoop
from harness.training.method_preparation import PreparationContext
from harness.training.models import new_method
from harness.training.trainer import Trainer

CPU = torch.device("cpu")
STEPS = 30
BUDGET = {"steps": STEPS, "lr": 1e-3, "weight_decay": 1e-5, "warmup_steps": 3, "clip_norm": 1.0, "precision": "fp32"}
BATCH = 2  # crops
EDGE = 32  # voxels; crops are EDGE x 2 EDGE x EDGE, each edge rounded up to a multiple of the backbone's stride
NOT_FINITE = "look for a division by 0 or a logarithm of 0"


class CheckError(Exception):
    """A method does not pass a check; the message says what to mend."""


@dataclass(frozen=True)
class PhantomVolume:
    """A volume made of smooth noise and a few ellipsoids, in [0.001, 1] as preprocessed volumes are."""

    number: int
    channels: int
    shape: Triple

    @cached_property
    def image(self) -> NDArray[np.float32]:
        """The image, (C, x, y, z)."""
        rng = np.random.default_rng(self.number)
        noise = rng.standard_normal((self.channels, *self.shape))
        image = np.stack([ndimage.gaussian_filter(channel, 2.0) for channel in noise])
        grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in self.shape), indexing="ij"))
        for _ in range(4):
            centre, radius = rng.uniform(-0.6, 0.6, (3, 1, 1, 1)), rng.uniform(0.2, 0.5, (3, 1, 1, 1))
            inside = (((grid - centre) / radius) ** 2).sum(axis=0) < 1
            image += inside * rng.uniform(-0.4, 0.4, (self.channels, 1, 1, 1))
        low, high = image.min(), image.max()
        return (0.001 + 0.999 * (image - low) / (high - low)).astype(np.float32)

    @cached_property
    def label(self) -> NDArray[np.uint8]:
        """A label map (x, y, z) that follows from the image: 2 where it is bright, 1 where it is less so, 0 elsewhere."""
        return np.digitize(self.image[0], (0.6, 0.75)).astype(np.uint8)

    @cached_property
    def points(self) -> NDArray[np.int64]:
        """Labelled voxels as rows (number of the target, x, y, z)."""
        voxels = np.argwhere(self.label > 0)
        return np.column_stack([self.label[tuple(voxels.T)] - 1, voxels]).astype(np.int64)

    def crop(self, origin: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        """The crop of this size at `origin`, (C, *size), with zeros outside the volume."""
        return cut(self.image, origin, size)

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """A random crop."""
        return {"image": self.crop(random_origin(self.shape, size, rng), size)}


@dataclass
class MethodFixture:
    """A method on a backbone, built anew for each check with settings that make it quick.

    These settings are the presets `check`, or else `demo`, of method and backbone; `settings` overrides them.
    """

    method: type[Method]
    backbone: type[Backbone]
    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def crop(self) -> Triple:
        """Extent of a crop in voxels: multiples of the backbone's stride; not cubic, but with two equal edges."""
        x, y, z = (-(-EDGE // step) * step for step in self.new_backbone(1).stride)
        return x, 2 * y, z

    def new(self, channels: int = 1, batch: int = BATCH, crop: Triple | None = None, seed: int = 0) -> "BuiltMethod":
        """Build, check and prepare the method as a run does, with its frozen parts. Raises UserError where it refuses."""
        crop = crop or self.crop
        torch.manual_seed(seed)
        backbone = self.new_backbone(channels)
        with torch.random.fork_rng():
            example = self.method.example(backbone, self.folder)
        values = {**_preset(self.method, "method"), **example, **self.settings}
        method = new_method(self.method, build(self.method.Config, values, "method"), backbone)
        method.check(crop, batch)
        x, y, z = crop
        shape = (x + 8, y + 8, z + 8)
        volumes = [PhantomVolume(number, channels, shape) for number in range(4)]
        budget = build(Training, {**BUDGET, "crop": crop, "batch_size": batch}, "pretrain")
        preparation = PreparationContext(seed, CPU, crop, budget, [self.method.name, channels, crop], self.folder)
        preparation.task = Registry().task("msd_hippocampus") if method.uses_labels else None
        sources = preparation.prepare(method, volumes) if method.trains else volumes
        transform = self.method.transform(method.config)
        built = BuiltMethod(method.train(), sources, transform, budget, seed, preparation.task)
        built.reseed()
        return built

    def new_backbone(self, channels: int) -> Backbone:
        """The backbone alone, with random weights."""
        settings = build(self.backbone.Config, _preset(self.backbone, "backbone"), "backbone")
        return self.backbone(settings, channels)


@dataclass
class BuiltMethod:
    """A method that is ready to train, and the sources of its samples."""

    method: Method
    sources: Sequence[Source]
    transform: Transform | None
    budget: Training
    seed: int
    task: Task | None = None  # of the labels, for a method that uses them

    @property
    def crop(self) -> Triple:
        """Extent of a crop in voxels."""
        return self.budget.crop

    @property
    def batch(self) -> int:
        """Crops per step."""
        return self.budget.batch_size

    def data(self, length: int) -> CropDataset:
        """A data set of `length` samples."""
        return CropDataset(self.sources, self.crop, length, self.seed, self.transform, self.task)

    def batches(self, number: int, rank: int = 0, workers: int = 0) -> list[Batch]:
        """The first `number` batches of a rank; each rank has its own samples."""
        data = self.data((rank + 1) * number * self.batch)
        data.seed += rank
        loader = DataLoader(data, self.batch, num_workers=workers, generator=torch.Generator())
        return [batch for batch, _ in zip(loader, range(number), strict=False)]

    def reseed(self) -> None:
        """Start all random draws of the method (masks, dropout, ...) from the beginning."""
        torch.manual_seed(self.seed)
        self.method.generator = torch.Generator().manual_seed(self.seed)

    def train(self, steps: int, cycle: int | None = None) -> list[float]:
        """Train with the training loop of runs. Returns the loss of each step.

        Args:
            cycle: number of steps after which the same crops, masks and dropout are repeated.
        """
        cycle = cycle or steps
        settings = self.budget.model_copy(update={"steps": steps})
        trainer = _CyclicTrainer(self.method, settings, steps, min(3, steps - 1), SingleProcess(CPU), self.seed)
        trainer.cycle = cycle
        plan = StagePlan("check", settings, steps, warmup=0)
        data = _Cyclic(self.data(cycle * self.batch), steps * self.batch)
        with tempfile.TemporaryDirectory() as folder:
            history = Path(folder) / "history.jsonl"
            try:
                TrainingLoop(plan, trainer, data, history, StageContext(quiet=True)).run(self.method.after_step)
            except NonFiniteError as error:
                raise CheckError(f"{error.problem}: {NOT_FINITE}") from error
            return [float(json.loads(line)["loss"]) for line in history.read_text().splitlines()]


class _CyclicTrainer(Trainer):
    """The trainer of a run, with masks and dropout that repeat after `cycle` steps."""

    cycle = 1

    def seed_step(self, number: int) -> None:
        """Seed the step as the one `cycle` steps before it."""
        super().seed_step((number - 1) % self.cycle + 1)


class _Cyclic(Dataset[dict[str, Any]]):
    """`length` samples, which repeat those of `data`."""

    def __init__(self, data: CropDataset, length: int) -> None:
        self.data, self.length = data, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.data[index % len(self.data)]


def sum_of_terms(terms: Any) -> Tensor:
    """The sum of the loss terms. Raises CheckError where they are not named, finite scalars with a gradient."""
    if wrong := wrong_terms(terms):
        raise CheckError(wrong)
    for name, term in terms.items():
        if not torch.isfinite(term):
            raise CheckError(f"term {name!r} is {term.item()}: {NOT_FINITE}")
    loss: Tensor = sum(terms.values(), torch.zeros(()))
    if not loss.requires_grad:
        raise CheckError("no term has a gradient: do not detach them")
    return loss


def _preset(plugin: Any, section: str) -> dict[str, Any]:
    """The settings of a plugin's preset `check`, or else `demo`, without the prefix `section.`."""
    preset = plugin.presets.get("check", plugin.presets.get("demo", {}))
    return {key.partition(".")[2]: value for key, value in preset.items() if key.partition(".")[0] == section}
