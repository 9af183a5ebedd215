"""Opens and checks the images and the label of a case; groups the images of a folder into cases."""

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

from harness.api.task import Case, ImageSet
from harness.data.image_files import Affine, corners_apart, read_header, read_image
from harness.data.image_names import IMAGE_ENDINGS, is_named_label, stem
from harness.system.errors import UserError
from harness.system.files import walk

SHIFT_TOLERANCE = 0.1  # voxels; largest allowed distance between the positions that two headers give to the same corner
ROUNDING = 1e-3  # largest allowed distance of a float label from a whole number
SAMPLED = 200_000  # voxels that are looked at to tell what an image is
FEW_VALUES = 32  # largest number of different values of a label map; the fewest that a scan is expected to have
HIGHEST_HU = 32767  # larger values are negative ones that were stored without a sign


@dataclass(frozen=True)
class LoadedCase:
    """One case in its native grid: `image` (C, x, y, z) float32, `label` (x, y, z) uint8 or None, `affine`.

    `affine` maps voxels to mm. `notes` describe in words which deviations were tolerated.
    """

    image: NDArray[np.float32]
    label: NDArray[np.uint8] | None
    affine: Affine
    notes: tuple[str, ...] = ()

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel edges in mm along the array axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def load_case(images: ImageSet, case: Case) -> LoadedCase:
    """Read and check one case.

    Raises:
        UserError: a file cannot be read, images and label differ in shape or affine, voxels are NaN or infinite, the
            number of channels is wrong, or the task does not know a label value.
    """
    volumes: list[NDArray[Any]] = []
    affine: Affine = np.eye(4)
    for path in case.images:
        voxels, file_affine = read_image(path)
        if volumes:
            _check_same_grid(case.images[0], volumes[0][0].shape, affine, path, voxels.shape[:3], file_affine)
        else:
            affine = file_affine
        _check_intensities(images, path, voxels)
        volumes.append(np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])
    if (num_channels := sum(map(len, volumes))) != len(images.channels):
        raise UserError(
            f"{case.images[0]}: {num_channels} channels, {images.name!r} has {len(images.channels)}: "
            f"{', '.join(images.channels)}"
        )
    image = np.concatenate(volumes, dtype=np.float32, casting="unsafe")
    if case.label is None:
        return LoadedCase(image, None, affine)
    label, label_affine, notes = load_label(images, case)
    _check_same_grid(case.images[0], image.shape[1:], affine, case.label, label.shape, label_affine)
    return LoadedCase(image, label, affine, notes)


def case_bytes(case: Case, prepared: float = 0) -> int:
    """Upper bound in bytes of the memory that opening and preprocessing a case takes; 1 if the case cannot be opened.

    The larger one of the native and the preprocessed grid counts with 32 bytes per voxel, labels included (two CTs of 26
    million voxels at a time peak at 1.7 GiB, see `tests/benchmarks/test_cache.py`). Each further channel adds 8 bytes per
    voxel: its float32 values before and after preprocessing.

    Args:
        prepared: number of voxels of the preprocessed grid.
    """
    try:
        shapes = [read_header(path).shape for path in case.images]
    except UserError:
        return 1  # the problem is reported when the case is opened
    channels = sum(shape[3] if len(shape) == 4 else 1 for shape in shapes)
    return int(max(prepared, prod(shapes[0][:3])) * (32 + 8 * (channels - 1)))


def load_label(images: ImageSet, case: Case) -> tuple[NDArray[np.uint8], Affine, tuple[str, ...]]:
    """The label map (x, y, z) in the task's own numbering, its affine, and notes on what was tolerated.

    Raises:
        UserError: as `read_image`; the label map is not 3D; or the task or the case's numbering does not know a value.
    """
    assert case.label is not None, f"case {case.id!r} has no label map"
    path = case.label
    notes: tuple[str, ...] = ()
    voxels, affine = read_image(path)
    if voxels.ndim != 3:
        raise UserError(f"{path}: a label map has 3 dimensions, this one has shape {voxels.shape}: save it as 3D")
    if voxels.dtype.kind == "f":
        voxels, notes = _round(path, voxels)
    numbering = dict(case.numbering) or {value: value for value in images.labels}
    label = _renumber(voxels, numbering)
    if label is None:
        unknown_values = np.unique(voxels[~np.isin(voxels, list(numbering))])
        raise UserError(
            f"{path}: label values {', '.join(f'{value:g}' for value in unknown_values[:5])} are unknown to task "
            f"{images.name!r}, which has {', '.join(map(str, numbering))}"
            f"{' in files of this name' if case.numbering else ''}: is this another release or another task?"
        )
    return label, affine, notes


