"""Downloads public archives, verifies them and unpacks them.

An interrupted transfer is resumed. No member of an archive is written outside of the folder.
"""

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
from urllib.request import HTTPRedirectHandler, Request, build_opener

from harness.api.task import Archive
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.locks import held

CHUNK = 2**20  # bytes
TIMEOUT_S = 60
DEEPEST = 50  # nested folders; removing 1,000 of them would exceed Python's stack
# Errors that are the fault of the disk, not of the archive.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)
TRIES = 5  # broken transfers in a row that brought no byte
PAUSE_S = 0.5  # before the second try; doubled before each further one


def fetch(archive: Archive, folder: Path, keep: bool = False) -> Path:
    """Download and unpack an archive into `folder`; returns the folder of the data set. An existing one is left as it is.

    Args:
        keep: keep the archive itself after unpacking.

    Raises:
        UserError: the transfer breaks TRIES times without progress, the content has another MD5 sum, the disk is full, or
            the archive holds a member that is not allowed.
    """
    root, packed = folder / archive.folder, folder / f"{archive.folder}.tar"
    folder.mkdir(parents=True, exist_ok=True)
    with held(packed, f"the download of {packed}"):
        if root.exists():
            say(f"{root} is there already, nothing was brought; remove it to bring it again")
            return root
        if not (packed.exists() and md5(packed) == archive.md5):
            download(archive.url, packed, "md5", archive.md5)
        _unpack(packed, root)
        if not keep:
            packed.unlink()
    return root


def md5(path: Path) -> str:
    """MD5 sum of a file. Publishers of archives give this sum; it detects broken transfers, not forgeries."""
    return _sum(path, "md5")


