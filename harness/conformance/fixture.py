"""A method on a backbone with made-up volumes, small enough to be tried out: what the conformance checks work on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.data import DataLoader

from harness.api.backbone import Backbone
from harness.api.method import Batch, Method, Source, Transform
from harness.api.settings import build
from harness.config.schema import Training
from harness.data.arrays import cut, random_origin
from harness.data.crops import CropDataset
from harness.training.method_preparation import PreparationContext
from harness.training.models import freeze

STEPS = 30
BUDGET = {"steps": STEPS, "lr": 1e-3, "weight_decay": 1e-5, "warmup_steps": 3}
BATCH = 2
EDGE = 32  # crops are EDGE, 2 EDGE, EDGE, or whole strides where those are longer


class CheckError(Exception):
    """A check that a method does not pass; the message says what to mend."""


@dataclass(frozen=True)
class PhantomVolume:
    """A volume made of smooth noise and a few ellipsoids, in [0.001, 1] as prepared volumes are."""

    number: int
    channels: int
    shape: tuple[int, int, int]

    @cached_property
    def image(self) -> NDArray[np.float32]:
        """(C, x, y, z)."""
        rng = np.random.default_rng(self.number)
        noise = rng.standard_normal((self.channels, *self.shape))
        image = np.stack([ndimage.gaussian_filter(channel, 2.0) for channel in noise])
        places = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in self.shape), indexing="ij"))
        for _ in range(4):
            centre, radius = rng.uniform(-0.6, 0.6, (3, 1, 1, 1)), rng.uniform(0.2, 0.5, (3, 1, 1, 1))
            inside = (((places - centre) / radius) ** 2).sum(axis=0) < 1
            image += inside * rng.uniform(-0.4, 0.4, (self.channels, 1, 1, 1))
        low, high = image.min(), image.max()
        return (0.001 + 0.999 * (image - low) / (high - low)).astype(np.float32)

    def crop(self, origin: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        """(C, *size) from `origin`, zeros outside."""
        return cut(self.image, origin, size)

    def sample(self, size: tuple[int, int, int], rng: np.random.Generator) -> dict[str, Any]:
        """A random crop."""
        return {"image": self.crop(random_origin(self.shape, size, rng), size)}


@dataclass
class MethodFixture:
    """A method on a backbone, built anew for each check with settings small enough to be quick.

    Those are the presets named `check`, or else `demo`, that method and backbone state; `settings` goes on top.
    """

    method: type[Method]
    backbone: type[Backbone]
    folder: Path
    settings: Mapping[str, str] = field(default_factory=dict)

    @property
    def crop(self) -> tuple[int, int, int]:
        """Not cubic, two edges equal, whole strides of the backbone."""
        x, y, z = (-(-EDGE // step) * step for step in self.new_backbone(1).stride)
        return x, 2 * y, z

    def new(self, channels: int = 1, batch: int = BATCH, crop: Any = None, seed: int = 0) -> "BuiltMethod":
        """The method, checked, frozen and prepared as a run does it. Raises UserError where it refuses."""
        crop = crop or self.crop
        torch.manual_seed(seed)
        backbone = self.new_backbone(channels)
        with torch.random.fork_rng():
            example = self.method.example(backbone, self.folder)
        values = {**_preset(self.method, "method"), **example, **self.settings}
        method = self.method(build(self.method.Config, values, "method"), backbone)
        method.check(crop, batch)
        freeze(method)
        volumes = [PhantomVolume(number, channels, tuple(edge + 8 for edge in crop)) for number in range(4)]
        budget = build(Training, {**BUDGET, "crop": crop, "batch_size": batch}, "pretrain")
        workshop = PreparationContext(
            seed, torch.device("cpu"), crop, budget, [self.method.name, channels, crop], self.folder
        )
        sources = method.prepare(volumes, workshop) if method.trains else volumes
        built = BuiltMethod(method.train(), sources, self.method.transform(method.config), crop, batch, seed)
        built.reseed()
        return built

    def new_backbone(self, channels: int) -> Backbone:
        settings = build(self.backbone.Config, _preset(self.backbone, "backbone"), "backbone")
        return self.backbone(settings, channels)


@dataclass
class BuiltMethod:
    """A method ready to train, and what it draws its samples from."""

    method: Method
    sources: Sequence[Source]
    transform: Transform | None
    crop: tuple[int, int, int]
    batch: int
    seed: int

    def data(self, length: int) -> CropDataset:
        """`length` samples."""
        return CropDataset(self.sources, self.crop, length, self.seed, transform=self.transform)

    def batches(self, number: int, rank: int = 0, workers: int = 0) -> list[Batch]:
        """The first batches; another rank gets others."""
        data = self.data((rank + 1) * number * self.batch)
        data.seed += rank
        loader = DataLoader(data, self.batch, num_workers=workers, generator=torch.Generator())
        return [batch for batch, _ in zip(loader, range(number), strict=False)]

    def optimizer(self) -> torch.optim.Optimizer:
        """AdamW over what is trained."""
        trained = [parameter for parameter in self.method.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, lr=BUDGET["lr"], weight_decay=BUDGET["weight_decay"])

    def reseed(self) -> None:
        """Masks, dropout and whatever else the method draws, from the beginning."""
        torch.manual_seed(self.seed)
        self.method.generator = torch.Generator().manual_seed(self.seed)

    def train(
        self, batches: Sequence[Batch], module: nn.Module | None = None, optimizer: torch.optim.Optimizer | None = None
    ) -> list[float]:
        """One AdamW step per batch; the losses."""
        optimizer = optimizer or self.optimizer()
        losses = []
        for step, batch in enumerate(batches, start=1):
            loss = sum_of_terms((module or self.method)(batch))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.method.parameters(), 1.0)
            optimizer.step()
            self.method.after_step(step)
            losses.append(loss.item())
        return losses


def sum_of_terms(terms: Any) -> Tensor:
    """The sum of the terms. Raises CheckError where they are not named, finite scalars with a gradient."""
    if not isinstance(terms, dict) or not terms:
        raise CheckError(f"forward must return a dict of named loss terms, it returned {type(terms).__name__}")
    for name, term in terms.items():
        if not isinstance(term, Tensor) or term.ndim:
            raise CheckError(f"term {name!r} is not a scalar tensor: take a mean or a sum")
        if not torch.isfinite(term):
            raise CheckError(f"term {name!r} is {term.item()}: look for a division by 0 or a logarithm of 0")
    loss: Tensor = sum(terms.values(), torch.zeros(()))
    if not loss.requires_grad:
        raise CheckError("no term has a gradient: do not detach them")
    return loss


def _preset(plugin: Any, section: str) -> dict[str, Any]:
    chosen = plugin.presets.get("check", plugin.presets.get("demo", {}))
    return {key.partition(".")[2]: value for key, value in chosen.items() if key.partition(".")[0] == section}
