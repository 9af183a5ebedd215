"""Reads and writes NIfTI, NRRD and MetaImage files. The header is checked before a voxel is read."""

import gzip
import re
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import psutil
from numpy.typing import NDArray

from harness.api.task import SPACINGS
from harness.data.image_names import IMAGE_ENDINGS, ITK, NIFTI
from harness.system.errors import UserError
from harness.system.files import disguise, file_size

Affine = NDArray[np.float64]
UNITS = {1: "metres", 3: "micrometres"}
"""Units of NIfTI headers that are not those of this harness."""


@dataclass(frozen=True)
class Header:
    """Header of an image file: `shape` (x, y, z[, channels]), voxel type `dtype`, and `affine` from voxels to mm."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: Affine

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel edges in mm along the array axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def canonical_axes(self) -> NDArray[np.int64]:
        """The array axis along each canonical axis: left to right, posterior to anterior, inferior to superior."""
        along: NDArray[np.int64] = nib.orientations.io_orientation(self.affine)[:, 0].astype(int).argsort()
        return along


def read_header(path: Path) -> Header:
    """Shape, voxel type and affine of an image, checked. No voxel is read.

    Raises:
        UserError: the file is missing, is no image, is not 3D or 4D, does not hold numbers, or is larger than the free
            memory; the spacing is impossible, the affine cannot be inverted, or sform and qform disagree.
    """
    file_size(path)
    try:
        if not path.name.endswith(IMAGE_ENDINGS):
            raise UserError(f"{path} has not the name of an image: give one that ends in {', '.join(IMAGE_ENDINGS)}")
        header = _nifti_header(path) if path.name.endswith(NIFTI) else _itk().read_header(path)
    except UserError:
        if kind := disguise(path):
            raise UserError(f"{path} is {kind}") from None
        raise
    shape, dtype = header.shape, header.dtype
    if len(shape) not in (3, 4) or 0 in shape or dtype.kind not in "iuf":
        voxel_type = "colour or vector voxels" if dtype.kind == "V" else str(dtype)
        raise UserError(f"{path}: expected a 3D or 4D image of numbers, it is {shape} of {voxel_type}: convert it")
    if min(shape[:3]) < 2:
        raise UserError(f"{path}: shape {shape} is a single slice: this harness segments volumes, take the case out")
    spacing = header.spacing
    if not np.isfinite(header.affine).all() or abs(np.linalg.det(header.affine[:3, :3])) <= 1e-9 * prod(spacing):
        raise UserError(f"{path}: its affine cannot be inverted, so voxels have no place in space: mend the header")
    if spacing.min() < SPACINGS[0] or spacing.max() > SPACINGS[1]:
        raise UserError(
            f"{path}: its header says a spacing of {', '.join(f'{edge:g}' for edge in spacing)} mm; each must be within "
            f"{SPACINGS[0]:g} to {SPACINGS[1]:g} mm: mend the header"
        )
    _check_memory(path, shape, dtype)
    return header


def read_image(path: Path) -> tuple[NDArray[Any], Affine]:
    """Voxels (x, y, z) or (x, y, z, channels), scaled as the header says, and the affine.

    Voxels that need no scaling keep the type that they have in the file.

    Raises:
        UserError: as `read_header`; or the voxels are truncated or cannot be decoded.
    """
    header = read_header(path)
    try:
        voxels = _nifti_voxels(path) if path.name.endswith(NIFTI) else _itk().read_voxels(path)
    # Damaged files make the readers raise nearly any exception; the cause is the file, whatever the exception is.
    except Exception as error:
        raise unreadable(path, error) from None
    return voxels, header.affine


def content_files(path: Path) -> list[Path]:
    """The file of an image, and those that its header names for the voxels: its content is theirs, too.

    Headers of scans on one grid are equal. Raises UserError for a header that is not read.
    """
    return [path, *(_itk().voxel_files(path) if path.name.endswith(ITK) else ())]


def unreadable(path: Path, error: Exception) -> UserError:
    """The error for a file that its reader refused, with the reader's own message."""
    # ITK's messages begin with positions in its own source code.
    reason = " ".join(
        re.sub(r"\S+\.[ch]xx\S*|Exception thrown in SimpleITK \w+:|sitk::ERROR:", "", str(error)).split()
    )[:200]
    return UserError(f"{path} cannot be read ({type(error).__name__}: {reason}): restore the file")


