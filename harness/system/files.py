"""Small file operations that everything on disk goes through: digests, atomic writes, safe names."""

import hashlib
import json
import os
import re
import socket
import stat
import threading
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from harness.system.errors import UserError

ENGINE = Path(__file__).resolve().parents[1]
"""The folder `harness/`: results depend on everything in it."""


def digest(value: Any) -> str:
    """Digest of anything that JSON can hold; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def digest_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Digest of bytes that come in parts."""
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def seed_from(text: str, size: int) -> int:
    """A whole number of `size` bytes that the text determines: a seed for a generator."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


def digest_file(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_tree(root: Path) -> str:
    """Digest of names, sizes and times of all files below `root`: cheap, tells whether anything changed."""
    found = []
    for path in walk(root):
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            status = os.lstat(path)  # a dangling link has no other
        found.append((path, status.st_size, status.st_mtime_ns))
    return digest(sorted(found))


def walk(root: Path) -> Iterator[str]:
    """Paths of all files below a folder, through links (data on clusters often lies behind them), each folder once."""
    seen = set()
    for folder, below, names in os.walk(root, followlinks=True):
        here = os.path.realpath(folder)
        if here in seen:
            below.clear()  # a link to a folder above it
            continue
        seen.add(here)
        below[:] = [name for name in below if name != "__pycache__"]
        for name in names:
            yield os.path.join(folder, name)  # noqa: PTH118 - a tree may hold 100,000 files


def find_below(folder: Path, *patterns: str) -> list[Path]:
    """Files and folders below a folder whose names match a pattern; what vanishes meanwhile is not there."""
    found = []
    for place, folders, names in os.walk(folder):
        found += [Path(place) / name for name in (*folders, *names) if any(fnmatch(name, each) for each in patterns)]
    return sorted(found)


def write_atomic(path: Path, *content: str | bytes | memoryview) -> None:
    """Write by rename, and onto the disk before it, so that a reader sees all of it or nothing, after a power cut too.

    Raises:
        OSError: nothing was written, and nothing is left of the attempt.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            for part in content:
                file.write(part.encode() if isinstance(part, str) else part)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file; None where it cannot be read as one."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def check_name(name: str) -> str:
    """A case's name, which becomes a file's name and a cell of tables.

    Raises:
        UserError: it is empty, hidden, too long, no UTF-8, or has a slash or another character that leads elsewhere.
    """
    try:
        short = 0 < len(name.encode()) <= 200
    except UnicodeEncodeError:
        short = False
    if not short or name.startswith(".") or any(character in name for character in "/\\\0"):
        raise UserError(
            f"a case is named {printable(name)[:80]!r}: names have 1 to 200 bytes of UTF-8, do not begin with a dot and have no "
            "slash or backslash: rename it"
        )
    return name


def printable(text: str) -> str:
    """One line of text that any stream can print: bytes of a file's name that are no UTF-8 are written as escapes."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def expand(name: str) -> Path:
    """A path with `~` put in. Raises UserError where there is no such user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error} Write the folder out") from None


def is_folder(path: Path) -> bool:
    """Whether a folder is there; not where no file can have such a name, for which pathlib raises."""
    return os.path.isdir(path)  # noqa: PTH112


def slug(text: str) -> str:
    """Text as a name of small letters, digits and underscores."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def file_size(path: Path) -> int:
    """Size in bytes of a regular file that can be opened.

    Raises:
        UserError: it is missing, a dangling link, a folder or a device, empty, or may not be read.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise UserError(
                f"{path} is a link to {os.readlink(path)}, which does not exist: restore its target"  # noqa: PTH115
            ) from None
        raise UserError(f"{path} is missing: restore it, or take its case out of the data set") from None
    except OSError as error:
        raise UserError(f"{path} cannot be opened: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise UserError(f"{path} is {kind}, where an image file is due: put the file in its place")
    if not os.access(path, os.R_OK):
        raise UserError(f"{path} may not be read: change its permissions (chmod +r)")
    if status.st_size == 0:
        raise UserError(f"{path} cannot be read, it has zero bytes: restore the file")
    return status.st_size
