"""Prepared volumes: canonical orientation, one spacing, cropped, normalised, memory-mapped; made once, cached on disk."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from harness.arrays import cut, random_origin
from harness.errors import UserError
from harness.files import digest, digest_file, write_atomic
from harness.images import Loaded, load_case
from harness.progress import progress
from harness.task import Case, Percentiles, Task, Window

PREPARED = 1  # raise it when preparing changes what it writes
POINTS_PER_TARGET = 2000


@dataclass(frozen=True)
class Geometry:
    """How a prepared volume lies in its native grid, so that predictions can go back.

    Attributes:
        shape, affine: of the native grid.
        box: the foreground, (start, stop) per axis of the canonical (RAS) grid.
        spacing: of the prepared volume in mm, along the canonical axes.
    """

    shape: tuple[int, int, int]
    affine: list[list[float]]
    box: tuple[tuple[int, int], ...]
    spacing: tuple[float, float, float]

    def to_native(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        """Channels on the prepared grid (O, x, y, z) -> on the native grid; outside the foreground all are 0."""
        affine = np.asarray(self.affine)
        to_canonical = nib.orientations.io_orientation(affine)
        canonical_shape = [0, 0, 0]
        for axis, (target, _) in enumerate(to_canonical):
            canonical_shape[int(target)] = self.shape[axis]
        canonical = np.zeros((len(values), *canonical_shape), dtype=np.float32)
        extent = [stop - start for start, stop in self.box]
        spans = tuple(slice(start, stop) for start, stop in self.box)
        for channel, source in zip(canonical, values, strict=True):
            channel[spans] = resample(source, extent, order=1)
        identity = np.column_stack([np.arange(3), np.ones(3)])
        back = nib.orientations.ornt_transform(identity, to_canonical)
        return np.stack([nib.orientations.apply_orientation(channel, back) for channel in canonical])


@dataclass(frozen=True)
class Volume:
    """One prepared case, read lazily: the arrays are memory maps, so crops touch only their own pages."""

    case: Case
    stem: Path

    @property
    def image(self) -> NDArray[np.float32]:
        """(C, x, y, z) in [0, 1]."""
        mapped: NDArray[np.float32] = np.load(f"{self.stem}.image.npy", mmap_mode="r")
        return mapped

    @property
    def label(self) -> NDArray[np.uint8]:
        """(x, y, z), the task's own label values."""
        mapped: NDArray[np.uint8] = np.load(f"{self.stem}.label.npy", mmap_mode="r")
        return mapped

    @property
    def points(self) -> NDArray[np.int32]:
        """Up to 2000 voxels of every target, rows of (target number, x, y, z)."""
        rows: NDArray[np.int32] = np.load(f"{self.stem}.points.npy")
        return rows

    def sample(self, size: tuple[int, int, int], rng: np.random.Generator) -> dict[str, Any]:
        """A random crop, `image` (C, *size); zeros where the volume is smaller."""
        image = self.image
        return {"image": cut(image, random_origin(image.shape[1:], size, rng), size)}

    @property
    def geometry(self) -> Geometry:
        """Its place in the native grid."""
        return Geometry(**json.loads(Path(f"{self.stem}.json").read_text()))


def fingerprint(digests: Mapping[str, str]) -> str:
    """One digest for the content of all cases: case id -> digest of its files."""
    return digest(dict(sorted(digests.items())))


def digest_cases(cases: Sequence[Case], cache: Path) -> dict[str, str]:
    """Case id -> digest of its files' content. Files that did not change since last time are not read again.

    Raises:
        UserError: a file cannot be read, or two cases have one id.
    """
    memory = cache / "digests.json"
    known: dict[str, str] = json.loads(memory.read_text()) if memory.exists() else {}
    before = dict(known)

    def of_file(path: Path) -> str:
        status = path.stat()
        key = f"{path}|{status.st_size}|{status.st_mtime_ns}"
        if key not in known:
            known[key] = digest_file(path)
        return known[key]

    found: dict[str, str] = {}
    for case in progress(cases, "fingerprint"):
        if case.id in found:
            raise UserError(f"two cases are named {case.id!r}: rename one")
        files = [*case.images, *([case.label] if case.label else [])]
        try:
            found[case.id] = digest([of_file(path) for path in files])
        except OSError as error:
            raise UserError(f"{error.filename} cannot be read: {error.strerror}") from None
    if known != before:
        write_atomic(memory, json.dumps(known, indent=0))
    return found


def prepare(task: Task, cases: Sequence[Case], digests: Mapping[str, str], cache: Path) -> list[Volume]:
    """Prepared volumes of `cases`, in their order; those made before are taken from the cache.

    Raises:
        UserError: as `harness.images.load_case`, or an image without contrast. Cases already prepared are kept.
    """
    settings = {
        "format": PREPARED,
        "task": task.name,
        "version": task.version,
        "spacing": task.spacing,
        "normalisation": [type(task.normalisation).__name__, asdict(task.normalisation)],
        "targets": dict(task.targets),
    }
    folder = cache / "prepared" / f"{task.name}-{digest(settings)[:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    volumes = [Volume(case, folder / digests[case.id][:20]) for case in cases]
    # The geometry is written last: where it exists, the arrays are whole.
    missing = [volume for volume in volumes if not Path(f"{volume.stem}.json").exists()]
    if missing:
        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            jobs = pool.map(partial(_prepare_one, task), missing)
            for _ in progress(jobs, "prepare", total=len(missing)):
                pass
    return volumes


