"""Small file operations that the whole harness uses: digests, atomic writes and safe names."""

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
"""The folder `harness/`. The results of a run depend on every file in it."""

LINEAGE = ".lineage.safetensors"
"""Ending of the file beside a file of weights that says what they were trained on, see `harness.training.lineage`."""


def digest(value: Any) -> str:
    """Digest of a value, independent of the order of keys in it: 32 hexadecimal digits of BLAKE2b.

    The value is written as JSON; objects that JSON cannot represent enter as text.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.blake2b(text.encode(errors="surrogateescape"), digest_size=16).hexdigest()


def digest_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """Digest of bytes that are given in chunks: 32 hexadecimal digits of BLAKE2b."""
    state = hashlib.blake2b(digest_size=16)
    for chunk in chunks:
        state.update(chunk)
    return state.hexdigest()


def seed_from(text: str, size: int) -> int:
    """A seed for a random generator: a whole number of `size` bytes that depends on the text only."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=size).digest(), "big")


def digest_file(path: Path) -> str:
    """Digest of the content of a file: 32 hexadecimal digits of BLAKE2b."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def digest_tree(root: Path) -> str:
    """Digest of the names, sizes and modification times of all files below `root`, to detect changes at low cost."""
    entries = []
    for path in walk(root):
        try:
            status = os.stat(path)  # noqa: PTH116
        except OSError:
            status = os.lstat(path)  # a dangling link has a status of its own only
        entries.append((path, status.st_size, status.st_mtime_ns))
    return digest(sorted(entries))


def walk(root: Path) -> Iterator[str]:
    """Paths of all files below a folder, except those in `__pycache__`.

    Links are followed, because data on clusters often lies behind them. Each folder is visited once.
    """
    seen = set()
    for folder, subfolders, names in os.walk(root, followlinks=True):
        real_folder = os.path.realpath(folder)
        if real_folder in seen:
            subfolders.clear()  # reached again through a link, perhaps from inside itself
            continue
        seen.add(real_folder)
        subfolders[:] = [name for name in subfolders if name != "__pycache__"]
        for name in names:
            # A tree may hold 100,000 files, for which pathlib is slow.
            yield os.path.join(folder, name)  # noqa: PTH118


def find_below(folder: Path, *patterns: str) -> list[Path]:
    """Files and folders below a folder whose names match one of the patterns, sorted.

    Entries that vanish during the search are left out, without an error.
    """
    paths = []
    for parent, folders, names in os.walk(folder):
        paths += [Path(parent) / name for name in (*folders, *names) if any(fnmatch(name, each) for each in patterns)]
    return sorted(paths)


def write_atomic(path: Path, *content: str | bytes | memoryview) -> None:
    """Write a file so that a reader sees all of its content or none of it, even after a power cut.

    The content goes to a temporary file, which is flushed to the disk and then renamed. The folder is made if it does not
    exist.

    Args:
        path: the file to write.
        content: the chunks of the file, in their order; text is encoded as UTF-8.

    Raises:
        OSError: the file was not written; it is as it was before, and the temporary file is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{threading.get_ident()}.partial")
    try:
        with partial.open("wb") as file:
            for chunk in content:
                file.write(chunk.encode() if isinstance(chunk, str) else chunk)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a failed write itself names no file
        raise


def read_json(path: Path) -> Any:
    """The content of a JSON file; None if it does not exist, cannot be read, or is not JSON."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return None


def check_name(name: str) -> str:
    """Check the name of a case, which becomes a file name and a table cell, and return it.

    Raises:
        UserError: the name is empty, begins with a dot, is longer than 200 bytes of UTF-8 or cannot be written as UTF-8, has
            a slash or a backslash, which could lead to another folder, or a character that cannot be printed, as records refuse.
    """
    try:
        valid = 0 < len(name.encode()) <= 200
    except UnicodeEncodeError:
        valid = False
    if not valid or name.startswith(".") or "/" in name or "\\" in name or not name.isprintable():
        raise UserError(
            f"a case is named {printable(name)[:80]!a}: names have 1 to 200 bytes of UTF-8, do not begin with a dot and "
            "have no slash, backslash or character that cannot be printed: rename it"
        )
    return name


def printable(text: str) -> str:
    """The text as one line that any stream can print. Bytes of a file name that are not UTF-8 become backslash escapes."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


def expand(name: str) -> Path:
    """A path in which `~` is replaced by the home folder. Raises UserError if `~USER` names an unknown user."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: {error} Write the folder out") from None


def is_folder(path: Path) -> bool:
    """Whether the folder exists. It is False for a name that no file can have, for which pathlib would raise."""
    return os.path.isdir(path)  # noqa: PTH112


def slug(text: str) -> str:
    """Turn text into a name of lower-case letters, digits and underscores; `unnamed` if none of its characters fit."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def file_size(path: Path) -> int:
    """Size in bytes of a regular file that can be opened and is not empty.

    Raises:
        UserError: the file is missing, a dangling link, a folder, a device or empty, or its permissions forbid reading.
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


def disguise(path: Path) -> str:
    """What a file is that is not what its name says, and what to do; empty if its first bytes tell nothing.

    Failed downloads leave web pages and Git LFS pointers under the names of images and weights.
    """
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError:
        return ""
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n")[:40].lower()
    if head.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS, not the file itself: run `git lfs pull` where it comes from"
    if start.startswith((b"<!doctype html", b"<html", b"<?xml")):
        return "a web page, as a failed download leaves it: download the file again"
    if head[128:132] == b"DICM":
        return "a DICOM file: convert the series to NIfTI, for instance with dcm2niix"
    if head.startswith(b"\x1f\x8b") and path.suffix == ".nii":
        return "compressed with gzip: name it .nii.gz"
    if path.name.endswith(".nii.gz") and (head[:4] in NIFTI_SIZES or head[344:348] in (b"n+1\0", b"ni1\0")):
        return "not compressed: name it .nii"
    if head.startswith(b"PK\x03\x04") and path.suffix not in (".pt", ".pth", ".ckpt", ".bin"):
        return "a zip archive: unpack it"
    return ""


NIFTI_SIZES = tuple(size.to_bytes(4, order) for size in (348, 540) for order in ("little", "big"))
"""The first four bytes of a NIfTI file that is not compressed: the size of its header."""
