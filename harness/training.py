"""The training loop, for pre-training and fine-tuning alike: any module that returns named loss terms."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from harness.config import Training
from harness.contracts import Backbone
from harness.errors import UserError
from harness.hardware import keep_memory, precision
from harness.layers import place
from harness.progress import progress

PHASES = ("data", "transfer", "forward", "backward", "optimizer")
UPDATE = PHASES[2:]
"""What a step is in the papers: forward, backward and update; no reading, preprocessing or copying."""

READ_EVERY = 10  # steps between reads of the loss: each one waits for the device
WARMUP_STEPS = 5  # left out of the step times: allocators, caches and autotuning


class StepClock:
    """Time per phase of each step: host clock on a CPU; on a GPU events, which are read without stopping the step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[list[Any]] = []
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def start(self) -> None:
        """Begin a step."""
        self.marks.append([self._mark()])

    def lap(self) -> None:
        """End a phase; they come in the order of `PHASES`."""
        self.marks[-1].append(self._mark())

    def read(self) -> None:
        """Turn marks into seconds; on a GPU this waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        for marks in self.marks:
            for phase, a, b in zip(PHASES, marks, marks[1:], strict=False):
                self.seconds[phase].append(a.elapsed_time(b) / 1000 if self.cuda else b - a)
        self.marks.clear()

    def summary(self, skip: int = WARMUP_STEPS) -> dict[str, Any]:
        """p50 and p95 in ms per phase and of the step (`UPDATE`), the first `skip` steps left out if there are more."""
        kept = {phase: np.asarray(values[skip:] or values) * 1000 for phase, values in self.seconds.items()}
        step = sum(kept[phase] for phase in UPDATE)
        return {
            name: {"p50_ms": round(float(np.percentile(v, 50)), 3), "p95_ms": round(float(np.percentile(v, 95)), 3)}
            for name, v in {"step": step, **kept}.items()
        }

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@dataclass
class Trained:
    """What a finished training stage reports."""

    seconds: float
    steps: int
    clock: dict[str, Any]
    used: dict[str, Any] = field(default_factory=dict)


class Trainer:
    """A module under AdamW and a cosine schedule, prepared by Accelerate; `step` is what every stage and profile runs."""

    def __init__(
        self, module: nn.Module, settings: Training, steps: int, warmup: int, accelerator: Accelerator
    ) -> None:
        self.settings, self.accelerator, self.device = settings, accelerator, accelerator.device
        self.precision, self.memory_kept = precision(settings.precision, self.device), keep_memory()
        module = place(module, self.device, settings.channels_last)
        groups = param_groups_weight_decay(module, settings.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=self.device.type in ("cuda", "cpu"))
        # One more than there are steps: the cosine reaches 0 after the last one, not in it.
        self.schedule = CosineLRScheduler(
            optimizer, t_initial=steps + 1, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=False, t_in_epochs=False
        )
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.clock = StepClock(self.device)
        self.module.train()

    def loader(self, data: Dataset[Any]) -> Any:
        """Batches of `data` on the host, every process its own."""
        loader = DataLoader(
            data,
            self.settings.batch_size,
            num_workers=self.settings.workers,
            pin_memory=self.device.type == "cuda",
            drop_last=True,
            # The loader draws a seed for its workers: from its own generator, not from the one that dropout uses.
            generator=torch.Generator(),
        )
        return self.accelerator.prepare_data_loader(loader, device_placement=False)

    def step(
        self, number: int, batch: Mapping[str, Tensor], after_step: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """Step `number`, from 1, on a host batch -> its loss terms, on the device. Nothing here waits for the device."""
        moved = {name: self._move(value) for name, value in batch.items()}
        self.schedule.step_update(number)
        self.clock.lap()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            terms = self.module(moved)
        loss = sum(term.float() for term in terms.values())
        self.clock.lap()
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(loss)
        self.clock.lap()
        if self.settings.clip_norm:
            self.accelerator.clip_grad_norm_(self.trained, self.settings.clip_norm)
        self.optimizer.step()
        if after_step is not None:
            after_step(number)
        self.clock.lap()
        return {name: term.detach() for name, term in terms.items()}

    def used(self) -> dict[str, Any]:
        """What the stage was computed with, for the record."""
        return {
            "precision": self.precision,
            "channels_last": self.settings.channels_last,
            "compile": self.settings.compile,
            "optimizer": "fused AdamW" if self.optimizer.param_groups[0].get("fused") else "AdamW",
            "device": str(self.device),
            "memory_kept": self.memory_kept,
            "processes": self.accelerator.num_processes,
            "batch_size_global": self.settings.batch_size * self.accelerator.num_processes,
        }

    def _move(self, value: Tensor) -> Tensor:
        moved = value.to(self.device, non_blocking=True)
        last = self.settings.channels_last and value.ndim == 5
        return moved.to(memory_format=torch.channels_last_3d) if last else moved


def train(
    module: nn.Module,
    data: Dataset[Any],
    settings: Training,
    steps: int,
    warmup: int,
    accelerator: Accelerator,
    history: Path,
    stage: str,
    after_step: Callable[[int], None] | None = None,
) -> Trained:
    """Minimise the sum of the terms that `module(batch)` returns; one line per step goes to `history` (JSON lines).

    Raises:
        UserError: the loss is not finite.
    """
    trainer = Trainer(module, settings, steps, warmup, accelerator)
    loader, clock = trainer.loader(data), trainer.clock
    unread: list[Any] = []
    started = time.perf_counter()
    bar = progress(None, stage, total=steps, shown=accelerator.is_main_process)
    with compiled(module, settings.compile), bar, history.open("a") as lines:
        clock.start()
        for step, batch in enumerate(loader, start=1):
            clock.lap()
            terms = trainer.step(step, batch, after_step)
            unread.append((step, trainer.optimizer.param_groups[0]["lr"], terms))
            if step % READ_EVERY == 0 or step == steps:
                last = _read(unread, stage, lines)
                clock.read()
                bar.set_postfix_str(f"loss {last:.4f}", refresh=False)
            bar.update()
            clock.start()
    return Trained(time.perf_counter() - started, steps, clock.summary(), trainer.used())


@contextmanager
def compiled(module: nn.Module, wanted: bool) -> Iterator[None]:
    """Within it, trunks and decoders of the backbones in `module` are compiled (`torch.compile`), if that is wanted."""
    backbones = [each for each in module.modules() if isinstance(each, Backbone)] if wanted else []
    for backbone in backbones:
        for name in ("trunk", "decode"):
            setattr(backbone, name, torch.compile(getattr(backbone, name)))
    try:
        yield
    finally:
        for backbone in backbones:
            del backbone.trunk, backbone.decode


def new_accelerator() -> Accelerator:
    """One per stage. Every process takes its own batches, so that the global batch is batch_size * processes."""
    return Accelerator(
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=False), step_scheduler_with_optimizer=False
    )


def _read(unread: list[Any], stage: str, lines: Any) -> float:
    """Write the waiting steps to the history; this is where the host waits for the device."""
    total = 0.0
    for step, lr, terms in unread:
        values = {name: float(term) for name, term in terms.items()}
        total = sum(values.values())
        if not np.isfinite(total):
            raise UserError(
                f"{stage}: the loss is not finite at step {step} ({', '.join(f'{k} {v:g}' for k, v in values.items())}): "
                f"lower {stage}.lr, or set {stage}.precision=fp32"
            )
        lines.write(json.dumps({"stage": stage, "step": step, "loss": total, "lr": lr, "terms": values}) + "\n")
    lines.flush()
    unread.clear()
    return total