def _itk() -> Any:
    """The module that reads NRRD and MetaImage. Imported on first use: SimpleITK takes 0.2 s, and most data is NIfTI."""
    from harness.data import itk_files

    return itk_files


def _nifti_header(path: Path) -> Header:
    """Header of a NIfTI file. Raises UserError for a spacing of 0 or less, or if sform and qform disagree."""
    try:
        image: Any = nib.load(path)
        # The spacing as the file has it: nibabel replaces a spacing of 0 by 1 and drops the sign of a negative one.
        with nib.openers.ImageOpener(str(path)) as file:
            raw = image.header_class.from_fileobj(file, check=False)
        spacing = np.asarray(raw["pixdim"][1:4], dtype=np.float64)
        sform, qform = (get(coded=True)[0] for get in (image.header.get_sform, image.header.get_qform))
        units = UNITS.get(int(raw["xyzt_units"]) % 8, "")
    except Exception as error:
        raise unreadable(path, error) from None
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise UserError(
            f"{path}: its header says a spacing of {', '.join(f'{v:g}' for v in spacing)} mm; each must be more than 0: "
            "mend pixdim"
        )
    if units:
        raise UserError(f"{path}: its header says that lengths are in {units}: convert them to millimetres")
    shape = tuple(int(edge) for edge in image.shape)
    if sform is not None and qform is not None and len(shape) >= 3:
        distance = corners_apart(shape, np.asarray(sform), np.asarray(qform))
        if distance > 0.5:
            raise UserError(
                f"{path}: its sform and qform place voxels up to {distance:.3g} voxels apart, and programs differ in which they "
                "take: keep the right one and set the code of the other to 0"
            )
    return Header(shape, np.dtype(image.get_data_dtype()), np.asarray(image.affine, dtype=np.float64))


def _nifti_voxels(path: Path) -> NDArray[Any]:
    """Voxels of a NIfTI file, in the file's own type, or in float32 if they need scaling."""
    image: Any = nib.load(path)
    if path.name.lower().endswith(".gz"):
        # To the end of the file, where its checksum is: nibabel stops after the last voxel, and does not compare it.
        with gzip.open(path) as file:
            image = type(image).from_bytes(file.read())
    proxy = image.dataobj
    if (proxy.slope, proxy.inter) == (1, 0):
        return np.asarray(proxy.get_unscaled())
    return np.asarray(proxy, dtype=np.float32)


def _check_memory(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """Raises UserError if the free memory cannot hold the voxels as they are in the file and a float32 copy."""
    need, free = prod(shape) * (dtype.itemsize + 4), psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"{path}: its header claims {' x '.join(map(str, shape))} voxels, which take {need / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free: mend the header, or use a machine with more memory"
        )


def write_image(path: Path, voxels: NDArray[Any], affine: Affine) -> None:
    """Write voxels as NIfTI, NRRD or MetaImage, by the ending of `path`; the last two only in 3D with a diagonal affine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(NIFTI):
        nib.save(nib.Nifti1Image(voxels, affine), path)
    else:
        _itk().write_image(path, voxels, affine)


def write_label(path: Path, label: NDArray[np.uint8], affine: Affine) -> None:
    """Write a label map (x, y, z) as NIfTI to a temporary file that is renamed at the end."""
    image = nib.Nifti1Image(label, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    if corners_apart(label.shape, affine, np.asarray(image.get_qform())) > 0.1:
        image.set_qform(None, code=0)  # a qform cannot express a shear (a tilted gantry)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    nib.save(image, partial)
    partial.replace(path)


def corners_apart(shape: tuple[int, ...], first: Affine, second: Affine) -> float:
    """Largest distance, in voxels, between the positions that two affines give to the same corner of the grid."""
    corners = np.array([[*corner, 1] for corner in product(*((0, edge - 1) for edge in shape[:3]))], dtype=np.float64)
    distance = np.linalg.norm((corners @ first.T - corners @ second.T)[:, :3], axis=1).max()
    return float(distance / max(1e-9, np.linalg.norm(first[:3, :3], axis=0).min()))
