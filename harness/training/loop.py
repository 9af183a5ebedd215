"""The training loop: all steps of a stage, from the first one or from a checkpoint.

Pre-training, fine-tuning, what `Method.prepare` trains, the conformance checks and the profiles all run this loop.
"""

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset

from harness.compute.energy import EnergyMeter
from harness.compute.memory import is_out_of_memory
from harness.compute.processes import Processes, SingleProcess
from harness.config.request import DEFAULT_EXECUTION, Execution
from harness.config.schema import Training
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.locks import Lock
from harness.system.signals import Interrupted, deferred, requested
from harness.training.checkpoints import Checkpoints
from harness.training.lineage import Lineage
from harness.training.out_of_memory import explain_out_of_memory
from harness.training.trainer import FINITE, StageReport, Trainer, compiled

KILLED = re.compile(r"DataLoader worker \(pid\S* .*\) (is killed by signal|exited unexpectedly)")
READ_EVERY = 10  # steps between reads of the loss on a GPU, because each read waits for the device


@dataclass(frozen=True)
class StagePlan:
    """The task of a training stage.

    Attributes:
        name: of the stage, for messages and the history.
        settings: budget and optimizer.
        steps: number of optimizer steps.
        warmup: number of first steps in which the learning rate rises.
        seed: of dropout and of the method's random draws.
        history: text of the lines that the history begins with.
    """

    name: str
    settings: Training
    steps: int
    warmup: int
    seed: int = 0
    history: str = ""


@dataclass(frozen=True)
class StageContext:
    """How a stage is carried out. Its result does not depend on this.

    Attributes:
        processes: that share the stage.
        execution: options such as the interval of checkpoints.
        log: is called with the named values of a step and its number (`harness.training.trackers`).
        locks: that this process holds during the stage.
        quiet: whether to hide the progress bar.
        watch: is called on the main process with the module that is trained and the number of each step, from 1; in pre-training
            also with 0, before the first step. It must not change the module. Its time does not count.
        lineage: of the weights that the stage writes.
    """

    processes: Processes = field(default_factory=Processes)
    execution: Execution = DEFAULT_EXECUTION
    log: Callable[[Mapping[str, float], int], None] | None = None
    locks: tuple[Lock, ...] = ()
    quiet: bool = False
    watch: Callable[[nn.Module, int], None] | None = None
    lineage: Lineage | None = None

    def check(self) -> None:
        """Raises LostLockError if another process has taken over one of the locks."""
        for lock in self.locks:
            lock.check()

    def under(self, lock: Lock | None) -> "StageContext":
        """The same context with one more lock."""
        return self if lock is None else replace(self, locks=(*self.locks, lock))


def train(
    plan: StagePlan,
    module: nn.Module,
    data: Dataset[Any],
    history: Path,
    accelerator: Accelerator | SingleProcess,
    context: StageContext | None = None,
    after_step: Callable[[int], None] | None = None,
) -> StageReport:
    """Minimise the sum of the loss terms that `module(batch)` returns, and write one line per step to `history`.

    A stage that was interrupted goes on from the last checkpoint in the folder of `history`, with the same result.

    Args:
        data: samples of all steps in their order; each step takes the next `batch_size` samples.
        after_step: is called with the number of each step, from 1.

    Raises:
        UserError: as `TrainingLoop.run` and `Trainer`.
        Interrupted: as `TrainingLoop.run`.
    """
    context = context or StageContext()
    skip = context.execution.on_nonfinite == "skip"
    trainer = Trainer(module, plan.settings, plan.steps, plan.warmup, accelerator, plan.seed, skip)
    return TrainingLoop(plan, trainer, data, history, context).run(after_step)


class NonFiniteError(UserError):
    """A loss or a gradient is not finite; `problem` says which, where and of which cases."""

    def __init__(self, problem: str, advice: str) -> None:
        self.problem = problem
        super().__init__(f"{problem}; {advice}")


