"""The training loop: steps from the first, or from a checkpoint, to the last; read from top to bottom."""

import json
import os
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

from harness.compute.memory import is_out_of_memory
from harness.compute.processes import Processes
from harness.config.request import AS_USUAL, Execution
from harness.config.schema import Training
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.locks import Lock
from harness.system.signals import Interrupted, deferred, requested
from harness.training.checkpoints import Checkpoints
from harness.training.out_of_memory import explain_out_of_memory
from harness.training.trainer import FINITE, StageReport, Trainer, compiled


@dataclass(frozen=True)
class StageContext:
    """How a stage is carried out: by whom, and who is told of its steps.

    Attributes:
        log: takes named values of a step; see `harness.tracking`.
        locks: what this process holds meanwhile.
    """

    team: Processes = field(default_factory=Processes)
    how: Execution = AS_USUAL
    log: Callable[[Mapping[str, float], int], None] | None = None
    locks: tuple[Lock, ...] = ()

    def check(self) -> None:
        """Raises LostLockError where another process has taken over what is computed here."""
        for lock in self.locks:
            lock.check()

    def under(self, lock: Lock | None) -> "StageContext":
        """The same, while one more lock is held."""
        return self if lock is None else replace(self, locks=(*self.locks, lock))


READ_EVERY = 10  # steps between reads of the loss on a GPU: each one waits for the device


