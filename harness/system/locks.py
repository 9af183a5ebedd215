"""Locks between processes and hosts: one process computes a thing, the others wait and use its result.

A lock is a lease of `filelock`: a file `NAME.lock` that says who holds it and that the holder touches every `HEARTBEAT`
seconds. It works on network file systems, where `flock` may not. On the holder's own host a holder that is gone is followed
at once; elsewhere once its file was seen untouched for `LEASE` seconds.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import SoftFileLease, Timeout

from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import find_below

HEARTBEAT = 10.0  # seconds between a holder's signs of life
LEASE = 120.0  # seconds without one, after which a holder on another host counts as gone; the same for all processes
POLL = 0.5  # seconds between looks at a lock that another process holds


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock; `token` differs each time that a lock is taken."""

    host: str
    pid: int
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LostLockError(UserError):
    """Another process has taken over what this one was computing."""


class Lock:
    """A lock that this process holds.

    Args:
        lease: acquired.
    """

    def __init__(self, path: Path, lease: SoftFileLease) -> None:
        self.path, self._lease, self._checked, self._lost = path, lease, time.monotonic(), False

    @property
    def lost(self) -> bool:
        """Whether another process has taken it, because this one gave no sign of life for too long."""
        # A process that was suspended may have been given up; its heartbeat needs a while to notice.
        if not self._lost and time.monotonic() - self._checked > HEARTBEAT:
            self._lost = not self._lease.is_lock_held_by_us
            self._checked = time.monotonic()
        return self._lost or self._lease.compromise is not None

    def check(self) -> None:
        """Raises LostLockError where another process has taken over."""
        if self.lost:
            raise LostLockError(
                f"another process has taken over {self.path.name}, since this one gave no sign of life for {LEASE:.0f} s: "
                "ask again for its result"
            )

    def release(self) -> None:
        """Let the next process have it."""
        try:
            self._lease.release()
        except OSError as error:
            # A disk that has become read-only, say. What ended the run matters more, and the next process takes the lock
            # over once this one is gone.
            say(f"{self.path}.lock cannot be removed ({error.strerror}): the next process finds its owner gone")


def acquire(path: Path, lease: SoftFileLease | None = None) -> tuple[Lock | None, Owner | None]:
    """The lock at `path`, or its owner where another process holds it.

    Args:
        lease: of an earlier call for the same path; a holder on another host is watched from the first call on.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = lease or _lease(_file(path))
    try:
        lease.acquire(blocking=False)
    except Timeout:
        return None, owner_of(_file(path))
    return Lock(path, lease), None


@contextmanager
def held(path: Path, what: str) -> Iterator[Lock]:
    """Hold the lock at `path`. While another process holds it, say once that it computes `what`, and wait."""
    told, lease = None, _lease(_file(path))
    while True:
        lock, owner = acquire(path, lease)
        if lock is not None:
            break
        if owner is not None and owner.token != told:
            say(f"{what} is being computed by {owner}: waiting for it")
            told = owner.token
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release()


def owner_of(file: Path) -> Owner | None:
    """The owner that a lock file names; None where it is being written, was cut short, or is gone."""
    record = _lease(file).owner
    # Of a container, filelock adds its table of processes to the name of the host.
    return Owner(record.hostname.partition("?")[0], record.pid, record.token or "") if record else None


def dead_locks(folder: Path) -> list[Path]:
    """Lock files below a folder whose owners were processes of this host that are gone."""
    return [file for file in find_below(folder, "*.lock") if _is_dead(file)]


def holders(folder: Path) -> list[tuple[Path, Owner]]:
    """Lock files below a folder, and who holds them."""
    pairs = [(file, owner_of(file)) for file in find_below(folder, "*.lock")]
    return [(file, owner) for file, owner in pairs if owner is not None and not _is_dead(file)]


def remove_dead(file: Path) -> None:
    """Remove a lock file whose owner is gone; one that is held by now stays."""
    lease = _lease(file)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        return
    lease.release()


def _lease(file: Path) -> SoftFileLease:
    # Shared by the threads of this process: evaluation and training look at one lock.
    return SoftFileLease(file, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, thread_local=False)


def _file(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


def _is_dead(file: Path) -> bool:
    """Whether filelock would take over at once, tried on a copy: the file itself may be taken by another process meanwhile."""
    with tempfile.TemporaryDirectory(prefix="harness-lock-") as folder:
        copy = Path(folder) / file.name
        try:
            shutil.copyfile(file, copy)
        except OSError:
            return False  # released meanwhile
        lease = _lease(copy)
        try:
            lease.acquire(blocking=False)
        except Timeout:
            return False
        lease.release()
        return True
