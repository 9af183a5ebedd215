"""Signals that ask a run to stop. It stops after the current training step, with a checkpoint."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from harness.system.console import say

STOPPED = 75  # exit status EX_TEMPFAIL of sysexits.h: the run was interrupted, and the same command resumes it
# Slurm can be told to warn with SIGUSR1; submitit tells it to warn with SIGUSR2.
# A terminal that is closed, or a connection that breaks, sends SIGHUP.
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))  # Windows has the first two only


class Interrupted(BaseException):
    """A signal asked the run to stop. It is not an `Exception`, so that no error handler catches it."""


class _Received:
    """The state of signal handling in this process.

    Attributes:
        name: name of the signal that was received; empty if none was.
        deferred: number of `deferred` contexts that are open, in which a signal waits for the end of a training step.
    """

    name = ""
    deferred = 0


def requested() -> str:
    """Name of the signal that asked the run to stop; empty if there was none."""
    return _Received.name


@contextmanager
def catching() -> Iterator[None]:
    """Context manager: inside it, the signals in `SIGNALS` raise `Interrupted`, or wait in `deferred`.

    SIGHUP stays ignored where `nohup` has had it ignored. The context manager does nothing in a thread other than the main
    thread, where Python allows no signal handlers.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    caught = [each for each in SIGNALS if each.name != "SIGHUP" or signal.getsignal(each) != signal.SIG_IGN]
    previous_handlers = {number: signal.signal(number, _receive) for number in caught}
    try:
        yield
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
        _Received.name = ""


@contextmanager
def deferred() -> Iterator[None]:
    """Context manager: inside it, a signal is only noted, for `requested` to return. A second Ctrl-C raises `Interrupted`."""
    _Received.deferred += 1
    try:
        yield
    finally:
        _Received.deferred -= 1


def _receive(number: int, frame: FrameType | None) -> None:
    """Signal handler: raise `Interrupted` now, or note the signal for the end of the step."""
    again, _Received.name = bool(_Received.name), signal.Signals(number).name
    if not _Received.deferred or (again and number == signal.SIGINT):
        raise Interrupted(_Received.name)
    if not again:
        say(f"{_Received.name}: stopping after this step, with a checkpoint")


def leave_to_parent(worker: Any = None) -> None:
    """Make a loader worker ignore the signals, because the main process handles a signal that is sent to the whole job.

    The first SIGTERM is ignored as well; the second one ends the worker.

    Args:
        worker: index of the worker, which torch passes; it is not used.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)

    def ignore_once(number: int, frame: FrameType | None) -> None:
        """Ignore this SIGTERM, and let the next one end the worker."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)
