"""One case opened and checked: its images and its label."""

import os
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from numpy.typing import NDArray

from harness.api.task import Case, ImageSet, Window
from harness.data.image_files import Affine, corners_apart, read_header, read_image
from harness.data.image_names import IMAGE_ENDINGS, is_named_label, stem
from harness.system.errors import UserError
from harness.system.files import walk

SHIFT_TOLERANCE = 0.1  # voxels by which two headers may place the same corner apart
ROUNDING = 1e-3  # how far a float label may be from a whole number
HIGHEST_HU = 32767  # above it: negative values that were stored without a sign


@dataclass(frozen=True)
class Loaded:
    """One case in its native grid: `image` (C, x, y, z) float32, `label` (x, y, z) uint8 or None, `affine`.

    `notes` are what was tolerated, in words.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    affine: Affine
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel edges in mm along the array axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def load_case(images: ImageSet, case: Case) -> Loaded:
    """Read and check one case.

    Raises:
        UserError: a file that cannot be read, images and label whose shapes or affines differ, NaN or infinite
            voxels, another number of channels, a label value that the task does not know.
    """
    volumes: list[NDArray[Any]] = []
    affine: Affine = np.eye(4)
    for path in case.images:
        voxels, its_affine = read_image(path)
        if volumes:
            _same_grid(case.images[0], volumes[0][0].shape, affine, path, voxels.shape[:3], its_affine)
        else:
            affine = its_affine
        _plausible(images, path, voxels)
        volumes.append(np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])
    if (found := sum(map(len, volumes))) != len(images.channels):
        raise UserError(
            f"{case.images[0]}: {found} channels, {images.name!r} has {len(images.channels)}: "
            f"{', '.join(images.channels)}"
        )
    image = np.concatenate(volumes, dtype=np.float32, casting="unsafe")
    if case.label is None:
        return Loaded(image, None, affine)
    label, label_affine, notes = load_label(images, case)
    _same_grid(case.images[0], image.shape[1:], affine, case.label, label.shape, label_affine)
    return Loaded(image, label, affine, notes)


def case_bytes(case: Case, prepared: float = 0) -> int:
    """Memory that a case takes at most while it is opened and prepared (to so many voxels); 1 where it cannot be opened.

    32 bytes a voxel of the larger grid, labels included (two CTs of 26 million voxels at a time peak at 1.7 GiB, see
    `tests/benchmarks/test_cache.py`), and for each more channel its float32 before and after.
    """
    try:
        shapes = [read_header(path).shape for path in case.images]
    except UserError:
        return 1  # said when its turn comes
    channels = sum(shape[3] if len(shape) == 4 else 1 for shape in shapes)
    return int(max(prepared, prod(shapes[0][:3])) * (32 + 8 * (channels - 1)))


def load_label(images: ImageSet, case: Case) -> tuple[NDArray[np.uint8], Affine, tuple[str, ...]]:
    """The label map (x, y, z) in the task's own numbering, its affine, and notes on what was tolerated.

    Raises:
        UserError: as `read_image`; not 3D; a value that the task, or the case's numbering, does not know.
    """
    assert case.label is not None, f"case {case.id!r} has no label map"
    path = case.label
    notes: tuple[str, ...] = ()
    voxels, affine = read_image(path)
    if voxels.ndim != 3:
        raise UserError(f"{path}: a label map has 3 dimensions, this one has shape {voxels.shape}: save it as 3D")
    if voxels.dtype.kind == "f":
        voxels, notes = _rounded(path, voxels)
    numbering = dict(case.numbering) or {value: value for value in images.labels}
    label = _renumber(voxels, numbering)
    if label is None:
        foreign = np.unique(voxels[~np.isin(voxels, list(numbering))])
        raise UserError(
            f"{path}: label values {', '.join(f'{value:g}' for value in foreign[:5])} are unknown to task "
            f"{images.name!r}, which has {', '.join(map(str, numbering))}"
            f"{' in files of this name' if case.numbering else ''}: is this another release or another task?"
        )
    return label, affine, notes


def _renumber(voxels: NDArray[Any], numbering: Mapping[int, int]) -> NDArray[np.uint8] | None:
    """Whole numbers on disk -> the task's, by a table; None where one is unknown."""
    limits = np.iinfo(np.int16)
    if voxels.min() < limits.min or voxels.max() > limits.max:
        return None
    table = np.full(2**16, -1, dtype=np.int16)
    for theirs, ours in numbering.items():
        table[theirs] = ours
    found = table[voxels.astype(np.int16, copy=False).view(np.uint16)]
    return None if (found < 0).any() else found.astype(np.uint8)


