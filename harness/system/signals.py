"""Signals that ask a run to stop: after the step it is in, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from harness.system.console import say

STOPPED = 75  # sysexits.h's EX_TEMPFAIL: the same command goes on
# Slurm warns by SIGUSR1 where it is told so, by SIGUSR2 where submitit told it.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


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
