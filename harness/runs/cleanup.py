"""Finds and removes files that a runs folder no longer needs."""

import shutil
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from harness.system.files import find_below
from harness.system.locks import holders, remove_dead

OLD = 3600.0  # age in seconds from which an unfinished file of another host counts as abandoned


def unfinished(runs: Path) -> list[Path]:
    """Unfinished files and folders whose writing process is gone."""
    written = find_below(runs, "*.partial", "*.partial.npy", ".partial-*")
    return [path for path in written if _abandoned(path)]


def _abandoned(path: Path) -> bool:
    """Whether the process that wrote a file is gone. On another host this is judged by the file's age."""
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:
        return False
    # Names end in `.HOST-PID-THREAD.partial`, as `write_atomic` makes them; the dot keeps `node1` apart from `gpunode1`.
    host = f".{socket.gethostname()}-"
    if host in path.name:
        pid = path.name.rpartition(host)[2].split("-")[0].split(".")[0]
        return pid.isdecimal() and not psutil.pid_exists(int(pid))
    return age > OLD


def size_on_disk(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    size = 0
    for file in (path, *find_below(path, "*")):
        with suppress(OSError):
            size += file.lstat().st_size if file.is_file() else 0
    return size


def remove(paths: tuple[Path, ...]) -> None:
    """Remove files and folders. Links are not followed, and a lock is removed only if its owner is gone."""
    for path in paths:
        if path.suffix == ".lock":
            remove_dead(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Removable:
    """A file or folder that a finished stage no longer needs, and the reason."""

    path: Path
    why: str

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return size_on_disk(self.path)


def removable(runs: Path) -> list[Removable]:
    """Checkpoints of finished stages, and per-case scores of finished runs. Runs that are being computed are left out."""
    busy = {lock.parent for lock, _ in holders(runs)}
    removables = []
    candidates: list[tuple[str, str, Callable[[Path], Any]]] = [
        ("cache/pretrain/*/checkpoints", "checkpoints of a finished pre-training", lambda p: p.parent / "stage.json"),
        ("*/checkpoints", "checkpoints of a finished fine-tuning", lambda p: p.parent / "finetune.json"),
        ("*/evaluation", "scores of a finished run, which cases.csv has", lambda p: p.parent / "record.json"),
    ]
    for pattern, why, done in candidates:
        for path in sorted(runs.glob(pattern)):
            if find_below(path, "*") and not path.is_symlink() and path.parent not in busy and done(path).exists():
                removables.append(Removable(path, why))
    return removables
