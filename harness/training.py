"""The training loop, for pre-training and fine-tuning alike: any module that returns named loss terms."""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader, Dataset

from harness.config import Training
from harness.errors import UserError
from harness.hardware import precision
from harness.progress import progress

PHASES = ("data", "forward", "backward", "optimizer")
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

    def summary(self) -> dict[str, Any]:
        """p50 and p95 in ms per phase and of the step without the wait for data, warm-up steps left out."""
        kept = {phase: np.asarray(values[WARMUP_STEPS:] or values) * 1000 for phase, values in self.seconds.items()}
        step = kept["forward"] + kept["backward"] + kept["optimizer"]
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
    device, dtype = accelerator.device, precision(settings.precision, accelerator.device)
    layout = torch.channels_last_3d if settings.channels_last else torch.contiguous_format
    module, optimizer, schedule, loader = _set_up(
        module.to(device).to(memory_format=layout), data, settings, steps, warmup, accelerator
    )
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.train()
    autocast = torch.autocast(device.type, torch.bfloat16) if dtype == "bf16" else nullcontext()
    clock, unread, started = StepClock(device), [], time.perf_counter()
    bar = progress(None, stage, total=steps, shown=accelerator.is_main_process)
    with bar, history.open("a") as lines:
        clock.start()
        for step, batch in enumerate(loader, start=1):
            batch = {
                name: value.to(memory_format=layout) if value.ndim == 5 else value for name, value in batch.items()
            }
            schedule.step_update(step)
            clock.lap()
            with autocast:
                terms = module(batch)
            loss = sum(term.float() for term in terms.values())
            clock.lap()
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            clock.lap()
            if settings.clip_norm:
                accelerator.clip_grad_norm_(trained, settings.clip_norm)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            clock.lap()
            unread.append(
                (step, optimizer.param_groups[0]["lr"], {name: term.detach() for name, term in terms.items()})
            )
            if step % READ_EVERY == 0 or step == steps:
                last = _read(unread, stage, lines)
                clock.read()
                bar.set_postfix_str(f"loss {last:.4f}", refresh=False)
            bar.update()
            clock.start()
    used = {
        "precision": dtype,
        "channels_last": settings.channels_last,
        "device": str(device),
        "processes": accelerator.num_processes,
        "batch_size_global": settings.batch_size * accelerator.num_processes,
    }
    return Trained(time.perf_counter() - started, steps, clock.summary(), used)


def _set_up(
    module: nn.Module, data: Dataset[Any], settings: Training, steps: int, warmup: int, accelerator: Accelerator
) -> tuple[nn.Module, Any, CosineLRScheduler, Any]:
    """AdamW with a cosine schedule, and the loader; prepared by Accelerate."""
    on_gpu = accelerator.device.type == "cuda"
    groups = param_groups_weight_decay(module, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=on_gpu)
    # One more than there are steps: the cosine reaches 0 after the last one, not in it.
    schedule = CosineLRScheduler(
        optimizer, t_initial=steps + 1, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=False, t_in_epochs=False
    )
    loader = DataLoader(
        data,
        settings.batch_size,
        num_workers=settings.workers,
        pin_memory=on_gpu,
        drop_last=True,
        # The loader draws a seed for its workers: from its own generator, not from the one that dropout uses.
        generator=torch.Generator(),
    )
    module, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    return module, optimizer, schedule, loader


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