def _plausible(images: ImageSet, path: Path, voxels: NDArray[Any]) -> None:
    if voxels.dtype.kind == "f":
        limit = np.finfo(np.float32).max
        bad = voxels.size - int(np.count_nonzero(np.abs(voxels) <= limit))
        if bad:
            raise UserError(
                f"{path}: {bad} voxels are NaN or infinite (or beyond {limit:.3g}): mend the image or take the case out"
            )
    if isinstance(images.normalisation, Window) and np.count_nonzero(voxels > HIGHEST_HU) > 0.01 * voxels.size:
        raise UserError(
            f"{path}: more than 1 % of the voxels are above {HIGHEST_HU}, no Hounsfield units: negative values were stored "
            "without a sign; convert the image again"
        )


def _rounded(path: Path, voxels: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    whole = np.rint(voxels)
    off = float(np.abs(voxels - whole).max())
    if not off <= ROUNDING:  # NaN as well
        bad = np.unique(voxels[~(np.abs(voxels - whole) <= ROUNDING)])
        raise UserError(
            f"{path}: label values {', '.join(f'{value:g}' for value in bad[:5])} are no whole numbers: was the label map "
            "interpolated? Resample it again by nearest neighbour"
        )
    return whole, (f"{path}: label values up to {off:.1g} from whole numbers, rounded",) if off else ()


def _same_grid(
    first: Path, shape: tuple[int, ...], affine: Affine, second: Path, other: tuple[int, ...], other_affine: Affine
) -> None:
    if tuple(shape) != tuple(other):
        turned = ", the same edges in another order (turned?)" if sorted(shape) == sorted(other) else ""
        raise UserError(
            f"{second} has shape {tuple(other)}, {first} has {tuple(shape)}{turned}: they must be the same grid; resample "
            "one onto the other"
        )
    off = corners_apart(shape, affine, other_affine)
    if off <= SHIFT_TOLERANCE:
        return
    mine, theirs = ("".join(nib.orientations.aff2axcodes(a)) for a in (affine, other_affine))
    shift = np.linalg.solve(affine[:3, :3], (other_affine - affine)[:3, 3])
    if mine != theirs:
        how = f"their axes run {theirs} and {mine}: one of them is mirrored or turned, or its header is"
    elif np.allclose(affine[:3, :3], other_affine[:3, :3], atol=1e-4):
        how = f"shifted by {', '.join(f'{v:.2g}' for v in shift)} voxels"
    else:
        how = f"by up to {off:.3g} voxels"
    raise UserError(
        f"{second} and {first} have different affines ({how}): resample one onto the other, or mend the header that is wrong"
    )


def group_images(folder: Path, channels: Sequence[str]) -> list[Case]:
    """The images of a folder (and below) as cases: one file each, or grouped where the task has several channels.

    Channels are told by a suffix: `_0000`, `_0001` ... as nnU-Net's, or the channel's name after `_` or `-`. Files that
    carry none are whole cases (4D).

    Raises:
        UserError: no image, or a case without one of its channels.
    """
    found = (Path(path) for path in walk(folder))
    images = [path for path in found if path.name.endswith(IMAGE_ENDINGS) and not path.name.startswith(".")]
    paths = sorted(path for path in images if not is_named_label(path.relative_to(folder)))
    if not paths:
        raise UserError(f"{folder} holds no image; images end in {', '.join(IMAGE_ENDINGS)}: give another folder")
    names = "|".join(re.escape(name) for name in channels)
    pattern = re.compile(rf"(.+)[_-](?:(\d{{4}})|({names}))", re.IGNORECASE | re.DOTALL)
    positions = {name.lower(): place for place, name in enumerate(channels)}
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in paths:
        name = stem(path, folder)
        match = pattern.fullmatch(name)
        place = -1 if match is None else int(match[2]) if match[2] else positions[match[3].lower()]
        if match is None or (len(channels) == 1 and match[2] != "0000"):
            name, place = name, -1
        else:
            name = match[1]
        if place in groups[name]:
            raise UserError(f"{groups[name][place]} and {path} are of one name, so would be their outputs: rename one")
        groups[name][place] = path
    cases = []
    for name, files in sorted(groups.items()):
        if -1 not in files and set(files) != set(range(len(channels))):
            there = ", ".join(path.name for path in files.values())
            raise UserError(
                f"{folder / name}: there is {there}, due are the channels {', '.join(channels)}: add what is missing"
            )
        cases.append(Case(id=name, images=tuple(files[place] for place in sorted(files)), label=None))
    return cases


def num_workers(largest: int, jobs: int) -> int:
    """All cores, as far as half of the free memory holds that many cases of `largest` bytes."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs, psutil.virtual_memory().available // 2 // max(1, largest)))
