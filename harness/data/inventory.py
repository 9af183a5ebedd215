"""Opens and checks every case of a data set; digests of the files and signatures of the scans are cached on disk.

`harness.data.duplicates` describes the signatures and recognises scans by them.
"""

import json
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from harness.api.task import Case, ImageSet
from harness.data.arrays import load_array, save_array
from harness.data.cases import case_bytes, load_case, looks_like_labels, num_workers
from harness.data.duplicates import GRID, Signature, signature
from harness.data.image_files import content_files
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.files import digest, digest_file, file_size, read_json, write_atomic

SIGNATURE_VERSION = 5  # version of the cached signatures; raise it when the signature of an image changes


@dataclass(frozen=True)
class Inventory:
    """Digests and signatures of cases, by case id.

    Attributes:
        digests: one per case, of the content of its files.
        signatures: one array (channels, GRID, GRID, GRID) per case.
        bad: the problem of each case that cannot be used; empty unless such cases are to be skipped.
        label_like: cases without a label map whose image looks like one, see `harness.data.cases.looks_like_labels`.
    """

    digests: dict[str, str]
    signatures: dict[str, Signature]
    bad: dict[str, str]
    label_like: list[str] = field(default_factory=list)


def take_inventory(images: ImageSet, cases: Sequence[Case], cache: Path, skip_bad: bool = False) -> Inventory:
    """Open and check every case, and compute its digest and signature. Cases that are in the cache are not read again.

    Raises:
        UserError: a case cannot be used and `skip_bad` is false, or two cases have the same name.
    """
    inventory = Inventory({}, {}, {})
    folder = cache / "signatures"
    folder.mkdir(parents=True, exist_ok=True)
    digests, unreadable = digest_cases(cases, cache)
    if unreadable and not skip_bad:
        raise UserError(next(iter(unreadable.values())))
    inventory.digests.update(digests)
    inventory.bad.update(unreadable)
    readable = [case for case in cases if case.id in inventory.digests]
    compute = partial(_cached_signature, images, folder, inventory.digests, skip_bad)
    uncached = [case for case in readable if not _signature_path(images, folder, inventory.digests, case).exists()]
    largest = max(map(case_bytes, uncached), default=1)
    with ThreadPoolExecutor(num_workers(largest, len(readable))) as pool:
        for case, signature in zip(
            readable, progress(pool.map(compute, readable), "inventory", total=len(readable)), strict=True
        ):
            if isinstance(signature, UserError):
                inventory.bad[case.id] = str(signature)
                del inventory.digests[case.id]
            else:
                inventory.signatures[case.id] = signature
                if _label_mark(_signature_path(images, folder, inventory.digests, case)).exists():
                    inventory.label_like.append(case.id)
    return inventory


def digest_cases(cases: Sequence[Case], cache: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Digests of the cases' files, and problems of the files that cannot be read; both by case id.

    The digests are cached: a file whose path, size and time of modification are the same is not read again.

    Raises:
        UserError: two cases have the same id.
    """
    cache_file = cache / "digests.json"
    cached = read_json(cache_file) if cache_file.exists() else {}
    if not isinstance(cached, dict):
        say(f"{cache_file} is damaged: every file is read again")
        cached = {}
    cached_before = len(cached)
    digests: dict[str, str] = {}
    bad: dict[str, str] = {}
    try:
        for case in progress(cases, "fingerprint"):
            if case.id in digests or case.id in bad:
                raise UserError(f"two cases are named {case.id!r} (one is {case.images[0]}): rename one")
            try:
                files = [file for path in case.files for file in content_files(path)]
                digests[case.id] = digest([_digest_of_file(file, cached) for file in files])
            except UserError as error:
                bad[case.id] = str(error)
            except OSError as error:
                bad[case.id] = f"{error.filename} cannot be read: {error.strerror}"
    finally:
        # Written after an interruption too, so that the files read so far are not read again.
        if len(cached) != cached_before:
            write_atomic(cache_file, json.dumps(cached, indent=0))
    return digests, bad


def _digest_of_file(path: Path, cached: dict[str, Any]) -> str:
    """Digest of a file, from `cached` if it did not change; a new digest is added to `cached`."""
    size = file_size(path)
    key = f"{path.resolve()}|{size}|{path.stat().st_mtime_ns}"
    if key not in cached:
        cached[key] = digest_file(path)
    return str(cached[key])


def _signature_path(images: ImageSet, folder: Path, digests: dict[str, str], case: Case) -> Path:
    """The file that holds the signature of a case."""
    # Whether a case passes the checks depends on the data set (channels, labels), so these settings are part of the name.
    settings = [SIGNATURE_VERSION, images.channels, images.labels, case.numbering, type(images.normalisation).__name__]
    return folder / f"{digests[case.id][:20]}-{digest(settings)[:8]}.npy"


def _label_mark(signature_path: Path) -> Path:
    """The empty file that exists if the image of a signature looks like a label map."""
    return signature_path.with_suffix(".label")


def _read_signature(path: Path, channels: int) -> Signature | None:
    """A signature from the cache; None if the file is missing or damaged."""
    try:
        array = load_array(path)
    except (OSError, ValueError, EOFError):
        return None
    return array if array.shape == (channels, GRID, GRID, GRID) and array.dtype == np.int8 else None


def fingerprint(digests: dict[str, str]) -> str:
    """One digest of the content of all cases.

    Args:
        digests: case id -> digest of its files.
    """
    return digest(dict(sorted(digests.items())))


def _cached_signature(
    images: ImageSet, folder: Path, digests: dict[str, str], skip_bad: bool, case: Case
) -> Signature | UserError:
    """The signature of a case, from the cache if it is there; with `skip_bad`, the error of a case that cannot be used."""
    path = _signature_path(images, folder, digests, case)
    cached = _read_signature(path, len(images.channels))
    if cached is not None:
        return cached
    try:
        loaded = load_case(images, case)
    except UserError as error:
        if skip_bad:
            return error
        raise
    computed = np.stack([signature(channel) for channel in loaded.image])
    if loaded.label is None and looks_like_labels(loaded.image):
        _label_mark(path).touch()
    # Two threads may handle two files of the same content, and two processes the same case: each writes a file of its own.
    partial_path = path.with_name(f".{os.getpid()}-{threading.get_ident()}-{path.name}")
    save_array(partial_path, computed)
    partial_path.replace(path)
    return computed
