"""A method on a backbone under the engine's own trainer, on any device, with the same data and the same draws."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import default_collate

from harness.api import global_batch
from harness.api.method import Batch
from harness.api.registry import Registry
from harness.api.settings import build
from harness.compute.processes import SingleProcess
from harness.config.schema import Training
from harness.conformance.fixture import BUDGET, BuiltMethod, MethodFixture
from harness.system.errors import UserError
from harness.training.trainer import FINITE, Trainer

REGISTRY = Registry()
METHODS = [name for name in REGISTRY.names("method") if REGISTRY.load("method", name).trains]
BACKBONES = list(REGISTRY.names("backbone"))
CPU = torch.device("cpu")


@dataclass
class Fitted:
    """A method ready to step, and what it draws its samples from."""

    built: BuiltMethod
    trainer: Trainer

    def batch(self, number: int) -> Batch:
        """The batch of step `number`, from 1, on the host, as the loader gives it."""
        size = self.built.batch
        data = self.built.data(number * size)
        batch: Batch = default_collate([data[(number - 1) * size + row] for row in range(size)])
        pinned = self.trainer.device.type == "cuda"
        return {name: value.pin_memory() if pinned else value for name, value in batch.items()}

    def step(self, number: int, batch: Batch | None = None) -> dict[str, torch.Tensor]:
        """Step `number`, from 1; terms on the device."""
        given = self.batch(number) if batch is None else batch
        self.trainer.clock.start()
        return self.trainer.step(number, [given], self.built.method.after_step)

    def losses(self, steps: Sequence[int]) -> list[float]:
        """The sum of the terms of each step."""
        found = [{**self.step(number)} for number in steps]
        assert all(bool(terms.pop(FINITE)) for terms in found), "a loss or its gradient is not finite"
        return [sum(float(term) for term in terms.values()) for terms in found]


def fit(name: str, backbone: str, folder: Path, device: torch.device, steps: int = 30, **settings: Any) -> Fitted:
    """The method on the backbone, small, as the conformance checks build it. Raises UserError where they do not fit."""
    method = REGISTRY.load("method", name)
    fixture = MethodFixture(method, REGISTRY.load("backbone", backbone), folder)
    lacking = method.needs - fixture.backbone.abilities
    if lacking:
        raise UserError(f"{backbone} lacks {', '.join(sorted(lacking))}")
    built = fixture.new()
    built.method.generator = torch.Generator(device)
    budget = {**BUDGET, "precision": "fp32", "crop": built.crop, "batch_size": built.batch, **settings}
    trainer = Trainer(built.method, build(Training, budget, "pretrain"), steps, 3, SingleProcess(device))
    return Fitted(built, trainer)


@contextmanager
def same_draws() -> Iterator[None]:
    """Masks, dropout and all else that is drawn through the harness: on the CPU, then moved, wherever it is used."""
    generator = torch.Generator().manual_seed(0)
    kept = global_batch._draw

    def draw(how: Any, shape: Any, device: torch.device, given: Any) -> torch.Tensor:
        drawn: torch.Tensor = how(*shape, generator=generator)
        return drawn.to(device)

    global_batch._draw = draw
    try:
        yield
    finally:
        global_batch._draw = kept


@contextmanager
def whole_fp32() -> Iterator[None]:
    """Convolutions in fp32 proper; by itself cuDNN takes TF32, which has 10 bits of mantissa."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before
