"""Public archives: downloaded with resuming, verified, and unpacked without letting any path out of the folder."""

import errno
import hashlib
import shutil
import tarfile
import tempfile
import time
from collections.abc import Iterator
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlsplit
from urllib.request import Request, urlopen

from harness.api.task import Archive
from harness.system.console import progress, say
from harness.system.errors import UserError

CHUNK = 2**20
TIMEOUT_S = 60
DEEPEST = 50  # folders in each other; removing 1,000 would exceed Python's stack
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
TRIES = 5  # broken transfers in a row without a byte in between


def fetch(archive: Archive, folder: Path, keep: bool = False) -> Path:
    """Bring an archive's data set into `folder`; what is there already is not brought again.

    Args:
        keep: keep the archive itself after unpacking.

    Raises:
        UserError: the transfer breaks again and again, the content is not what the MD5 sum says, the disk is full, or
            the archive holds something that it may not.
    """
    place = folder / archive.folder
    if place.exists():
        say(f"{place} is there already, nothing was brought; remove it to bring it again")
        return place
    folder.mkdir(parents=True, exist_ok=True)
    packed = folder / f"{archive.folder}.tar"
    if not (packed.exists() and md5(packed) == archive.md5):
        _download(archive, packed)
    _unpack(packed, place)
    if not keep:
        packed.unlink()
    return place


def md5(path: Path) -> str:
    """MD5 sum of a file, which is what is published; it tells broken transfers, not forgeries."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _download(archive: Archive, packed: Path) -> None:
    """Into a `.part` file, from where an earlier transfer stopped; renamed once its sum is right."""
    part, tries = packed.with_name(f"{packed.name}.part"), 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            if _transfer(archive.url, part, before):
                break
            problem = "the transfer ended before its end"
        except (HTTPError, URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(error, HTTPError) and error.code < 500 and error.code != 429:
                raise UserError(
                    f"{archive.url} answers {error.code} {error.reason}: give another address with --url"
                ) from None
        tries = tries + 1 if (part.stat().st_size if part.exists() else 0) <= before else 1
        if tries >= TRIES:
            raise UserError(
                f"{archive.url}: {problem}, {TRIES} times; {before / 2**20:.1f} MiB are kept in {part}: the same command goes "
                "on from there once the network is well"
            )
        say(f"{problem}; going on from {before / 2**20:.1f} MiB")
        time.sleep(min(2.0**tries, 30) / 10)
    found = md5(part)
    if found != archive.md5:
        part.unlink()
        raise UserError(
            f"{archive.url}: MD5 sum {found}, expected {archive.md5}: the transfer was removed; ask again, or give another "
            "address with --url"
        )
    part.replace(packed)


def _transfer(url: str, part: Path, start: int) -> bool:
    """Append to `part` from byte `start`; whether the end was reached."""
    try:
        url.encode("ascii")
        good = url.startswith(("https://", "http://")) and urlsplit(url).port != 0 and bool(urlsplit(url).hostname)
    except ValueError:
        good = False
    if not good:
        raise UserError(f"{url} is no address that is fetched: give one that begins with https:// or http://")
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        answer: Any = urlopen(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and start:  # nothing is left to send
            return True
        raise
    with answer:
        resumed = answer.status == 206
        done = start if resumed else 0
        length = answer.headers.get("Content-Length")
        total = done + int(length) if length is not None else None
        if total is not None and total - done > (free := shutil.disk_usage(part.parent).free):
            raise UserError(f"{part.parent}: {total / 2**30:.1f} GiB come, {free / 2**30:.1f} GiB are free: make room")
        with part.open("ab" if resumed else "wb") as file, progress(None, "fetch", total=total) as bar:
            bar.update(done)
            while chunk := answer.read(CHUNK):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
    return total is None or done >= total


def _unpack(packed: Path, place: Path) -> None:
    """Into a folder beside `place`, which takes its name once everything is out."""
    with tempfile.TemporaryDirectory(dir=place.parent, prefix=".unpack-") as partial:
        try:
            # What is published is not compressed, and what is not cannot expand.
            with tarfile.open(packed, "r:") as tar:
                for member in progress(_members(packed, tar, place), "unpack"):
                    tar.extract(member, partial, filter="data")
        except UserError:
            raise
        # Foreign bytes make the reader raise nearly anything; only what the disk refuses is not the archive's fault.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{packed} cannot be unpacked ({type(error).__name__}: {reason}): remove it and ask again"
            ) from None
        if not (Path(partial) / place.name).is_dir():
            raise UserError(f"{packed} does not hold the folder {place.name}: is this another archive?")
        (Path(partial) / place.name).replace(place)


def _members(packed: Path, tar: tarfile.TarFile, place: Path) -> Iterator[tarfile.TarInfo]:
    """Plain files and folders below the data set's own name; macOS' `._` shadows are left out.

    Raises:
        UserError: any other member: a path that leads out, a link, a device, or more bytes than the disk has.
    """
    free = shutil.disk_usage(place.parent).free
    total = 0
    for member in tar:
        path = PurePosixPath(member.name)
        if any(part.startswith("._") for part in path.parts) or path.name == ".DS_Store":
            continue
        parts = [part for part in path.parts if part != "."]
        if not parts:
            continue
        below = parts[0] == place.name and ".." not in parts and not path.is_absolute() and len(parts) <= DEEPEST
        if not below or not (member.isdir() or (member.isfile() and len(parts) > 1)):
            raise UserError(
                f"{packed}: member {member.name[:200]!r} is no plain file or folder below {place.name}: nothing of the "
                "archive was kept; it is not the published one"
            )
        total += member.size
        if total > free:
            raise UserError(f"{packed} unpacks to more than the {free / 2**30:.1f} GiB that are free: make room")
        yield member
