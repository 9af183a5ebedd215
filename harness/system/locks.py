"""Locks between processes and hosts: one process computes a result, the others wait and use it.

A lock is a lease of `filelock`: a file `NAME.lock` that names its holder and that the holder touches every `HEARTBEAT`
seconds. It works on network file systems, where `flock` may not. If the holder is gone, a process on the same host takes the
lock over at once; a process on another host takes it over after it has seen the file untouched for `LEASE` seconds.
"""

import os
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

HEARTBEAT = 10.0  # seconds between the heartbeats of a holder
LEASE = 120.0  # seconds without a heartbeat after which a holder on another host counts as gone; all processes must agree on it
UNWRITTEN = 20.0  # seconds after which the owner of a lock file without content counts as killed while it made the file
POLL = 0.5  # seconds between attempts to take a lock that another process holds


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock.

    Attributes:
        host: name of its host.
        pid: its process id on that host.
        token: differs each time that a lock is taken; empty if the lock file has none.
    """

    host: str
    pid: int
    token: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"


class LostLockError(UserError):
    """Another process has taken over the lock, and so the computation, of this one."""


class Lock:
    """A lock that this process holds.

    Args:
        path: the path that is locked; the lock file lies beside it.
        lease: the lease of the lock file, which this process has acquired.
    """

    def __init__(self, path: Path, lease: SoftFileLease) -> None:
        self.path, self._lease, self._checked, self._lost = path, lease, time.monotonic(), False

    @property
    def lost(self) -> bool:
        """Whether another process has taken the lock over, because this one sent no heartbeat for too long."""
        # After a process was suspended, its own heartbeat needs a while to notice that the lock was taken over.
        if not self._lost and time.monotonic() - self._checked > HEARTBEAT:
            self._lost = not self._lease.is_lock_held_by_us
            self._checked = time.monotonic()
        return self._lost or self._lease.compromise is not None

    def check(self) -> None:
        """Raise LostLockError if another process has taken the lock over."""
        if self.lost:
            raise LostLockError(
                f"another process has taken over {self.path.name}, since this one gave no sign of life for {LEASE:.0f} s: "
                "ask again for its result"
            )

    def release(self) -> None:
        """Release the lock for the next process. A lock file that cannot be removed is reported, but raises nothing."""
        try:
            self._lease.release()
        except OSError as error:
            # For instance, the disk has become read-only. An exception would hide the error that ended the run, and the next
            # process takes the lock over anyway when this one is gone.
            say(f"{self.path}.lock cannot be removed ({error.strerror}): the next process finds its owner gone")


def acquire(path: Path, lease: SoftFileLease | None = None) -> tuple[Lock | None, Owner | None]:
    """Try to take the lock at `path`, without waiting.

    Args:
        path: the path to lock; its folder is made if it does not exist.
        lease: the lease of earlier attempts at the same path. It must be passed on, because it measures since when the
            lock file of a holder on another host is untouched.

    Returns:
        The lock and None; or None and the owner if another process holds the lock (None if the owner cannot be read).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = lease or _lease(_file(path))
    try:
        lease.acquire(blocking=False)
    except Timeout:
        owner = owner_of(_file(path))
        if owner is None:
            _remove_unwritten(_file(path))
        return None, owner
    return Lock(path, lease), None


@contextmanager
def held(path: Path, what: str) -> Iterator[Lock]:
    """Context manager: hold the lock at `path`, after waiting for any other process that holds it.

    The user is told once per owner that this owner is at work on `what`.
    """
    reported_token, lease = None, _lease(_file(path))
    while True:
        lock, owner = acquire(path, lease)
        if lock is not None:
            break
        if owner is not None and owner.token != reported_token:
            say(f"{owner} is at work on {what}: waiting for it")
            reported_token = owner.token
        time.sleep(POLL)
    try:
        yield lock
    finally:
        lock.release()


def owner_of(file: Path) -> Owner | None:
    """The owner that a lock file names; None if the file is being written, is incomplete, or does not exist."""
    record = _lease(file).owner
    # In a container, filelock appends the PID namespace to the host name, after a question mark.
    return Owner(record.hostname.partition("?")[0], record.pid, record.token or "") if record else None


def dead_locks(folder: Path) -> list[Path]:
    """Lock files below a folder whose owners were processes on this host that no longer exist."""
    return [file for file in find_below(folder, "*.lock") if _is_dead(file)]


def holders(folder: Path) -> list[tuple[Path, Owner]]:
    """Lock files below a folder that are held, each with its owner."""
    pairs = [(file, owner_of(file)) for file in find_below(folder, "*.lock")]
    return [(file, owner) for file, owner in pairs if owner is not None and not _is_dead(file)]


def remove_dead(file: Path) -> None:
    """Remove a lock file whose owner is gone. A file that another process holds by now stays."""
    lease = _lease(file)
    try:
        lease.acquire(blocking=False)
    except Timeout:
        return
    lease.release()


_seen_unwritten: dict[Path, tuple[tuple[int, int, int], float]] = {}
"""Lock files that name no owner: number, size and time of the file, and since when this process has seen it so."""


def _remove_unwritten(file: Path) -> None:
    """Remove a lock file that has named no owner for `UNWRITTEN` seconds.

    A process that is killed between making the file and writing its name leaves such a file, and filelock waits for its content
    without end.
    """
    try:
        state = file.stat()
    except OSError:
        return  # released meanwhile
    mark = state.st_ino, state.st_size, state.st_mtime_ns
    seen, since = _seen_unwritten.get(file, (None, 0.0))
    if seen != mark:
        _seen_unwritten[file] = mark, time.monotonic()
        return
    if time.monotonic() - since < UNWRITTEN:
        return
    # By a rename, so that of several processes that wait one removes it, and none removes the next owner's file.
    aside = file.with_name(f"{file.name}.{os.getpid()}.unwritten")
    try:
        file.rename(aside)
        if aside.stat().st_ino == state.st_ino:
            aside.unlink()
        else:
            aside.rename(file)
    except OSError:
        return  # another process was first


def _lease(file: Path) -> SoftFileLease:
    """A lease of a lock file, which is not acquired yet."""
    # The lease is shared by the threads of this process, because evaluation and training check the same lock.
    return SoftFileLease(file, lease_duration=LEASE, heartbeat_interval=HEARTBEAT, thread_local=False)


def _file(path: Path) -> Path:
    """The lock file of `path`."""
    return path.with_name(f"{path.name}.lock")


def _is_dead(file: Path) -> bool:
    """Whether filelock would take the lock over at once.

    It is tried on a copy, so that the file itself stays, and another process may take it meanwhile.
    """
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