def _renumber(voxels: NDArray[Any], numbering: Mapping[int, int]) -> NDArray[np.uint8] | None:
    """Map label values on disk to those of the task by a lookup table; None if `numbering` lacks a value."""
    limits = np.iinfo(np.int16)
    if voxels.min() < limits.min or voxels.max() > limits.max:
        return None
    table = np.full(2**16, -1, dtype=np.int16)
    for on_disk, own in numbering.items():
        table[on_disk] = own
    label = table[voxels.astype(np.int16, copy=False).view(np.uint16)]
    return None if (label < 0).any() else label.astype(np.uint8)


def _check_intensities(images: ImageSet, path: Path, voxels: NDArray[Any]) -> None:
    """Raises UserError if voxels are NaN or infinite, or a CT was stored without a sign."""
    if voxels.dtype.kind == "f":
        limit = np.finfo(np.float32).max
        bad = voxels.size - int(np.count_nonzero(np.abs(voxels) <= limit))
        if bad:
            raise UserError(
                f"{path}: {bad} voxels are NaN or infinite (or beyond {limit:.3g}): mend the image or take the case out"
            )
    if images.hounsfield and np.count_nonzero(voxels > HIGHEST_HU) > 0.01 * voxels.size:
        raise UserError(
            f"{path}: more than 1 % of the voxels are above {HIGHEST_HU}, no Hounsfield units: negative values were stored "
            "without a sign; convert the image again"
        )


def _round(path: Path, voxels: NDArray[Any]) -> tuple[NDArray[Any], tuple[str, ...]]:
    """Float labels as whole numbers, and a note if that changed them. Raises UserError if they are not whole numbers."""
    whole = np.rint(voxels)
    distance = float(np.abs(voxels - whole).max())
    if not distance <= ROUNDING:  # NaN as well
        bad = np.unique(voxels[~(np.abs(voxels - whole) <= ROUNDING)])
        raise UserError(
            f"{path}: label values {', '.join(f'{value:g}' for value in bad[:5])} are no whole numbers: was the label map "
            "interpolated, or saved with a scale (scl_slope)? Resample it by nearest neighbour, or save it as whole numbers"
        )
    return whole, (f"{path}: label values up to {distance:.1g} from whole numbers, rounded",) if distance else ()


def _check_same_grid(
    first: Path, shape: tuple[int, ...], affine: Affine, second: Path, other: tuple[int, ...], other_affine: Affine
) -> None:
    """Raises UserError if two files differ in shape or affine, and says how."""
    if tuple(shape) != tuple(other):
        turned = ", the same edges in another order (turned?)" if sorted(shape) == sorted(other) else ""
        raise UserError(
            f"{second} has shape {tuple(other)}, {first} has {tuple(shape)}{turned}: they must be the same grid; resample "
            "one onto the other"
        )
    distance = corners_apart(shape, affine, other_affine)
    if distance <= SHIFT_TOLERANCE:
        return
    axes, other_axes = ("".join(nib.orientations.aff2axcodes(a)) for a in (affine, other_affine))
    shift = np.linalg.solve(affine[:3, :3], (other_affine - affine)[:3, 3])
    if axes != other_axes:
        how = f"their axes run {other_axes} and {axes}: one of them is mirrored or turned, or its header is"
    elif np.allclose(affine[:3, :3], other_affine[:3, :3], atol=1e-4):
        how = f"shifted by {', '.join(f'{v:.2g}' for v in shift)} voxels"
    else:
        how = f"by up to {distance:.3g} voxels"
    raise UserError(
        f"{second} and {first} have different affines ({how}): resample one onto the other, or mend the header that is wrong"
    )