def _sum(path: Path, kind: str) -> str:
    """The "md5" or "sha256" sum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def download(url: str, path: Path, kind: str, expected: str) -> str:
    """Download into a `.part` file, resume where an earlier transfer stopped, and rename the file if its sum is right.

    Args:
        kind: of the sum, "md5" or "sha256".
        expected: the sum; empty if it is not known, so that it is not compared.

    Returns:
        the sum.

    Raises:
        UserError: the transfer breaks TRIES times without progress, the address is none, or the content has another sum.
    """
    partial, tries = path.with_name(f"{path.name}.part"), 0
    if not expected:  # nothing would tell whether an earlier transfer was of the same file
        partial.unlink(missing_ok=True)
    while True:
        before = partial.stat().st_size if partial.exists() else 0
        try:
            if _transfer(url, partial, before):
                break
            problem = "the transfer ended before its end"
        except (HTTPError, URLError, HTTPException, TimeoutError, ConnectionError) as error:
            problem = str(getattr(error, "reason", error)) or type(error).__name__
            if isinstance(error, HTTPError) and error.code < 500 and error.code != 429:
                raise UserError(f"{url} answers {error.code} {error.reason}: give another address with --url") from None
        tries = tries + 1 if (partial.stat().st_size if partial.exists() else 0) <= before else 1
        if tries >= TRIES:
            raise UserError(
                f"{url}: {problem}, {TRIES} times; {before / 2**20:.1f} MiB are kept in {partial}: the same command goes "
                "on from there once the network is well"
            )
        say(f"{problem}; going on from {before / 2**20:.1f} MiB")
        time.sleep(min(PAUSE_S * 2.0**tries, 30))
    actual = _sum(partial, kind)
    if expected and actual != expected:
        partial.unlink()
        raise UserError(
            f"{url}: {kind.upper()} sum {actual}, expected {expected}: the transfer was removed; ask again, or give another "
            "address with --url"
        )
    partial.replace(path)
    return actual


def _transfer(url: str, partial: Path, start: int) -> bool:
    """Append to `partial` from byte `start`. Returns whether the end was reached."""
    _check_address(url)
    request = Request(url, headers={"Range": f"bytes={start}-"} if start else {})
    try:
        response: Any = build_opener(_WebOnly).open(request, timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code == 416 and start:  # the server has no more bytes to send
            return True
        raise
    except ValueError as error:  # urllib reads the address of a redirection before it asks what to do with it
        raise UserError(
            f"{url} leads on to another address, which is none ({error}): give another address with --url"
        ) from None
    with response:
        resumed = response.status == 206
        received = start if resumed else 0
        length = response.headers.get("Content-Length") or ""
        # A server that states no length, or nonsense, may send without end; the disk is the bound then.
        expected = received + int(length) if length.isascii() and length.isdecimal() and len(length) < 19 else None
        free = shutil.disk_usage(partial.parent).free
        if expected is not None and expected - received > free:
            raise UserError(
                f"{partial.parent}: {expected / 2**30:.1f} GiB come, {free / 2**30:.1f} GiB are free: make room"
            )
        with partial.open("ab" if resumed else "wb") as file, progress(None, "fetch", total=expected) as bar:
            bar.update(received)
            while chunk := response.read(CHUNK):
                file.write(chunk)
                received += len(chunk)
                bar.update(len(chunk))
                if expected is None and received > 0.9 * free:
                    raise UserError(
                        f"{url} sends {received / 2**30:.1f} GiB and more, and says no length: make room, or look there"
                    )
    return expected is None or received >= expected


def _check_address(url: str) -> None:
    """Raises UserError for an address that is none, or not of the web."""
    try:
        url.encode("ascii")
        valid = url.startswith(("https://", "http://")) and urlsplit(url).port != 0 and bool(urlsplit(url).hostname)
    except ValueError:
        valid = False
    if not valid:
        raise UserError(f"{url} is no address that is fetched: give one that begins with https:// or http://")


class _WebOnly(HTTPRedirectHandler):
    """Follows redirections to addresses of the web only; urllib would follow them to ftp, too."""

    def redirect_request(self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Request | None:
        """The next request. Raises UserError if it leads elsewhere."""
        try:
            _check_address(newurl)
        except UserError as error:
            raise UserError(f"{req.full_url} leads on to another address, and {error}") from None
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _unpack(packed: Path, root: Path) -> None:
    """Unpack into a temporary folder beside `root`, which is renamed to `root` when everything is unpacked."""
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".unpack-") as partial:
        try:
            # The published archives are not compressed; an archive without compression cannot expand.
            with tarfile.open(packed, "r:") as tar:
                for member in progress(_members(packed, tar, root), "unpack"):
                    tar.extract(member, partial, filter="data")
        except UserError:
            raise
        # A damaged archive makes tarfile raise nearly any exception. Only errors of the disk are not its fault.
        except Exception as error:
            if isinstance(error, OSError) and error.errno in DISK:
                raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{packed} cannot be unpacked ({type(error).__name__}: {reason}): remove it and ask again"
            ) from None
        if not (Path(partial) / root.name).is_dir():
            raise UserError(f"{packed} does not hold the folder {root.name}: is this another archive?")
        (Path(partial) / root.name).replace(root)


def _members(packed: Path, tar: tarfile.TarFile, root: Path) -> Iterator[tarfile.TarInfo]:
    """The plain files and folders in the folder of the data set. The `._` files of macOS are left out.

    Raises:
        UserError: another member (a path that leads out of the folder, a link, a device), or more bytes than the disk has.
    """
    free = shutil.disk_usage(root.parent).free
    unpacked_bytes = 0
    for member in tar:
        path = PurePosixPath(member.name)
        if any(name.startswith("._") for name in path.parts) or path.name == ".DS_Store":
            continue
        parts = [name for name in path.parts if name != "."]
        if not parts:
            continue
        allowed = parts[0] == root.name and ".." not in parts and not path.is_absolute() and len(parts) <= DEEPEST
        if not allowed or not (member.isdir() or (member.isfile() and len(parts) > 1)):
            raise UserError(
                f"{packed}: member {member.name[:200]!r} is no plain file or folder below {root.name}: nothing of the "
                "archive was kept; it is not the published one"
            )
        unpacked_bytes += member.size
        if unpacked_bytes > free:
            raise UserError(f"{packed} unpacks to more than the {free / 2**30:.1f} GiB that are free: make room")
        yield member
