"""One training step, for every stage and profile: any module that returns named loss terms, dealt out or whole."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset

from harness.api.backbone import Backbone
from harness.api.global_batch import BatchParts, batch_parts
from harness.compute.devices import keep_memory, precision
from harness.compute.layers import prepare_module
from harness.config.schema import Training
from harness.system.errors import UserError
from harness.system.files import seed_from
from harness.system.signals import leave_to_parent
from harness.training.clock import StepClock

FINITE = "finite"  # beside the loss terms of a step


@dataclass
class StageReport:
    """What a finished training stage reports.

    Attributes:
        skipped: steps that were left out because something was not finite.
        resumed: how often it went on from a checkpoint.
    """

    seconds: float
    steps: int
    clock: dict[str, Any]
    used: dict[str, Any] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    resumed: int = 0


class Trainer:
    """A module under AdamW and a cosine schedule, prepared by Accelerate; `step` is what every stage and profile runs.

    Raises:
        UserError: a batch that cannot be dealt out evenly, or batch norm over micro-batches.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Training,
        steps: int,
        warmup: int,
        accelerator: Accelerator,
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        self.settings, self.accelerator, self.device, self.seed = settings, accelerator, accelerator.device, seed
        self.precision, self.memory_kept = precision(settings.precision, self.device), keep_memory()
        self.inner = prepare_module(module, self.device, settings.channels_last)
        self.parts = deal(self.inner, settings, accelerator)
        groups = param_groups_weight_decay(module, settings.weight_decay)
        self.fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(groups, lr=settings.lr, fused=self.fused)
        # One more than there are steps: the cosine reaches 0 after the last one, not in it.
        self.schedule = CosineLRScheduler(
            optimizer, t_initial=steps + 1, warmup_t=warmup, warmup_lr_init=0.0, warmup_prefix=False, t_in_epochs=False
        )
        # Of sides of length 1, whose strides say nothing.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.clock = StepClock(self.device)
        # Under "skip" what a forward pass writes (running moments, queues) is put back after a bad step.
        self.restored = list(module.buffers()) if skip_nonfinite else []
        self.skip_nonfinite, self.bad = skip_nonfinite, torch.zeros((), device=self.device)
        self.passes: int | None = None
        self.module.train()

    def loader(self, data: Dataset[Any], start: int = 0) -> Any:
        """Micro-batches of `data` from sample `start` on, on the host; every process its own, in the order of `Parts`."""
        whole: Any = data
        parts = self.parts
        size = self.settings.rows(parts.processes, parts.micro_batches)
        firsts = range(start + parts.rank * size, len(whole) - size + 1, parts.processes * size)
        return DataLoader(
            data,
            batch_sampler=[list(range(first, first + size)) for first in firsts],
            num_workers=self.settings.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_to_parent,
            # The loader draws a seed for its workers: from its own generator, not from the one that dropout uses.
            generator=torch.Generator(),
        )

    def step(
        self, number: int, batches: Sequence[Mapping[str, Tensor]], after_step: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """Step `number`, from 1, on its micro-batches on the host -> loss terms of the whole batch, on the device.

        Beside the terms: `FINITE`, whether they and the gradient are; if not, the parameters stay as they are. Nothing
        here waits for the device.
        """
        moved = [{name: self._move(value) for name, value in batch.items()} for batch in batches]
        self.schedule.step_update(number)
        kept = [buffer.clone() for buffer in self.restored]
        self.clock.lap("transfer")
        with batch_parts(self.parts):
            self._look_ahead(number, moved)
            found = [self._backward(number, micro_batch, batch) for micro_batch, batch in enumerate(moved)]
        terms = self._of_all_parts(found)
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None], foreach=True)
        finite = torch.isfinite(torch.stack([norm, *terms.values()])).all()
        if self.settings.clip_norm:
            clip_grads_with_norm_(self.trained, self.settings.clip_norm, norm, foreach=True)
        self._update(finite)
        for buffer, before in zip(self.restored, kept, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        if after_step is not None:
            after_step(number)
        self.clock.lap("optimizer")
        return {**terms, FINITE: finite}

    def seed_step(self, number: int) -> None:
        """All randomness of a step is a function of the seed, the step and the part: nothing of it need be kept."""
        parts = self.parts
        dropout, drawn = (_number(self.seed, number, purpose) for purpose in (0, 1))
        torch.manual_seed(dropout + parts.mine)
        method = getattr(self.inner, "generator", None)
        if method is not None:
            method.manual_seed(drawn + parts.mine)
        if parts.number > 1:
            for name, seed in (("dropout", dropout), ("method", drawn)):
                stream = parts.streams.setdefault(name, torch.Generator(self.device))
                stream.manual_seed(seed)

    def _look_ahead(self, number: int, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """What `gather` is to give to each micro-batch of the others, where the loss asks for it.

        Where one call of it depends on what another gives, one pass over the micro-batches is not enough; the first step
        finds out how many are.
        """
        parts = self.parts
        parts.known = []
        passes = 0
        while parts.micro_batches > 1 and passes != self.passes:
            parts.recorded = []
            for micro_batch, batch in enumerate(batches):
                parts.begin(micro_batch, recording=True)
                self.seed_step(number)
                with torch.no_grad(), self._autocast():
                    self.inner(batch)
            if self.passes is None and _same(parts.known, parts.recorded):
                self.passes = passes
            else:
                passes, parts.known = passes + 1, parts.recorded

    def _backward(self, number: int, micro_batch: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Forward and backward pass of one micro-batch -> its terms."""
        last = micro_batch == self.parts.micro_batches - 1
        self.parts.begin(micro_batch)
        self.seed_step(number)
        # Processes exchange gradients once, with the last micro-batch.
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            with self._autocast():
                terms: dict[str, Tensor] = self.module(batch)
            loss = sum(term.float() for term in terms.values())
            self.clock.lap("forward")
            if micro_batch == 0:
                self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(loss)
        self.clock.lap("backward")
        return {name: term.detach().float() for name, term in terms.items()}

    def _of_all_parts(self, found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mean over the parts, for every process."""
        if self.parts.number == 1:
            return dict(found[0])
        stacked = torch.stack([torch.stack(list(terms.values())) for terms in found]).mean(dim=0)
        together = self.accelerator.reduce(stacked, reduction="mean")
        return dict(zip(found[0], together, strict=True))

    def _update(self, finite: Tensor) -> None:
        """The optimizer's step, which changes nothing where something is not finite: decided on the device."""
        now = (~finite).float()
        # To stop: no later step either, until the host has read of it. To skip: this one only.
        self.bad = now if self.skip_nonfinite else torch.maximum(self.bad, now)
        if self.fused:
            getattr(self.optimizer, "optimizer", self.optimizer).found_inf = self.bad
        elif self.bad.item():
            return
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, beside its number."""
        return {"module": self.inner.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises RuntimeError, ValueError or KeyError where it is another module's."""
        self.inner.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def used(self) -> dict[str, Any]:
        """What the stage was computed with, for the record."""
        return {
            "precision": self.precision,
            "channels_last": self.settings.channels_last,
            "compile": self.settings.compile,
            "optimizer": "fused AdamW" if self.optimizer.param_groups[0].get("fused") else "AdamW",
            "device": str(self.device),
            "memory_kept": self.memory_kept,
            "processes": self.parts.processes,
            "micro_batches": self.parts.micro_batches,
            "batch_size_global": self.settings.batch_size,
        }

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _move(self, value: Tensor) -> Tensor:
        moved = value.to(self.device, non_blocking=True)
        last = self.settings.channels_last and value.ndim == 5
        return moved.to(memory_format=torch.channels_last_3d) if last else moved


def deal(module: nn.Module, settings: Training, accelerator: Accelerator) -> BatchParts:
    """How batches are dealt out over the processes and micro-batches that were asked for.

    Raises:
        UserError: it cannot be done evenly, or not without changing the result.
    """
    processes, in_turn = accelerator.num_processes, accelerator.gradient_accumulation_steps
    settings.rows(processes, in_turn)
    refuse_batch_norm(module, in_turn)
    return BatchParts(processes=processes, rank=accelerator.process_index, micro_batches=in_turn)


def refuse_batch_norm(module: nn.Module, in_turn: int) -> None:
    """Raises UserError where a module with batch norm is to see its batches in several micro-batches."""
    if in_turn > 1 and any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        raise UserError(
            "batch norm needs the whole batch at once, micro-batches would change the result: leave --micro-batches out, "
            "or take more processes, which share its moments"
        )


def _same(known: list[list[Tensor]], recorded: list[list[Tensor]]) -> bool:
    """Whether another pass found what was known before; nothing at all is known before the first."""
    if not known:
        return not any(recorded)
    pairs = [pair for each in zip(known, recorded, strict=True) for pair in zip(*each, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def _number(*parts: int) -> int:
    """A seed for each tuple of numbers."""
    return seed_from(repr(parts), size=6)


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
