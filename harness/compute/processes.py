"""The processes of one run. All of them compute; the main process also decides and writes."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import PartialState
from torch import Tensor

from harness.compute.devices import new_accelerator
from harness.system.errors import UserError
from harness.system.locks import Lock, held
from harness.system.signals import STOPPED, Interrupted

T = TypeVar("T")


class FailedOnMainProcess(SystemExit):
    """The main process failed or was interrupted. It reports the problem; the other processes exit with its exit status."""


class Processes:
    """The processes that a launcher (`torchrun`, `accelerate launch`) started for one run; usually there is only one.

    Attributes:
        size: number of processes.
        rank: index of this process; the main process has 0.
    """

    def __init__(self) -> None:
        """Read the number of processes from WORLD_SIZE, and connect them if there are several."""
        self.size = int(os.environ.get("WORLD_SIZE") or 1)
        self.rank = 0
        if self.size > 1:
            self.rank = new_accelerator().process_index

    @property
    def main(self) -> bool:
        """Whether this is the main process, which decides and writes."""
        return self.rank == 0

    def decide(self, compute: Callable[[], T]) -> T:
        """Call `compute` in the main process only, and return its value, which must be picklable, in all processes.

        Raises:
            FailedOnMainProcess: in the other processes, if `compute` raises in the main process, where its own exception is
                raised. The exit status is 2 for a UserError, `STOPPED` for `Interrupted`, otherwise 1.
        """
        if self.size == 1:
            return compute()

        message: list[Any] = [None]
        error: BaseException | None = None
        if self.main:
            try:
                message = [("done", compute())]
            # Every exception, interruptions included, because the other processes wait for an answer.
            except BaseException as problem:
                error = problem
                status = 2 if isinstance(problem, UserError) else STOPPED if isinstance(problem, Interrupted) else 1
                message = [("failed", status)]
        torch.distributed.broadcast_object_list(message, src=0)
        if error is not None:
            raise error
        kind, value = message[0]
        if kind == "failed":
            raise FailedOnMainProcess(value)
        result: T = value
        return result

    def first(self, compute: Callable[[], T]) -> T:
        """Call `compute` in every process: first in the main process, then in the others, which find its files on disk.

        Raises:
            FailedOnMainProcess: as `decide`.
        """
        if self.size == 1:
            return compute()
        results: list[T] = []

        def compute_on_main() -> None:
            """Keep the result here: it need not be picklable."""
            results.append(compute())

        self.decide(compute_on_main)
        return results[0] if results else compute()

    def wait(self) -> None:
        """Wait until all processes have called this."""
        # A broadcast waits for all with gloo, but on GPUs nothing promises that its source waits for the others.
        if self.size > 1:
            PartialState().wait_for_everyone()

    @contextmanager
    def held(self, path: Path, what: str) -> Iterator[Lock | None]:
        """Context manager: the main process holds a lock for all processes, see `harness.system.locks.held`.

        It yields the lock in the main process and None in the others.
        """
        with held(path, what) if self.main else nullcontext() as lock:
            self.wait()
            yield lock


class SingleProcess:
    """Replaces `accelerate.Accelerator` in a training stage that one process of a run computes alone.

    It has the attributes and methods that a stage uses.
    """

    num_processes, process_index, is_main_process = 1, 0, True

    def __init__(self, device: torch.device, micro_batches: int = 1) -> None:
        """Use `device`, and average gradients over `micro_batches`."""
        self.device, self.gradient_accumulation_steps = device, micro_batches

    def prepare(self, *values: Any) -> Any:
        """The values unchanged."""
        return values

    def backward(self, loss: Tensor) -> None:
        """Backward pass of one micro-batch; the gradients of the micro-batches are averaged."""
        (loss / self.gradient_accumulation_steps).backward()

    def no_sync(self, module: Any) -> AbstractContextManager[None]:
        """A context that does nothing, because no gradients are exchanged."""
        return nullcontext()

    def reduce(self, value: Tensor, reduction: str) -> Tensor:
        """The value unchanged, because there is no other process."""
        return value

    def wait_for_everyone(self) -> None:
        """Return at once, because there is no other process."""