def looks_like_labels(image: NDArray[np.float32]) -> bool:
    """Whether an image (C, x, y, z) has few whole values from 0 on, as label maps have and scans have not."""
    sampled = image.reshape(-1)[:: max(1, image.size // SAMPLED)]
    if (sampled < 0).any() or (sampled != np.rint(sampled)).any():
        return False
    return len(np.unique(sampled)) <= FEW_VALUES


def has_lost_intercept(image: NDArray[np.float32]) -> bool:
    """Whether a CT (C, x, y, z) seems to have air at 0 and not at -1000: no voxel of air or lung, and much of bone's density.

    Padding below -1100 HU does not count as air.
    """
    sampled = image.reshape(-1)[:: max(1, image.size // SAMPLED)]
    inside = sampled[sampled > -1100]
    return bool(len(inside) and (inside < -200).mean() < 0.01 and (inside > 300).mean() > 0.25)


def group_images(folder: Path, images: ImageSet) -> list[Case]:
    """The images in a folder and its subfolders as cases: one file per case, or one file per channel of a case.

    A suffix of the name says the channel: `_0000`, `_0001` ... as in nnU-Net, or the channel's name or alias after `_` or `-`.
    A file without such a suffix is a whole case (4D if there are several channels). Where there is one channel, `_0000` is a
    suffix only if all of several files have it; else it belongs to the name, as in `amos_0000`.

    Raises:
        UserError: the folder holds no image, a case lacks a channel, or two files are the same channel of a case.
    """
    files_below = (Path(path) for path in walk(folder))
    files = [path for path in files_below if path.name.endswith(IMAGE_ENDINGS) and not path.name.startswith(".")]
    paths = sorted(path for path in files if not is_named_label(path.relative_to(folder)))
    if not paths:
        raise UserError(f"{folder} holds no image; images end in {', '.join(IMAGE_ENDINGS)}: give another folder")
    names = [stem(path, folder) for path in paths]
    numbered = len(names) > 1 and all(name.endswith("_0000") for name in names)
    groups: dict[str, dict[int, Path]] = defaultdict(dict)
    for path, whole in zip(paths, names, strict=True):
        name, channel = split_channel(whole, images)
        if channel is None or (len(images.channels) == 1 and not numbered):
            name, channel = whole, -1
        if channel in groups[name]:
            raise UserError(
                f"{groups[name][channel]} and {path} are of one name, so would be their outputs: rename one"
            )
        groups[name][channel] = path
    cases = []
    for name, channels in sorted(groups.items()):
        if -1 not in channels and set(channels) != set(range(len(images.channels))):
            present = ", ".join(path.name for path in channels.values())
            raise UserError(
                f"{folder / name}: there is {present}, it needs the channels {', '.join(images.channels)}: add what is missing"
            )
        cases.append(Case(id=name, images=tuple(channels[channel] for channel in sorted(channels)), label=None))
    return cases


def split_channel(name: str, images: ImageSet) -> tuple[str, int | None]:
    """The name of a case and the number of the channel, from a file's name without its ending; None if no channel is named."""
    numbers = {
        each.lower(): number
        for number, channel in enumerate(images.channels)
        for each in (channel, *images.aliases.get(channel, ()))
    }
    named = "|".join(re.escape(each) for each in numbers)
    match = re.fullmatch(rf"(.+)[_-](?:(\d{{4}})|({named}))", name, re.IGNORECASE | re.DOTALL)
    if match is None:
        return name, None
    return match[1], int(match[2]) if match[2] else numbers[match[3].lower()]


def order_channels(paths: Sequence[Path], images: ImageSet) -> list[Path]:
    """The files of one case, one per channel, in the order of the channels.

    Names decide where they name every channel once, as in `group_images`. Where they name none, the given order counts.

    Raises:
        UserError: names name some channels, and the given order is another.
    """
    if len(paths) != len(images.channels) or len(paths) == 1:
        return list(paths)
    told = [split_channel(stem(path), images)[1] for path in paths]
    if sorted(-1 if number is None else number for number in told) == list(range(len(paths))):
        ordered = dict(zip(told, paths, strict=True))
        return [ordered[number] for number in range(len(paths))]
    for place, (number, path) in enumerate(zip(told, paths, strict=True)):
        if number is not None and number != place:
            raise UserError(
                f"{path} is given as {images.channels[place]!r}, its name says "
                f"{images.channels[number] if number < len(paths) else f'channel {number}'!r}: give the channels in the order "
                f"{', '.join(images.channels)}"
            )
    return list(paths)


def num_workers(largest: int, jobs: int) -> int:
    """Number of worker threads: the number of cores or of `jobs`, whichever is smaller.

    Half of the free memory must hold one case of `largest` bytes per thread.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, jobs, psutil.virtual_memory().available // 2 // max(1, largest)))
