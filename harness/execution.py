"""How a run is carried out, as against what it computes; and how it is told to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, Literal

from harness.progress import say

STOPPED = 75  # sysexits.h's EX_TEMPFAIL: the same command goes on
# Slurm warns by SIGUSR1 where it is told so, by SIGUSR2 where submitit told it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Execution:
    """Choices that no result depends on; the same run goes on under other ones.

    Attributes:
        checkpoint_minutes: between checkpoints of a training stage.
        micro_batches: parts of a batch that each process computes one after the other; 0: as the launcher says, else 1.
        on_nonfinite: what to do about a loss or gradient that is not finite: stop, or leave the step out and count it.
        trackers: of `harness.tracking`.
        until: the stage after which to leave; empty: go to the end.
    """

    checkpoint_minutes: float = 10.0
    micro_batches: int = 0
    on_nonfinite: Literal["stop", "skip"] = "stop"
    trackers: tuple[str, ...] = ()
    until: Literal["", "pretrain"] = ""


AS_USUAL = Execution()


def micro_batches(asked: int) -> int:
    """As asked; 0: as `accelerate launch --gradient_accumulation_steps` says, else 1."""
    return asked or int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or 1)


class Interrupted(BaseException):
    """A signal asked to stop. Not an `Exception`: whoever handles errors has no business with it."""


class _Received:
    """The signal that came, and whether a training step is to end first."""

    name = ""
    deferred = 0


def requested() -> str:
    """The signal that asked to stop; empty if none did."""
    return _Received.name


@contextmanager
def catching() -> Iterator[None]:
    """Within it SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 raise `Interrupted`, or wait where `deferred` says so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, _receive) for each in SIGNALS}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        _Received.name = ""


@contextmanager
def deferred() -> Iterator[None]:
    """Within it a signal is only noted, and `requested` says so; a second Ctrl-C does not wait."""
    _Received.deferred += 1
    try:
        yield
    finally:
        _Received.deferred -= 1


def _receive(number: int, frame: FrameType | None) -> None:
    again, _Received.name = bool(_Received.name), signal.Signals(number).name
    if not _Received.deferred or (again and number == signal.SIGINT):
        raise Interrupted(_Received.name)
    if not again:
        say(f"{_Received.name}: stopping after this step, with a checkpoint")


def leave_to_parent(worker: Any = None) -> None:
    """In a loader's worker: a signal to the whole job is the main process's business. A second SIGTERM is meant."""
    for each in SIGNALS:
        signal.signal(each, signal.SIG_IGN)

    def once(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, once)
