"""Locks that hold between processes and hosts, on network file systems too: files with an owner and a heartbeat.

`flock` is not relied on: network file systems have it in many ways, or not at all. A lock is the file `NAME.lock.N`, made
exclusively, whose owner keeps touching it. An owner is dead when its process is gone (on the same host) or when the file
has not been touched for `STALE` seconds (elsewhere). Whoever finds it dead makes `NAME.lock.N+1`, which again only one
can: there is never a moment in which a file that somebody else has just taken is removed.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import psutil

from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import find_below, read_json

HEARTBEAT = 10.0  # seconds between an owner's signs of life
STALE = 120.0  # seconds without one, after which an owner on another host counts as dead
POLL = 0.5


@dataclass(frozen=True)
class Owner:
    """Who holds a lock. `process` tells processes apart whose number was given out twice, `place` containers of one name."""

    host: str
    place: str
    pid: int
    process: str
    since: float
    token: str

    @classmethod
    def here(cls) -> "Owner":
        """This process."""
        return cls(socket.gethostname(), _place(), os.getpid(), _process(os.getpid()), time.time(), uuid4().hex)

    @classmethod
    def read(cls, path: Path) -> "Owner | None":
        """The owner in a lock file; None where it is being written, was cut short, or is gone."""
        found = read_json(path)
        try:
            return cls(**found)
        except TypeError:
            return None

    @property
    def local(self) -> bool:
        """Whether it is a process of this host, which alone can tell whether it lives."""
        return (self.host, self.place) == (socket.gethostname(), _place())

    def __str__(self) -> str:
        return (
            f"process {self.pid} on {self.host}, since {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(self.since))}"
        )


class LostLockError(UserError):
    """Somebody else has taken over what this process was computing."""


class Lock:
    """A lock that this process holds.

    Attributes:
        lost: whether another process has taken it, because this one gave no sign of life for too long.
    """

    def __init__(self, path: Path, number: int, owner: Owner) -> None:
        self.path, self.number, self.owner, self.lost = path, number, owner, False
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lock {path.name}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises LostLockError where another process has taken over."""
        if self.lost:
            raise LostLockError(
                f"another process has taken over {self.path.name}, since this one gave no sign of life for {STALE:.0f} s: "
                "ask again for its result"
            )

    def release(self) -> None:
        """Let the next one in."""
        self._ended.set()
        self._thread.join()
        if self.lost:
            return
        # The older ones first: where there is any, the newest is there.
        try:
            for number, path in sorted(_files(self.path).items()):
                if number <= self.number:
                    path.unlink(missing_ok=True)
        except OSError as error:
            # A disk that has become read-only, say: what ends the run is of more interest, and the dead are followed.
            say(f"{self.path}.lock cannot be removed ({error.strerror}): the next process finds its owner gone")

    def _beat(self) -> None:
        mine = _numbered(self.path, self.number)
        while not self._ended.wait(HEARTBEAT):
            try:
                owner = Owner.read(mine)
                if max(_files(self.path), default=0) > self.number or (owner and owner.token != self.owner.token):
                    self.lost = True
                    return
                os.utime(mine)
            except FileNotFoundError:
                self.lost = True
                return
            except OSError:
                continue  # a file system that is away for a while; if it is too long, others take over


def acquire(path: Path) -> tuple[Lock | None, Owner | None]:
    """The lock at `path`, or whoever holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    files = _files(path)
    newest = max(files, default=0)
    if newest:
        owner, dead = _state(files[newest])
        if not dead:
            return None, owner
    me = Owner.here()
    if not _create(_numbered(path, newest + 1), me):
        return None, Owner.read(_numbered(path, newest + 1))
    # Between the look and the making, the dead one's lock may have been taken over and released by somebody else, and a
    # third may hold a new one.
    now = _files(path)
    others = set(now) - {newest + 1}
    if max(others, default=0) > newest + 1 or (newest and newest not in now) or (not newest and others):
        _numbered(path, newest + 1).unlink(missing_ok=True)
        return None, Owner.read(now[max(others)]) if others else None
    return Lock(path, newest + 1, me), None


@contextmanager
def held(path: Path, what: str) -> Iterator[Lock]:
    """The lock at `path`, waited for if need be; `what` is said to be computed elsewhere meanwhile."""
    told = None
    while True:
        lock, owner = acquire(path)
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


def dead_locks(folder: Path) -> list[Path]:
    """Lock files below a folder whose owners are dead."""
    return [path for path in find_below(folder, "*.lock.*") if path.suffix[1:].isdecimal() and _state(path)[1]]


def holders(folder: Path) -> list[tuple[Path, Owner]]:
    """Lock files below a folder, and who holds them."""
    found = []
    for path in find_below(folder, "*.lock.*"):
        owner, dead = _state(path)
        if owner is not None and not dead:
            found.append((path, owner))
    return found


def _state(path: Path) -> tuple[Owner | None, bool]:
    """The owner of a lock file, and whether it is dead."""
    owner = Owner.read(path)
    try:
        silent = _now(path.parent) - path.stat().st_mtime
    except OSError:
        return None, False  # released meanwhile
    if owner is not None and owner.local:
        return owner, _process(owner.pid) != owner.process
    return owner, silent > STALE


def _now(folder: Path) -> float:
    """The time by the clock of the file system, which touches the locks; hosts' own clocks differ."""
    probe = folder / f".clock-{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}"
    try:
        probe.touch()
        return probe.stat().st_mtime
    except OSError:
        return time.time()
    finally:
        probe.unlink(missing_ok=True)


def _create(path: Path, owner: Owner) -> bool:
    try:
        file = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        os.write(file, json.dumps(owner.__dict__).encode())
        os.fsync(file)
    finally:
        os.close(file)
    return True


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.lock.{number}")


def _files(path: Path) -> dict[int, Path]:
    """The lock's files by number."""
    pattern = re.compile(rf"{re.escape(path.name)}\.lock\.(\d+)")
    try:
        names = [each.name for each in path.parent.iterdir()]
    except FileNotFoundError:
        return {}
    matches = [(pattern.fullmatch(name), name) for name in names]
    return {int(match[1]): path.parent / name for match, name in matches if match}


def _place() -> str:
    """Which table of processes this is: two containers may have one host name."""
    try:
        return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115
    except OSError:
        return ""


def _process(pid: int) -> str:
    """When a process was started, as the kernel says; empty where there is no such process."""
    try:
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.Error:
        return ""
