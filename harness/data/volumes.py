"""Preprocessed volumes: canonical orientation, one spacing, cropped, normalised; cached on disk and memory-mapped.

Intensities are stored as int16 in a plain `.npy`, row by row. Crops of 96^3 are read about as fast as from float32, in half
the space, and faster than from blosc2 (`docs/data.md` has the numbers and the command that measured them).
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from harness.api.task import Case, ImageSet
from harness.data.arrays import cut, load_array, random_origin, save_array
from harness.data.cases import case_bytes, load_case, num_workers
from harness.data.geometry import Geometry
from harness.data.image_files import content_files, read_header
from harness.data.preprocessing import STEPS, label_points, preprocess, quantise, steps_of
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.system.files import digest, digest_file, write_atomic
from harness.system.locks import held

FORMAT = 2  # version of the cached volumes; raise it when preprocessing writes something else


@dataclass(frozen=True)
class Volume:
    """One preprocessed case. Its arrays are memory maps, so a crop reads only the pages that it needs.

    Attributes:
        stem: path of its files without their endings.
        steps: of the stored whole numbers, per unit of intensity.
    """

    case: Case
    stem: Path
    steps: int = STEPS

    @property
    def shape(self) -> tuple[int, int, int]:
        """Extent (x, y, z) in voxels."""
        x, y, z = self._stored.shape[1:]
        return x, y, z

    @property
    def image(self) -> NDArray[np.float32]:
        """The whole image (C, x, y, z), in memory."""
        return np.multiply(self._stored, np.float32(1 / self.steps), dtype=np.float32)

    def crop(self, origin: Sequence[int], size: Sequence[int]) -> NDArray[np.float32]:
        """A crop (C, *size) that starts at `origin`, zeros outside of the volume; only the pages of the crop are read."""
        return cut(self._stored, origin, size, scale=1 / self.steps)

    def sample(self, size: tuple[int, int, int], rng: np.random.Generator) -> dict[str, Any]:
        """A random crop: `image` (C, *size), padded with zeros if the volume is smaller."""
        return {"image": self.crop(random_origin(self.shape, size, rng), size)}

    @property
    def label(self) -> NDArray[np.uint8]:
        """The label map (x, y, z), in the task's own label values."""
        mapped: NDArray[np.uint8] = self._load("label", mmap_mode="r")
        return mapped

    @property
    def points(self) -> NDArray[np.int32]:
        """Up to 2000 voxels of each target, in rows of (target number, x, y, z)."""
        rows: NDArray[np.int32] = self._load("points")
        return rows

    @property
    def geometry(self) -> Geometry:
        """Its position in the native grid."""
        return Geometry(**json.loads(self.description.read_text())["geometry"])

    @property
    def description(self) -> Path:
        """The JSON file with geometry, sizes and digests of the arrays. It is written last, when the arrays are complete."""
        return Path(f"{self.stem}.json")

    def is_complete(self, verify: bool) -> bool:
        """Whether all its files exist in full size; with `verify`, also whether their bytes are those that were written."""
        try:
            described = json.loads(self.description.read_text())
            Geometry(**described["geometry"])
            files = described["files"]
            for kind, (size, written) in files.items():
                path = Path(f"{self.stem}.{kind}.npy")
                if path.stat().st_size != size or (verify and digest_file(path) != written):
                    return False
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return False
        return True

    @property
    def _stored(self) -> NDArray[np.int16]:
        """The image as it is stored, (C, x, y, z)."""
        mapped: NDArray[np.int16] = self._load("image", mmap_mode="r")
        return mapped

    def _load(self, kind: str, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
        """One of its arrays. Raises UserError if the file is missing or damaged."""
        path = Path(f"{self.stem}.{kind}.npy")
        try:
            loaded = load_array(path, mmap_mode)
        except FileNotFoundError:
            raise UserError(f"{path} is gone: was the cache removed? Ask again, and it is prepared again") from None
        except (ValueError, EOFError):
            raise UserError(f"{path} is damaged: ask again, and it is prepared again") from None
        return loaded


def volumes_of(images: ImageSet, cases: Sequence[Case], digests: Mapping[str, str], cache: Path) -> list[Volume]:
    """Volumes of `cases`, in their order, with the paths that `preprocess_cases` writes to; the files need not exist."""
    settings = {
        "format": FORMAT,
        "set": images.name,
        "version": images.version,
        "spacing": images.spacing,
        "normalisation": [type(images.normalisation).__name__, asdict(images.normalisation)],
        "targets": list(images.targets.items()),
    }
    folder = cache / "prepared" / f"{images.name}-{digest(settings)[:8]}"
    steps = steps_of(images.normalisation)
    return [Volume(case, folder / digests[case.id][:20], steps) for case in cases]


def preprocess_cases(
    images: ImageSet, cases: Sequence[Case], digests: Mapping[str, str], cache: Path, verify: bool = False
) -> list[Volume]:
    """Preprocess `cases`, and return their volumes in the same order. Volumes that are in the cache are not made again.

    The key of the cache consists of the settings that volumes depend on (version, spacing, intensities, targets) and of
    the content of the case's files. With `verify`, the bytes of the cached volumes are compared with their digests.

    Raises:
        UserError: as `harness.data.cases.load_case`; an image has no contrast; or the disk cannot hold the volumes. All
            other cases are preprocessed and stay in the cache.
    """
    if not cases:
        return []
    volumes = volumes_of(images, cases, digests, cache)
    folder = volumes[0].stem.parent
    folder.mkdir(parents=True, exist_ok=True)
    if _missing(volumes, verify):
        # Of processes that start together, one preprocesses; the others wait here and then find its volumes.
        with held(folder / "prepare", f"the prepared volumes of {images.name!r}"):
            missing = _missing(volumes, verify)
            broken = sum(volume.description.exists() for volume in missing)
            if broken:
                say(f"{broken} volumes in {folder} are not as they were written: they are prepared again")
            _preprocess_missing(images, missing, folder)
    return volumes


def _missing(volumes: Sequence[Volume], verify: bool) -> list[Volume]:
    """The volumes whose files are missing or damaged, each stem once."""
    complete = verify_volumes(volumes) if verify else [volume.is_complete(verify=False) for volume in volumes]
    return list({volume.stem: volume for volume, whole in zip(volumes, complete, strict=True) if not whole}.values())


def verify_volumes(volumes: Sequence[Volume]) -> list[bool]:
    """Whether each volume still has the bytes that were written."""
    with ThreadPoolExecutor() as pool:
        return list(
            progress(pool.map(lambda volume: volume.is_complete(verify=True), volumes), "verify", total=len(volumes))
        )


def _preprocess_missing(images: ImageSet, missing: Sequence[Volume], folder: Path) -> None:
    """Preprocess several cases in threads. Raises UserError if the disk is too small, or with the first problem of a case."""
    if not missing:
        return
    size, largest = space_needed(images, missing)
    free = shutil.disk_usage(folder).free
    if size > free:
        raise UserError(
            f"preparing {len(missing)} cases of {images.name!r} takes up to {size / 2**30:.2f} GiB in {folder}, "
            f"{free / 2**30:.2f} GiB are free: make room, or give another folder with --runs or HARNESS_RUNS"
        )
    problems = []

    def attempt(volume: Volume) -> str | None:
        """Preprocess a case; returns its problem, or None."""
        try:
            _preprocess_case(images, volume)
        except UserError as error:
            return str(error)
        return None

    # Decompression and matrix products, which take most of the time, release the GIL, so threads use all cores.
    with ThreadPoolExecutor(num_workers(largest, len(missing))) as pool:
        for problem in progress(pool.map(attempt, missing), "prepare", total=len(missing)):
            problems += [problem] if problem else []
    if problems:
        others = f" ({len(problems) - 1} more cases have a problem: `harness data check`)" if len(problems) > 1 else ""
        raise UserError(problems[0] + others)


def space_needed(images: ImageSet, volumes: Sequence[Volume]) -> tuple[int, int]:
    """Bytes on disk that the volumes take at most, and bytes of memory for the largest case.

    The numbers are upper bounds because the box of the foreground is not known yet.
    """
    disk, largest = 0, 1
    for volume in volumes:
        try:
            headers = [read_header(path) for path in volume.case.images]
        except UserError:
            continue  # the problem is reported when the case is preprocessed
        shape, spacing = headers[0].shape[:3], headers[0].spacing
        channels = len(images.channels)
        target = sorted(spacing) if images.spacing is None else sorted(images.spacing)
        voxels = prod(shape) * prod(spacing) / prod(target)
        disk += int(voxels * (2 * channels + bool(volume.case.label))) + 65536
        largest = max(largest, case_bytes(volume.case, voxels))
    return disk, largest


def check_unchanged(volume: Volume) -> None:
    """Raises UserError if the files of a case do not have the content any more that its volume is named after."""
    try:
        now = digest([digest_file(file) for path in volume.case.files for file in content_files(path)])
    except OSError as error:
        raise UserError(
            f"{error.filename} cannot be read any more ({error.strerror}): restore it and ask again"
        ) from None
    if now[: len(volume.stem.name)] != volume.stem.name:
        raise UserError(
            f"a file of case {volume.case.id!r} was changed while it was worked on "
            f"({', '.join(map(str, volume.case.files))}): ask again, and it is taken as it is now"
        )


def _preprocess_case(images: ImageSet, volume: Volume) -> None:
    """Preprocess one case and write its files, the description last."""
    loaded = load_case(images, volume.case)
    check_unchanged(volume)
    image, label, geometry = preprocess(images, loaded, str(volume.case.images[0]))
    arrays: dict[str, NDArray[Any]] = {"image": quantise(image, volume.steps)}
    if label is not None:
        arrays |= {"label": label, "points": label_points(images, label)}
    files = {}
    for kind, array in arrays.items():
        partial_path = Path(f"{volume.stem}.{os.getpid()}.{kind}.partial.npy")
        save_array(partial_path, array)
        files[kind] = (partial_path.stat().st_size, digest_file(partial_path))
        partial_path.replace(f"{volume.stem}.{kind}.npy")
    write_atomic(volume.description, json.dumps({"geometry": asdict(geometry), "files": files}))