class TrainingLoop:
    """A training stage in a folder: its trainer, its history and its checkpoints.

    Args:
        history: JSON lines, one per step; what is there beyond the step that the stage goes on from is cut off.
        data: samples of all steps in their order; a step takes the next `batch_size`.
        head: what the history begins with.
    """

    def __init__(
        self,
        name: str,
        trainer: Trainer,
        data: Dataset[Any],
        steps: int,
        history: Path,
        carried: StageContext,
        head: str = "",
    ) -> None:
        self.name, self.trainer, self.data, self.steps, self.carried = name, trainer, data, steps, carried
        self.history, self.head, self.main = history, head, trainer.accelerator.is_main_process
        self.kept = Checkpoints(history.parent / "checkpoints", carried.how.checkpoint_minutes)
        self.read_every = READ_EVERY if trainer.device.type == "cuda" else 1
        self.step, self.seconds, self.resumed = 0, 0.0, 0
        self.skipped: list[int] = []
        self.unread: list[tuple[int, float, dict[str, Tensor]]] = []

    def run(self, after_step: Callable[[int], None] | None = None) -> StageReport:
        """All steps that are left.

        Raises:
            UserError: a loss that is not finite, too little memory, or a disk that is full.
            Interrupted: a signal came; a checkpoint was written.
        """
        self._resume()
        trainer, clock, began = self.trainer, self.trainer.clock, time.perf_counter() - self.seconds
        loader = trainer.loader(self.data, self.step * trainer.settings.batch_size)
        bar = progress(None, self.name, total=self.steps, shown=self.main, initial=self.step)
        faster = compiled(trainer.inner, trainer.settings.compile)
        with deferred(), faster, bar, self._open_history() as lines, closed(iter(loader)) as batches:
            while self.step < self.steps:
                clock.start()
                dealt = self._next(batches)
                clock.lap("data")
                terms = self._step(dealt, after_step)
                self.step += 1
                self.unread.append((self.step, trainer.optimizer.param_groups[0]["lr"], terms))
                bar.update()
                if self.step % self.read_every == 0 or self.step == self.steps:
                    bar.set_postfix_str(f"loss {self._read(lines):.4f}", refresh=False)
                    clock.read()
                    self.seconds = time.perf_counter() - began
                    self._keep_or_stop(lines)
        used = trainer.used()
        return StageReport(self.seconds, self.steps, clock.summary(), used, self.skipped, self.resumed)

    def _next(self, batches: Iterator[Any]) -> list[Any]:
        try:
            return list(islice(batches, self.trainer.parts.micro_batches))
        except UserError as error:
            # A loader's worker sends its traceback along.
            raise UserError(str(error).rpartition("UserError: ")[2]) from None

    def _step(self, batches: Any, after_step: Callable[[int], None] | None) -> dict[str, Tensor]:
        try:
            return self.trainer.step(self.step + 1, batches, after_step)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        raise UserError(explain_out_of_memory(self.name, self.trainer, self.data))

    def _read(self, lines: Any) -> float:
        """Write the waiting steps to the history; this is where the host waits for the device. Returns the loss."""
        total = 0.0
        for step, lr, found in self.unread:
            finite = bool(found.pop(FINITE))
            values = {name: float(term) for name, term in found.items()}
            total = sum(values.values())
            line: dict[str, Any] = {"stage": self.name, "step": step, "loss": total, "lr": lr, "terms": values}
            if not finite:
                self._bad(step, values)
                line |= {"loss": None, "terms": {}, "skipped": True}
            if self.main:
                lines.write(json.dumps(line).encode() + b"\n")
            if finite and self.carried.log is not None:
                self.carried.log(
                    {f"{self.name}/{key}": value for key, value in {"loss": total, "lr": lr, **values}.items()}, step
                )
        lines.flush()
        self.unread.clear()
        return total

    def _bad(self, step: int, values: Mapping[str, float]) -> None:
        """A step that is not finite: left out and counted, or the end. Raises UserError."""
        told = ", ".join(f"{name} {value:g}" for name, value in values.items())
        what = f"{self.name}: the loss or its gradient is not finite at step {step} ({told}; {self._crops_of(step)})"
        if self.carried.how.on_nonfinite == "skip":
            self.skipped.append(step)
            if self.main:
                say(f"{what}: left out, {len(self.skipped)} so far")
            return
        left = "the state before it is kept"
        if step == self.step and self._whole():
            self.step -= 1
            self._save(None)
        elif not self.kept.all():
            left = "no checkpoint was due before it"
        raise UserError(
            f"{what}; {left}: lower {self.name}.lr, set {self.name}.precision=fp32, or go on with --on-nonfinite skip"
        )

    def _crops_of(self, step: int) -> str:
        """The cases that a step's crops come from."""
        size = self.trainer.settings.batch_size
        name = getattr(self.data, "name", None)
        places = range((step - 1) * size, step * size)
        return f"cases {', '.join(name(place) for place in places)}" if name else f"samples {places[0]} to {places[-1]}"

    def _whole(self) -> bool:
        """Whether the forward pass of the bad step has left the module as it was."""
        return all(bool(torch.isfinite(b).all()) for b in self.trainer.inner.buffers() if b.is_floating_point())

    def _keep_or_stop(self, lines: Any) -> None:
        """A checkpoint where one is due or a signal came; all processes decide alike."""
        self.carried.check()
        stop, due = requested(), self.kept.due()
        if self.trainer.parts.processes > 1:
            votes = torch.tensor([float(bool(stop)), float(due and self.main)], device=self.trainer.device)
            told, due = (bool(vote) for vote in self.trainer.accelerator.reduce(votes, reduction="sum"))
            stop = stop or ("a signal to another process" if told else "")
        if stop or (due and self.step < self.steps):
            self._save(lines)
        if stop:
            raise Interrupted(f"{stop}, {self.name} step {self.step} of {self.steps}")

    def _save(self, lines: Any) -> None:
        if self.main:
            if lines is not None:
                os.fsync(lines.fileno())
            self.trainer.clock.read()
            state = self.trainer.state() | {
                "step": self.step,
                "steps": self.steps,
                "history": self.history.stat().st_size,
                "clock": self.trainer.clock.seconds,
                "seconds": self.seconds,
                "skipped": self.skipped,
                "resumed": self.resumed,
            }
            self.kept.save(self.step, state)
        self.trainer.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """The newest checkpoint that is whole and whose history is there; or the beginning."""
        written = self.history.stat().st_size if self.history.exists() else 0
        for state in self.kept.candidates():
            if state["steps"] != self.steps or not len(self.head) <= state["history"] <= written:
                continue
            try:
                self.trainer.load(state)
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    f"{self.kept.folder} is of another version of the {self.name} module ({' '.join(str(error).split())[:200]}): "
                    "remove that folder to begin the stage again"
                ) from None
            self.step, self.seconds, self.skipped = state["step"], state["seconds"], list(state["skipped"])
            self.resumed, self.cut = state["resumed"] + 1, state["history"]
            self.trainer.clock.seconds = {phase: list(values) for phase, values in state["clock"].items()}
            if self.main:
                say(f"{self.name} goes on after step {self.step} of {self.steps}")
            return
        self.cut = 0

    def _open_history(self) -> Any:
        """The history, up to the step that the stage goes on from."""
        if not self.main:
            return Path(os.devnull).open("ab")
        self.history.parent.mkdir(parents=True, exist_ok=True)
        if self.cut:
            os.truncate(self.history, self.cut)
        else:
            self.history.write_text(self.head)
        return self.history.open("ab")


@contextmanager
def closed(batches: Any) -> Iterator[Any]:
    """The iterator of a loader; its workers end here, and not whenever somebody forgets an error that it raised."""
    try:
        yield batches
    finally:
        getattr(batches, "_shutdown_workers", lambda: None)()


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
    seed: int = 0,
    carried: StageContext | None = None,
    head: str = "",
) -> StageReport:
    """Minimise the sum of the terms that `module(batch)` returns; one line per step goes to `history`.

    What was begun in the folder of `history` goes on from its last checkpoint, to the same end.

    Raises:
        UserError: as `Stage.run` and `Trainer`.
        Interrupted: as `Stage.run`.
    """
    carried = carried or StageContext()
    skip = carried.how.on_nonfinite == "skip"
    trainer = Trainer(module, settings, steps, warmup, accelerator, seed, skip)
    return TrainingLoop(stage, trainer, data, steps, history, carried, head).run(after_step)
