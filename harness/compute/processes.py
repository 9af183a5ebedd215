"""The processes of one run: one of them decides and writes, all of them compute."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from harness.compute.devices import new_accelerator
from harness.system.errors import UserError
from harness.system.locks import Lock, held
from harness.system.signals import STOPPED, Interrupted

T = TypeVar("T")


class FailedOnMainProcess(SystemExit):
    """The main process has said what is wrong, or that it stops; the others leave with its exit status."""


class Processes:
    """Processes that a launcher (`torchrun`, `accelerate launch`) started for one run; mostly there is but one."""

    def __init__(self) -> None:
        self.size = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = 0
        if self.size > 1:
            self.rank = new_accelerator().process_index

    @property
    def main(self) -> bool:
        """Whether this process decides and writes."""
        return self.rank == 0

    def decide(self, compute: Callable[[], T]) -> T:
        """What the main process computes, told to all of them; so is what goes wrong there."""
        if self.size == 1:
            return compute()

        told: list[Any] = [None]
        error: BaseException | None = None
        if self.main:
            try:
                told = [("done", compute())]
            # All of it, an interruption too: the others wait for an answer.
            except BaseException as problem:
                error = problem
                status = 2 if isinstance(problem, UserError) else STOPPED if isinstance(problem, Interrupted) else 1
                told = [("failed", status)]
        torch.distributed.broadcast_object_list(told, src=0)
        if error is not None:
            raise error
        kind, value = told[0]
        if kind == "failed":
            raise FailedOnMainProcess(value)
        found: T = value
        return found

    def first(self, compute: Callable[[], T]) -> T:
        """Every process computes, the main one before the others, which find what it left on disk."""
        if self.size == 1:
            return compute()
        kept: list[T] = []

        def mine() -> None:
            kept.append(compute())

        self.decide(mine)
        return kept[0] if kept else compute()

    def wait(self) -> None:
        """Until all are here."""
        self.decide(lambda: None)

    @contextmanager
    def held(self, path: Path, what: str) -> Iterator[Lock | None]:
        """`harness.locks.held`, by the main process for all of them."""
        with held(path, what) if self.main else nullcontext() as lock:
            self.wait()
            yield lock


class SingleProcess:
    """The part of `accelerate.Accelerator` that a training stage uses, for one process of a team by itself."""

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device, micro_batches: int = 1) -> None:
        self.device, self.gradient_accumulation_steps = device, micro_batches

    def prepare(self, *values: Any) -> Any:
        """As they are."""
        return values

    def backward(self, loss: Tensor) -> None:
        """Backward pass; micro-batches are averaged."""
        (loss / self.gradient_accumulation_steps).backward()

    def no_sync(self, module: Any) -> AbstractContextManager[None]:
        """There is nothing to exchange."""
        return nullcontext()

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        """There is nobody to add."""
        return value

    def wait_for_everyone(self) -> None:
        """Nobody else is here."""