def _prepare_one(task: Task, volume: Volume) -> None:
    loaded = load_case(task, volume.case)
    image, label, geometry = prepare_arrays(task, loaded, str(volume.case.images[0]))
    for kind, array in (("image", image), ("label", label), ("points", _points(task, label))):
        partial_path = Path(f"{volume.stem}.{os.getpid()}.{kind}.partial.npy")
        np.save(partial_path, array)
        partial_path.replace(f"{volume.stem}.{kind}.npy")
    write_atomic(Path(f"{volume.stem}.json"), json.dumps(asdict(geometry)))


def prepare_arrays(task: Task, loaded: Loaded, source: str) -> tuple[NDArray[np.float32], NDArray[np.uint8], Geometry]:
    """Native arrays -> prepared image (C, x, y, z) in [0, 1], label (x, y, z) and geometry. No file is touched.

    Raises:
        UserError: a channel of `source` has no contrast.
    """
    orientation = nib.orientations.io_orientation(loaded.affine)
    image = np.stack([nib.orientations.apply_orientation(channel, orientation) for channel in loaded.image])
    label = nib.orientations.apply_orientation(loaded.label, orientation)
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = loaded.spacing
    box = _foreground(image, task)
    spans = tuple(slice(start, stop) for start, stop in box)
    image, label = image[(slice(None), *spans)], label[spans]
    target = spacing if task.spacing is None else np.asarray(task.spacing)
    image = np.stack([normalise(channel, task.normalisation, source) for channel in image])
    extent = [max(1, round(n * old / new)) for n, old, new in zip(label.shape, spacing, target, strict=True)]
    if extent != list(label.shape):
        # Cubic for images, as nnU-Net; it overshoots at edges, hence the clip.
        image = np.stack([resample(channel, extent, order=3).clip(0, 1) for channel in image])
        label = _resample_label(label, extent)
    geometry = Geometry(
        shape=loaded.label.shape,
        affine=loaded.affine.tolist(),
        box=box,
        spacing=(float(target[0]), float(target[1]), float(target[2])),
    )
    return np.ascontiguousarray(image, dtype=np.float32), np.ascontiguousarray(label), geometry


def normalise(channel: NDArray[np.float32], how: Percentiles | Window, source: str) -> NDArray[np.float32]:
    """One channel (x, y, z) -> [0.001, 1], so that 0 is no intensity but the absence of one (HybridMIM's code).

    Raises:
        UserError: the channel has no contrast.
    """
    if isinstance(how, Window):
        inside, (low, high) = None, (how.low, how.high)
    else:
        inside = channel != 0
        if not inside.any():
            raise UserError(f"{source}: a channel is 0 everywhere: restore the image or take the case out")
        low, high = (float(value) for value in np.percentile(channel[inside], [how.low, how.high]))
        if not low < high:
            raise UserError(f"{source}: a channel has the same value {low:g} nearly everywhere: restore the image")
    scaled = 0.001 + 0.999 * ((channel - low) / (high - low)).clip(0, 1)
    return (scaled if inside is None else scaled * inside).astype(np.float32)


def resample(values: NDArray[Any], extent: Sequence[int], order: int) -> NDArray[np.float32]:
    """(x, y, z) onto `extent` voxels over the same physical box (voxel centres at half steps)."""
    if list(values.shape) == list(extent):
        return values.astype(np.float32, copy=False)
    factors = [new / old for new, old in zip(extent, values.shape, strict=True)]
    resampled: NDArray[np.float32] = ndimage.zoom(
        values.astype(np.float32), factors, order=order, mode="nearest", grid_mode=True
    )
    return resampled


def _resample_label(label: NDArray[np.uint8], extent: Sequence[int]) -> NDArray[np.uint8]:
    """Label by label, linear, the largest wins: nearest-neighbour would leave stair steps."""
    values = np.unique(label)
    shares = np.stack([resample(label == value, extent, order=1) for value in values])
    return values[shares.argmax(axis=0)]


def _foreground(image: NDArray[np.float32], task: Task) -> tuple[tuple[int, int], ...]:
    """Smallest box around what is not background in any channel; the whole image if that is nothing."""
    present = image > task.normalisation.low if isinstance(task.normalisation, Window) else image != 0
    inside = np.asarray(present.any(axis=0))
    box = []
    for axis in range(3):
        where = np.flatnonzero(np.moveaxis(inside, axis, 0).any(axis=(1, 2)))
        box.append((int(where[0]), int(where[-1]) + 1) if len(where) else (0, image.shape[axis + 1]))
    return tuple(box)


def _points(task: Task, label: NDArray[np.uint8]) -> NDArray[np.int32]:
    """Voxels of every target for foreground-centred crops; evenly spread, so no randomness is needed."""
    rows = []
    for number, mask in enumerate(task.masks(label)):
        voxels = np.argwhere(mask)
        chosen = voxels[np.linspace(0, len(voxels) - 1, min(len(voxels), POINTS_PER_TARGET)).astype(int)]
        rows.append(np.column_stack([np.full(len(chosen), number), chosen]))
    return np.concatenate(rows).astype(np.int32)
