"""Images from disk, checked: nothing that would spoil a run gets past here."""

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from harness.errors import UserError
from harness.task import Case, Task

AFFINE_TOLERANCE_MM = 1e-2


@dataclass(frozen=True)
class Loaded:
    """One case in its native grid: `image` (C, x, y, z) float32, `label` (x, y, z) uint8, voxel -> mm `affine`."""

    image: NDArray[np.float32]
    label: NDArray[np.uint8]
    affine: NDArray[np.float64]

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel edges in mm along the array axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def load_case(task: Task, case: Case) -> Loaded:
    """Read and check one labelled case.

    Raises:
        UserError: a file that cannot be read, images and label whose shapes or affines differ, NaN or infinite
            voxels, a label value that the task does not know.
    """
    volumes: list[NDArray[Any]] = []
    affine = np.empty(0)
    for path in case.images:
        voxels, its_affine = read_nifti(path)
        if volumes:
            _same_grid(case.images[0], volumes[0][0].shape, affine, path, voxels.shape[:3], its_affine)
        else:
            affine = its_affine
        if not np.isfinite(voxels).all():
            bad = int(voxels.size - np.isfinite(voxels).sum())
            raise UserError(f"{path}: {bad} voxels are NaN or infinite: mend the image or take the case out")
        volumes.append(np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None])
    image = np.concatenate(volumes).astype(np.float32, copy=False)
    if len(image) != len(task.channels):
        raise UserError(
            f"{case.images[0]}: {len(image)} channels, task {task.name!r} has {len(task.channels)}: "
            f"{', '.join(task.channels)}"
        )
    label = load_label(task, case)
    _same_grid(case.images[0], image.shape[1:], affine, _label_path(case), label[0].shape, label[1])
    return Loaded(image, label[0], affine)


def load_label(task: Task, case: Case) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """The label map (x, y, z) uint8 and its affine; its values are checked. Raises UserError as `load_case`."""
    path = _label_path(case)
    voxels, affine = read_nifti(path)
    if voxels.ndim != 3:
        raise UserError(f"{path}: a label map has 3 dimensions, this one has shape {voxels.shape}")
    values = np.unique(voxels)
    foreign = [float(value) for value in values if not np.isin(value, task.labels)]
    if foreign:
        raise UserError(
            f"{path}: label values {', '.join(f'{value:g}' for value in foreign[:5])} are unknown to task {task.name!r}, "
            f"which has {', '.join(map(str, task.labels))}: is this another release or another task?"
        )
    return voxels.astype(np.uint8), affine


def read_nifti(path: Path) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """Scaled voxels (3D, or 4D with channels last) and the affine.

    Raises:
        UserError: missing, truncated, not an image, not 3D or 4D, or an affine that cannot be inverted.
    """
    try:
        image: Any = nib.load(path)
        voxels = np.asanyarray(image.dataobj)
    except (OSError, EOFError, ValueError, MemoryError, zlib.error, ImageFileError, HeaderDataError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}): restore the file") from None
    if voxels.ndim not in (3, 4) or 0 in voxels.shape or voxels.dtype.kind not in "iuf":
        raise UserError(f"{path}: expected a 3D or 4D image of numbers, it is {voxels.shape} of {voxels.dtype}")
    affine = np.asarray(image.affine, dtype=np.float64)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise UserError(f"{path}: its affine cannot be inverted, so voxels have no place in space: mend the header")
    return voxels, affine


def _label_path(case: Case) -> Path:
    if case.label is None:
        raise UserError(f"case {case.id!r} has no label map, which training and scoring need")
    return case.label


def _same_grid(
    first: Path,
    shape: tuple[int, ...],
    affine: NDArray[Any],
    second: Path,
    other: tuple[int, ...],
    other_affine: NDArray[Any],
) -> None:
    shape = shape[:3] if len(shape) < 4 else shape[1:]
    if tuple(shape) != tuple(other):
        raise UserError(f"{second} has shape {tuple(other)}, {first} has {tuple(shape)}: they must be the same grid")
    off = float(np.abs(affine - other_affine).max())
    if off > AFFINE_TOLERANCE_MM:
        raise UserError(
            f"{second} and {first} have different affines (by up to {off:.3g} mm): resample one onto the other, "
            "or mend the header that is wrong"
        )
