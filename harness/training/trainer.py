"""One training step, for every stage and profile.

It trains any module that returns named loss terms. The batch of a step may be divided over processes and micro-batches.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils.data import DataLoader, Dataset

from harness.api.backbone import Backbone
from harness.api.global_batch import BatchParts, batch_parts
from harness.api.returned import wrong_terms
from harness.compute.devices import keep_memory, precision
from harness.compute.layers import prepare_module
from harness.compute.memory import workers_that_fit
from harness.compute.processes import SingleProcess
from harness.config.schema import Training
from harness.system.errors import UserError
from harness.system.files import seed_from
from harness.system.signals import leave_to_parent
from harness.training.clock import StepClock
from harness.training.optimization import new_optimizer, new_schedule

OPTIMIZERS = {"adamw": "AdamW", "sgd": "SGD"}  # settings -> names in the record
FINITE = "finite"  # key beside the loss terms of a step: whether all of them and the gradient are finite


@dataclass
class StageReport:
    """What a finished training stage reports.

    Attributes:
        seconds: of the whole stage.
        steps: number of optimizer steps.
        clock: p50 and p95 in ms per phase of a step.
        used: precision, device and other settings that the stage was computed with.
        skipped: numbers of the steps that were left out because the loss or the gradient was not finite.
        resumed: how often the stage went on from a checkpoint.
        joules: that the machine used meanwhile; None where it does not tell (`harness.compute.energy`).
        counted: what these joules are of, as `EnergyMeter.sources`.
    """

    seconds: float
    steps: int
    clock: dict[str, Any]
    used: dict[str, Any] = field(default_factory=dict)
    skipped: list[int] = field(default_factory=list)
    resumed: int = 0
    joules: float | None = None
    counted: list[str] = field(default_factory=list)


class Trainer:
    """A module with its optimizer and schedule, wrapped by Accelerate. Every stage and profile calls `step`.

    Args:
        warmup: number of first steps in which the learning rate rises.
        seed: of dropout and of the method's random draws.
        skip_nonfinite: whether to leave out a step that is not finite; otherwise no step after it changes the parameters.

    Raises:
        UserError: the batch cannot be divided evenly, or batch norm would see micro-batches.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: Training,
        steps: int,
        warmup: int,
        accelerator: Accelerator | SingleProcess,
        seed: int = 0,
        skip_nonfinite: bool = False,
    ) -> None:
        self.settings, self.accelerator, self.device, self.seed = settings, accelerator, accelerator.device, seed
        self.precision, self.memory_kept = precision(settings.precision, self.device), keep_memory()
        self.inner = prepare_module(module, self.device, settings.channels_last)
        self.parts = divide_batch(self.inner, settings, accelerator)
        self.fused = self.device.type in ("cuda", "cpu")
        optimizer = new_optimizer(module, settings, self.fused)
        self.schedule = new_schedule(optimizer, settings, steps, warmup)
        # DDP warns about the gradient strides of axes of length 1, which do not matter.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.module, self.optimizer = accelerator.prepare(module, optimizer)
        self.trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        self.clock = StepClock(self.device)
        # With "skip", buffers that a forward pass changes (running moments, queues) are restored after a step that is not finite.
        self.restored = list(module.buffers()) if skip_nonfinite else []
        self.skip_nonfinite, self.bad = skip_nonfinite, torch.zeros((), device=self.device)
        self.passes: int | None = None
        self.gradient_norm = torch.zeros((), device=self.device)  # of the last step, before it is clipped
        self.module.train()

    def loader(self, data: Dataset[Any], start: int = 0) -> Any:
        """The micro-batches of this process, on the host: its share of the samples of `data` from number `start` on."""
        sized: Any = data  # a Dataset with a length, which its type does not promise
        parts = self.parts
        size = self.settings.rows(parts.processes, parts.micro_batches)
        firsts = range(start + parts.rank * size, len(sized) - size + 1, parts.processes * size)
        return DataLoader(
            data,
            batch_sampler=[list(range(first, first + size)) for first in firsts],
            num_workers=workers_that_fit(data[0], size, self.settings.workers) if self.settings.workers else 0,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=leave_to_parent,
            # The loader draws a seed for its workers. Its own generator keeps that draw out of the one that dropout uses.
            generator=torch.Generator(),
        )

    def step(
        self, number: int, batches: Sequence[Mapping[str, Tensor]], after_step: Callable[[int], None] | None = None
    ) -> dict[str, Tensor]:
        """Compute step `number`, from 1. Nothing here waits for the device.

        Args:
            batches: the micro-batches of this process, on the host.
            after_step: is called with `number` after the optimizer's step.

        Returns:
            The loss terms of the whole batch, on the device, and under `FINITE` whether they and the gradient are finite.
            If they are not, the parameters stay as they are.
        """
        batches_on_device = [{name: self._move(value) for name, value in batch.items()} for batch in batches]
        self.schedule.step_update(number)
        saved_buffers = [buffer.clone() for buffer in self.restored]
        self.clock.lap("transfer")
        with batch_parts(self.parts):
            self._collect_gathered(number, batches_on_device)
            terms_of_parts = [self._backward(number, index, batch) for index, batch in enumerate(batches_on_device)]
        terms = self._mean_over_parts(terms_of_parts)
        norm = get_total_norm([p.grad for p in self.trained if p.grad is not None], foreach=True)
        finite = torch.isfinite(torch.stack([norm, *terms.values()])).all()
        self.gradient_norm = norm
        if self.settings.clip_norm:
            clip_grads_with_norm_(self.trained, self.settings.clip_norm, norm, foreach=True)
        self._update(finite)
        for buffer, before in zip(self.restored, saved_buffers, strict=True):
            buffer.copy_(torch.where(finite, buffer, before))
        if after_step is not None:
            after_step(number)
        self.clock.lap("optimizer")
        return {**terms, FINITE: finite}

    def seed_step(self, number: int) -> None:
        """Seed all random draws of step `number` from the stage's seed, the step and the part of the batch.

        So a checkpoint holds no state of generators.
        """
        parts = self.parts
        dropout_seed, method_seed = (_seed_from_numbers(self.seed, number, purpose) for purpose in (0, 1))
        torch.manual_seed(dropout_seed + parts.index)
        generator = getattr(self.inner, "generator", None)
        if generator is not None:
            generator.manual_seed(method_seed + parts.index)
        if parts.num_parts > 1:
            for name, seed in (("dropout", dropout_seed), ("method", method_seed)):
                stream = parts.streams.setdefault(name, torch.Generator(self.device))
                stream.manual_seed(seed)

    def _collect_gathered(self, number: int, batches: Sequence[Mapping[str, Tensor]]) -> None:
        """Run forward passes without gradients, to collect what `gather` must return for the other micro-batches.

        If one call of `gather` depends on the result of another, one pass over the micro-batches is not enough. The first
        step therefore repeats the pass until its values no longer change; later steps run as many passes as the first
        one needed.
        """
        parts = self.parts
        parts.previous_records = []
        passes = 0
        while parts.micro_batches > 1 and passes != self.passes:
            parts.recorded = []
            for micro_batch, batch in enumerate(batches):
                parts.begin(micro_batch, recording=True)
                self.seed_step(number)
                with torch.no_grad(), self._autocast():
                    self.inner(batch)
            if self.passes is None and _equal_tensors(parts.previous_records, parts.recorded):
                self.passes = passes
            else:
                passes, parts.previous_records = passes + 1, parts.recorded

    def _backward(self, number: int, micro_batch: int, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the forward and backward pass of one micro-batch. Returns its loss terms."""
        last = micro_batch == self.parts.micro_batches - 1
        self.parts.begin(micro_batch)
        self.seed_step(number)
        # Processes exchange gradients once per step, in the backward pass of the last micro-batch.
        with nullcontext() if last else self.accelerator.no_sync(self.module):
            with self._autocast():
                terms: dict[str, Tensor] = self.module(batch)
            if wrong := wrong_terms(terms):
                raise UserError(f"{type(self.inner).__name__}: {wrong}")
            loss: Any = sum(term.float() for term in terms.values())
            self.clock.lap("forward")
            if micro_batch == 0:
                self.optimizer.zero_grad(set_to_none=True)
            self.accelerator.backward(loss)
        self.clock.lap("backward")
        return {name: term.detach().float() for name, term in terms.items()}

    def _mean_over_parts(self, terms_of_parts: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The mean of each loss term over all parts of the batch, the same on every process.

        Args:
            terms_of_parts: per micro-batch of this process.
        """
        if self.parts.num_parts == 1:
            return dict(terms_of_parts[0])
        local_means = torch.stack([torch.stack(list(terms.values())) for terms in terms_of_parts]).mean(dim=0)
        means = self.accelerator.reduce(local_means, reduction="mean")
        return dict(zip(terms_of_parts[0], means, strict=True))

    def _update(self, finite: Tensor) -> None:
        """Take the optimizer's step. If `finite` is false, it changes nothing; the device decides, so the host need not wait."""
        bad = (~finite).float()
        # A stage that stops must not change parameters in later steps either, because the host reads of the problem later.
        # A stage that skips leaves out this step only.
        self.bad = bad if self.skip_nonfinite else torch.maximum(self.bad, bad)
        if self.fused:
            getattr(self.optimizer, "optimizer", self.optimizer).found_inf = self.bad
        elif self.bad.item():
            return
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        """Everything that the next step depends on, apart from its number."""
        return {"module": self.inner.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`. Raises RuntimeError, ValueError or KeyError if it belongs to another module."""
        self.inner.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])

    def used(self) -> dict[str, Any]:
        """Precision, device and other settings that the stage was computed with, for the record."""
        return {
            "precision": self.precision,
            "channels_last": self.settings.channels_last,
            "compile": self.settings.compile,
            "optimizer": ("fused " if self.optimizer.param_groups[0].get("fused") else "")
            + OPTIMIZERS[self.settings.optimizer],
            "device": str(self.device),
            "memory_kept": self.memory_kept,
            "processes": self.parts.processes,
            "micro_batches": self.parts.micro_batches,
            "batch_size_global": self.settings.batch_size,
        }

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _move(self, value: Tensor) -> Tensor:
        """A tensor on the device; volumes (N, C, x, y, z) channels-last if the settings say so."""
        on_device = value.to(self.device, non_blocking=True)
        channels_last = self.settings.channels_last and value.ndim == 5
        return on_device.to(memory_format=torch.channels_last_3d) if channels_last else on_device


def divide_batch(module: nn.Module, settings: Training, accelerator: Accelerator) -> BatchParts:
    """Divide batches over the processes and micro-batches of an accelerator.

    Raises:
        UserError: the batch cannot be divided evenly, or not without changing the result.
    """
    processes, micro_batches = accelerator.num_processes, accelerator.gradient_accumulation_steps
    settings.rows(processes, micro_batches)
    refuse_batch_norm(module, micro_batches)
    return BatchParts(processes=processes, rank=accelerator.process_index, micro_batches=micro_batches)


def refuse_batch_norm(module: nn.Module, in_turn: int) -> None:
    """Raises UserError if a module has batch norm and its batches are divided into several micro-batches.

    Args:
        in_turn: number of micro-batches, which are computed one after the other.
    """
    if in_turn > 1 and any(isinstance(layer, _BatchNorm) for layer in module.modules()):
        raise UserError(
            "batch norm needs the whole batch at once, micro-batches would change the result: leave --micro-batches out, "
            "or take more processes, which share its moments"
        )


def _equal_tensors(before: list[list[Tensor]], recorded: list[list[Tensor]]) -> bool:
    """Whether a pass recorded the same tensors, per micro-batch, as the pass before it.

    Args:
        before: empty before the first pass; then a pass without any call of `gather` counts as equal.
    """
    if not before:
        return not any(recorded)
    pairs = [pair for tensors in zip(before, recorded, strict=True) for pair in zip(*tensors, strict=True)]
    return all(torch.equal(a, b) for a, b in pairs)


def _seed_from_numbers(*numbers: int) -> int:
    """A seed that is a function of some numbers."""
    return seed_from(repr(numbers), size=6)


@contextmanager
def compiled(module: nn.Module, wanted: bool) -> Iterator[None]:
    """While the context is open, compile trunk and decoder of the backbones in `module` (`torch.compile`), if `wanted`."""
    backbones = [layer for layer in module.modules() if isinstance(layer, Backbone)] if wanted else []
    for backbone in backbones:
        for name in ("trunk", "decode"):
            setattr(backbone, name, torch.compile(getattr(backbone, name)))
    try:
        yield
    finally:
        for backbone in backbones:
            del backbone.trunk, backbone.decode