class TrainingLoop:
    """A training stage in a folder: its trainer, its history and its checkpoints.

    Args:
        history: JSON lines, one per step. Lines beyond the checkpoint that the stage goes on from are cut off.
    """

    def __init__(
        self, plan: StagePlan, trainer: Trainer, data: Dataset[Any], history: Path, context: StageContext
    ) -> None:
        self.plan, self.trainer, self.data, self.context, self.history = plan, trainer, data, context, history
        self.name, self.steps, self.main = plan.name, plan.steps, trainer.accelerator.is_main_process
        self.checkpoints = Checkpoints(history.parent / "checkpoints", context.execution.checkpoint_minutes)
        self.read_every = READ_EVERY if trainer.device.type == "cuda" else 1
        self.step, self.seconds, self.resumed, self.history_bytes = 0, 0.0, 0, 0
        self.skipped: list[int] = []
        self.energy = EnergyMeter(trainer.device, trainer.parts.processes)
        self.waits_for_loader = False
        self.unread: list[tuple[int, float, Tensor, dict[str, Tensor]]] = []

    def run(self, after_step: Callable[[int], None] | None = None) -> StageReport:
        """Compute all remaining steps.

        Args:
            after_step: is called with the number of each step, from 1.

        Raises:
            UserError: a loss is not finite, the memory does not suffice, or the disk is full.
            Interrupted: a signal arrived, and a checkpoint was written.
        """
        self._resume()
        trainer, clock, began = self.trainer, self.trainer.clock, time.perf_counter() - self.seconds
        loader = trainer.loader(self.data, self.step * trainer.settings.batch_size)
        show_bar = self.main and not self.context.quiet
        bar = progress(None, self.name, total=self.steps, visible=show_bar, initial=self.step)
        compilation = compiled(trainer.inner, trainer.settings.compile)
        with (
            deferred(),
            compilation,
            bar,
            self._open_history() as lines,
            _closing(iter(loader)) as batches,
            self._outliving_a_loader(lines),
        ):
            while self.step < self.steps:
                clock.start()
                micro_batches = self._next(batches)
                clock.lap("data")
                terms = self._step(micro_batches, after_step)
                self.step += 1
                self.unread.append((self.step, trainer.optimizer.param_groups[0]["lr"], trainer.gradient_norm, terms))
                bar.update()
                if self.context.watch is not None and self.main:
                    self.context.check()
                    paused = time.perf_counter()
                    self.context.watch(trainer.inner, self.step)
                    began += time.perf_counter() - paused
                if self.step % self.read_every == 0 or self.step == self.steps:
                    bar.set_postfix_str(f"loss {self._read(lines):.4f}", refresh=False)
                    clock.read()
                    self.seconds = time.perf_counter() - began
                    self.energy.sample(now=self.step == self.steps)
                    self._checkpoint_or_stop(lines)
        used = trainer.used()
        energy, phases = self.energy, clock.summary()
        costs = energy.joules, energy.sources
        return StageReport(self.seconds, self.steps, phases, used, self.skipped, self.resumed, *costs)

    def _next(self, batches: Iterator[Any]) -> list[Any]:
        """The micro-batches of the next step."""
        self.waits_for_loader = True
        try:
            return list(islice(batches, self.trainer.parts.micro_batches))
        except UserError as error:
            # The message of an error in a loader's worker begins with the worker's traceback.
            raise UserError(str(error).rpartition("UserError: ")[2]) from None

    @contextmanager
    def _outliving_a_loader(self, lines: Any) -> Iterator[None]:
        """Context manager: where a loader process is killed, a checkpoint is written, and Interrupted raised.

        PyTorch tells of it by an error at any moment. In the midst of a step no checkpoint can be written, and the stage goes on
        from the last one.
        """
        try:
            yield
            return
        except RuntimeError as error:
            # PyTorch has no class of its own for it. The other processes of a run would wait for this one's checkpoint in vain.
            if not KILLED.search(str(error)) or self.trainer.parts.processes > 1:
                raise
        if self.waits_for_loader:
            if self.unread:
                self._read(lines)
            self._save(lines)
        raise Interrupted(
            f"the death of a loader process (too little memory?), {self.name} step {self.step} of {self.steps}"
        )

    def _step(self, micro_batches: Any, after_step: Callable[[int], None] | None) -> dict[str, Tensor]:
        """Compute the next step. Raises UserError with advice if the memory does not suffice."""
        self.waits_for_loader = False
        try:
            return self.trainer.step(self.step + 1, micro_batches, after_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise UserError(explain_out_of_memory(self.name, self.trainer, self.data))

    def _read(self, lines: Any) -> float:
        """Write the steps in `unread` to the history, which makes the host wait for the device. Returns the last loss.

        Raises:
            LostLockError: the history is another process's by now.
            UserError: as `_handle_nonfinite`.
        """
        # Between two steps this process may have been suspended for so long that another one went on with the stage.
        self.context.check()
        loss = 0.0
        for step, lr, norm, terms in self.unread:
            finite = bool(terms.pop(FINITE))
            values = {name: float(term) for name, term in terms.items()}
            loss = sum(values.values())
            line: dict[str, Any] = {"stage": self.name, "step": step, "loss": loss, "lr": lr, "terms": values}
            line["gradient_norm"] = float(norm) if finite else None
            if not finite:
                self._handle_nonfinite(step, values, lines)
                line |= {"loss": None, "terms": {}, "skipped": True}
            if self.main:
                lines.write(json.dumps(line).encode() + b"\n")
            if finite and self.context.log is not None:
                named = {"loss": loss, "lr": lr, **values}
                self.context.log({f"{self.name}/{key}": value for key, value in named.items()}, step)
        lines.flush()
        self.unread.clear()
        return loss

    def _handle_nonfinite(self, step: int, values: Mapping[str, float], lines: Any) -> None:
        """Count a step that is skipped, or end the stage.

        Raises:
            NonFiniteError: the stage must not skip steps. A checkpoint of the state before the step is written if possible.
        """
        terms = ", ".join(f"{name} {value:g}" for name, value in values.items())
        problem = (
            f"{self.name}: the loss or its gradient is not finite at step {step} ({terms}; {self._crops_of(step)})"
        )
        if self.context.execution.on_nonfinite == "skip":
            self.skipped.append(step)
            if self.main:
                say(f"{problem}: left out, {len(self.skipped)} so far")
            return
        state = "the state before it is kept"
        if step == self.step and self._buffers_are_finite():
            self.step -= 1
            self._save(lines)
        elif not self.checkpoints.all():
            state = "no checkpoint was due before it"
        advice = f"lower {self.name}.lr, set {self.name}.precision=fp32, or go on with --on-nonfinite skip"
        raise NonFiniteError(problem, f"{state}: {advice}")

    def _crops_of(self, step: int) -> str:
        """The cases that the crops of a step come from."""
        size = self.trainer.settings.batch_size
        name = getattr(self.data, "name", None)
        samples = range((step - 1) * size, step * size)
        if name is None:
            return f"samples {samples[0]} to {samples[-1]}"
        return f"cases {', '.join(name(index) for index in samples)}"

    def _buffers_are_finite(self) -> bool:
        """Whether running statistics and queues are still usable after the forward pass of a step that is not finite."""
        return all(bool(torch.isfinite(b).all()) for b in self.trainer.inner.buffers() if b.is_floating_point())

    def _checkpoint_or_stop(self, lines: Any) -> None:
        """Write a checkpoint if one is due or a signal arrived. All processes decide the same. Raises Interrupted."""
        stop, due = requested(), self.checkpoints.due()
        if self.trainer.parts.processes > 1:
            votes = torch.tensor([float(bool(stop)), float(due and self.main)], device=self.trainer.device)
            signalled, due = (bool(vote) for vote in self.trainer.accelerator.reduce(votes, reduction="sum"))
            stop = stop or ("a signal to another process" if signalled else "")
        if stop or (due and self.step < self.steps):
            self._save(lines)
        if stop:
            raise Interrupted(f"{stop}, {self.name} step {self.step} of {self.steps}")

    def _save(self, lines: Any) -> None:
        """Write a checkpoint on the main process; the others wait for it."""
        if self.main:
            lines.flush()  # the checkpoint names the size of the history
            os.fsync(lines.fileno())
            self.trainer.clock.read()
            self.energy.sample(now=True)
            state = self.trainer.state() | {
                "step": self.step,
                "steps": self.steps,
                "history": self.history.stat().st_size,
                "clock": self.trainer.clock.seconds,
                "seconds": self.seconds,
                "joules": self.energy.joules,
                "skipped": self.skipped,
                "resumed": self.resumed,
                "threads": torch.get_num_threads(),
            }
            self.checkpoints.save(self.step, state)
        self.trainer.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Load the newest undamaged checkpoint whose lines the history still has, if there is one."""
        written = self.history.stat().st_size if self.history.exists() else 0
        for state in self.checkpoints.candidates():
            if state["steps"] != self.steps or not len(self.plan.history) <= state["history"] <= written:
                continue
            try:
                self.trainer.load(state)
            except (RuntimeError, ValueError, KeyError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(
                    f"{self.checkpoints.folder} is of another version of the {self.name} module ({reason}): "
                    "remove that folder to begin the stage again"
                ) from None
            self.step, self.seconds, self.skipped = state["step"], state["seconds"], list(state["skipped"])
            self.resumed, self.history_bytes = state["resumed"] + 1, state["history"]
            self.energy.go_on(state.get("joules"))
            self.trainer.clock.seconds = {phase: list(values) for phase, values in state["clock"].items()}
            if self.main:
                say(f"{self.name} goes on after step {self.step} of {self.steps}")
                self._compare_threads(state.get("threads"))
            return

    def _compare_threads(self, before: int | None) -> None:
        """Tell the user if the steps before were computed with another number of threads, which changes the last digits."""
        now = torch.get_num_threads()
        if self.trainer.device.type == "cpu" and before not in (None, now):
            say(
                f"the steps before had {before} threads, this process has {now}: sums are rounded in another order, so the "
                f"result differs from a run in one piece; OMP_NUM_THREADS={before} keeps it equal"
            )

    def _open_history(self) -> Any:
        """The history file, cut after the step that the stage goes on from."""
        if not self.main:
            return Path(os.devnull).open("ab")
        self.history.parent.mkdir(parents=True, exist_ok=True)
        if self.history_bytes:
            os.truncate(self.history, self.history_bytes)
        else:
            self.history.write_text(self.plan.history)
        return self.history.open("ab")


@contextmanager
def _closing(batches: Any) -> Iterator[Any]:
    """Yield the iterator of a loader, and end its workers: an error that it raised may keep the iterator alive."""
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()
