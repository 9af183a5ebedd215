"""Small file operations that everything on disk goes through: digests, atomic writes, safe names."""

import hashlib
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

from harness.errors import UserError


def digest(value: Any) -> str:
    """Digest of anything that JSON can hold; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def digest_file(path: Path) -> str:
    """Digest of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_tree(root: Path) -> str:
    """Digest of names, sizes and times of all files below `root`: cheap, tells whether anything changed."""
    found = []
    for folder, below, names in os.walk(root):
        below[:] = [name for name in below if name != "__pycache__"]
        for name in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - a tree may hold 100,000 files
            status = os.lstat(path)  # a dangling link has no other; the change that matters is seen when it is read
            found.append((path, status.st_size, status.st_mtime_ns))
    return digest(sorted(found))


def write_atomic(path: Path, text: str) -> None:
    """Write by rename, so that a reader sees all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(text)
    partial.replace(path)


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
