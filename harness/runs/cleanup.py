"""What a runs folder no longer needs."""

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

OLD = 3600.0  # seconds after which an unfinished file is nobody's


def unfinished(runs: Path) -> list[Path]:
    """Files and folders whose writer is gone."""
    written = find_below(runs, "*.partial", "*.partial.npy", ".partial-*")
    return [path for path in written if _abandoned(path)]


def _abandoned(path: Path) -> bool:
    try:
        age = time.time() - path.lstat().st_mtime
    except OSError:
        return False
    host = f"{socket.gethostname()}-"
    if host in path.name:
        pid = path.name.rpartition(host)[2].split("-")[0].split(".")[0]
        return pid.isdecimal() and not psutil.pid_exists(int(pid))
    return age > OLD


def size_on_disk(path: Path) -> int:
    sizes = 0
    for each in (path, *find_below(path, "*")):
        with suppress(OSError):
            sizes += each.lstat().st_size if each.is_file() else 0
    return sizes


def remove(paths: tuple[Path, ...]) -> None:
    """Remove files and folders, never through a link; of locks those whose owner is gone."""
    for path in paths:
        if path.suffix == ".lock":
            remove_dead(path)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Removable:
    """What a finished stage no longer needs."""

    path: Path
    why: str

    @property
    def size(self) -> int:
        """Bytes."""
        return size_on_disk(self.path)


def removable(runs: Path) -> list[Removable]:
    """Checkpoints of finished stages, and scores that a finished run has put together; nothing that is being computed."""
    busy = {lock.parent for lock, _ in holders(runs)}
    found = []
    finished: list[tuple[str, str, Callable[[Path], Any]]] = [
        ("cache/pretrain/*/checkpoints", "checkpoints of a finished pre-training", lambda p: p.parent / "stage.json"),
        ("*/checkpoints", "checkpoints of a finished fine-tuning", lambda p: p.parent / "finetune.json"),
        ("*/evaluation", "scores of a finished run, which cases.csv has", lambda p: p.parent / "record.json"),
    ]
    for pattern, why, done in finished:
        for path in sorted(runs.glob(pattern)):
            if find_below(path, "*") and not path.is_symlink() and path.parent not in busy and done(path).exists():
                found.append(Removable(path, why))
    return found
