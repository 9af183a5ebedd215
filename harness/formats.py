"""Image files: NIfTI, NRRD and MetaImage, their headers checked before a voxel is read."""

import re
from dataclasses import dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError
from harness.files import file_size
from harness.task import SPACINGS

NIFTI = (".nii.gz", ".nii")
NRRD = (".nrrd", ".nhdr")
ITK = (*NRRD, ".mha", ".mhd")
ENDINGS = NIFTI + ITK
PIXEL = re.compile(r"(\d+)-bit (signed integer|unsigned integer|float)")
KINDS = {"signed integer": "i", "unsigned integer": "u", "float": "f"}
# Where text headers name another file: a data file beside the header is read, nothing else.
NAMED_FILE = re.compile(
    rb"^[ \t]*(?:ElementDataFile[ \t]*[=:]|data[ \t]*file[ \t]*:)[ \t]*(.*?)[ \t\r]*$", re.MULTILINE | re.IGNORECASE
)
LONGEST_HEADER = 2**20
LONGEST_LINE = 400  # of NRRD; the reader writes its complaint about a longer one past the end of an array
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
KEPT = re.compile(r"#|content: |[^:]+:=")  # but for these, which it keeps as they are
FIELD = re.compile(r"[ \t]*((?:[A-Za-z_]|[0-9A-Fa-f]{4}\|)[^=:]*)[=:](.*)")  # tags of DICOM begin with a digit
PLACES = {"transformmatrix", "orientation", "rotation", "centerofrotation", "elementspacing", "elementsize", "offset"}
PLACES |= {"origin", "position", "spacedirections", "spaceorigin", "spacings"}
FARTHEST = 1e6  # mm; the reader turns 1e308 over and over
LABEL_FOLDERS = re.compile(r"(labels?|masks?|seg|segmentations?|predictions)(Tr|Ts)?", re.IGNORECASE)
LABEL_NAMES = re.compile(r"(.*[_.-])?(seg|segm|segmentation|label|labels|mask|gt)\d*", re.IGNORECASE | re.DOTALL)

Affine = NDArray[np.float64]


@dataclass(frozen=True)
class Header:
    """What a file says of itself before its voxels are read: `shape` (x, y, z[, channels]) and voxel -> mm `affine`."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    affine: Affine

    @property
    def spacing(self) -> NDArray[np.float64]:
        """Voxel edges in mm along the array axes."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)


def stem(path: Path, root: Path | None = None) -> str:
    """Name of an image file without its ending; below `root` with the folders between."""
    name = path.relative_to(root).as_posix() if root else path.name
    return next((name.removesuffix(ending) for ending in ENDINGS if name.endswith(ending)), name)


def is_named_label(path: Path) -> bool:
    """Whether a path, below the folder of a data set, is named as label maps are: `labelsTr/x`, `x_seg`, `label0001`."""
    return any(map(LABEL_FOLDERS.fullmatch, path.parts[:-1])) or bool(LABEL_NAMES.fullmatch(stem(path)))


def read_header(path: Path) -> Header:
    """Shape, type and place of an image, checked; no voxel is read.

    Raises:
        UserError: missing, no image, not 3D or 4D, not of numbers, larger than the memory that is free, a spacing that
            cannot be, an affine that cannot be inverted, or an sform and a qform that disagree.
    """
    file_size(path)
    header = _nifti_header(path) if path.name.endswith(NIFTI) else _itk_header(path)
    shape, dtype = header.shape, header.dtype
    if len(shape) not in (3, 4) or 0 in shape or dtype.kind not in "iuf":
        what = "colour or vector voxels" if dtype.kind == "V" else str(dtype)
        raise UserError(f"{path}: expected a 3D or 4D image of numbers, it is {shape} of {what}: convert it")
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
    _fits_in_memory(path, shape, dtype)
    return header


def read_image(path: Path) -> tuple[NDArray[Any], Affine]:
    """Scaled voxels (x, y, z) or (x, y, z, channels), in the file's own type where it needs no scaling; and the affine.

    Raises:
        UserError: as `read_header`; or the voxels are truncated or cannot be decoded.
    """
    header = read_header(path)
    try:
        voxels = _nifti_voxels(path) if path.name.endswith(NIFTI) else _itk_voxels(path)
    # Foreign bytes make the readers raise nearly anything; whatever it is, the file is what is wrong.
    except Exception as error:
        raise _unreadable(path, error) from None
    return voxels, header.affine


def _unreadable(path: Path, error: Exception) -> UserError:
    # ITK begins with places in its own source.
    reason = " ".join(
        re.sub(r"\S+\.[ch]xx\S*|Exception thrown in SimpleITK \w+:|sitk::ERROR:", "", str(error)).split()
    )[:200]
    return UserError(f"{path} cannot be read ({type(error).__name__}: {reason}): restore the file")


def _nifti_header(path: Path) -> Header:
    import nibabel as nib

    try:
        image: Any = nib.load(path)
        # As it is in the file: nibabel itself turns a spacing of 0 into 1 and drops a sign.
        with nib.openers.ImageOpener(str(path)) as file:
            raw = image.header_class.from_fileobj(file, check=False)
        spacing = np.asarray(raw["pixdim"][1:4], dtype=np.float64)
        sform, qform = (get(coded=True)[0] for get in (image.header.get_sform, image.header.get_qform))
    except Exception as error:
        raise _unreadable(path, error) from None
    if not np.isfinite(spacing).all() or (spacing <= 0).any():
        raise UserError(
            f"{path}: its header says a spacing of {', '.join(f'{v:g}' for v in spacing)} mm; each must be more than 0: "
            "mend pixdim"
        )
    shape = tuple(int(edge) for edge in image.shape)
    if sform is not None and qform is not None and len(shape) >= 3:
        off = corners_apart(shape, np.asarray(sform), np.asarray(qform))
        if off > 0.5:
            raise UserError(
                f"{path}: its sform and qform place voxels up to {off:.3g} voxels apart, and programs differ in which they "
                "take: keep the right one and set the code of the other to 0"
            )
    return Header(shape, np.dtype(image.get_data_dtype()), np.asarray(image.affine, dtype=np.float64))


def _nifti_voxels(path: Path) -> NDArray[Any]:
    import nibabel as nib

    image: Any = nib.load(path)
    proxy = image.dataobj
    if (proxy.slope, proxy.inter) == (1, 0):
        return np.asarray(proxy.get_unscaled())
    return np.asarray(proxy, dtype=np.float32)


def _itk_reader(path: Path) -> Any:
    import SimpleITK as sitk  # noqa: N813 - its own documentation's name

    for name in _named_files(path):
        if name.upper() == "LOCAL":
            continue
        if name != Path(name).name or name in ("", ".", "..") or "%" in name or name.upper().startswith("LIST"):
            raise UserError(
                f"{path}: its voxels are in {name!r}; only a single file beside the header is read: move it there"
            )
        file_size(path.with_name(name))  # a pipe or a device would never end
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    # Another reader would see other fields than those that were checked.
    reader.SetImageIO("NrrdImageIO" if path.suffix in NRRD else "MetaImageIO")
    reader.SetFileName(str(path))
    return reader


def _named_files(path: Path) -> list[str]:
    """The files that a text header names, as written in it."""
    with path.open("rb") as file:
        text = file.read(LONGEST_HEADER + 1)
    # The header of NRRD ends with an empty line, MetaImage's with the place of its voxels.
    end = re.search(
        rb"\r?\n\r?\n" if path.suffix in NRRD else rb"^[ \t]*ElementDataFile[ \t]*[=:][^\n]*", text, re.MULTILINE
    )
    if end is None and len(text) > LONGEST_HEADER:
        raise UserError(f"{path}: its header is longer than {LONGEST_HEADER >> 20} MiB: is this an image?")
    header = text[: end.end()] if end else text
    _check_fields(path, header.decode("latin-1"))
    return [name.decode(errors="replace") for name in NAMED_FILE.findall(header)]


def _check_fields(path: Path, header: str) -> None:
    """Raises UserError for what crashes the reader, or keeps it busy without end; anything else it refuses itself."""
    nrrd, fields = path.suffix in NRRD, dict[str, str]()
    for line in (each.removesuffix("\r") for each in header.split("\n")):
        match = FIELD.fullmatch(line)
        key, value = (match[1].replace(" ", "").strip().lower(), match[2].strip()) if match else ("", "")
        fields[key] = value
        problem = ""
        if CONTROL.search(line) or not (nrrd or match or not line.strip()):
            problem = f"a line that is no field, {line[:40]!r}"
        elif nrrd and len(line) > LONGEST_LINE and not KEPT.match(line):
            problem = f"a line of {len(line)} bytes, {line[:40]!r}; at most {LONGEST_LINE} are read"
        elif key in ("ndims", "dimension") and not re.fullmatch("[1-9]", value):
            problem = f"{value[:40]!r} dimensions"
        elif key in PLACES and not all(_near(part, nrrd) for part in re.split(r"[\s(),]+", value) if part):
            problem = f"a number that is not within {FARTHEST:g} mm, {line[:80]!r}"
        if problem:
            raise UserError(f"{path} cannot be read, its header has {problem}: mend it, or write the image again")
    if fields.get("byteskip", "").startswith("-") and fields.get("encoding", "").lower() != "raw":
        raise UserError(f"{path} cannot be read, its byte skip is negative, which is for raw voxels: mend the header")


def _near(number: str, nrrd: bool) -> bool:
    """Whether a number of a header is finite and plausible; NRRD says `none` and `nan` for axes that are not in space."""
    try:
        return (nrrd and number.lower() in ("none", "nan")) or abs(float(number)) <= FARTHEST
    except ValueError:
        return False


def _itk_header(path: Path) -> Header:
    import SimpleITK as sitk  # noqa: N813

    try:
        reader = _itk_reader(path)
        reader.ReadImageInformation()
        dimension, shape = reader.GetDimension(), tuple(int(edge) for edge in reader.GetSize())
        name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        direction = np.asarray(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
        spacing, origin = np.asarray(reader.GetSpacing())[:3], np.asarray(reader.GetOrigin())[:3]
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    match = PIXEL.fullmatch(name)
    dtype = np.dtype(f"{KINDS[match[2]]}{int(match[1]) // 8}" if match else "V1")
    affine = np.eye(4)
    if dimension >= 3:
        # ITK's world is left, posterior, superior; NIfTI's is right, anterior, superior.
        affine[:3, :3], affine[:3, 3] = direction * spacing, origin
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return Header(shape, dtype, affine)


def _itk_voxels(path: Path) -> NDArray[Any]:
    import SimpleITK as sitk  # noqa: N813

    voxels: NDArray[Any] = sitk.GetArrayFromImage(_itk_reader(path).Execute())
    return voxels.transpose()  # (z, y, x) -> (x, y, z), without a copy


def _fits_in_memory(path: Path, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    import psutil

    need, free = prod(shape) * (dtype.itemsize + 4), psutil.virtual_memory().available
    if need > free:
        raise UserError(
            f"{path}: its header claims {' x '.join(map(str, shape))} voxels, which take {need / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free: mend the header, or use a machine with more memory"
        )


def write_label(path: Path, label: NDArray[np.uint8], affine: Affine) -> None:
    """A label map (x, y, z) as NIfTI, by rename."""
    import nibabel as nib

    image = nib.Nifti1Image(label, affine)
    image.set_qform(affine, code=1)
    image.set_sform(affine, code=1)
    if corners_apart(label.shape, affine, np.asarray(image.get_qform())) > 0.1:
        image.set_qform(None, code=0)  # it cannot say a shear (a tilted gantry)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    nib.save(image, partial)
    partial.replace(path)


def corners_apart(shape: tuple[int, ...], first: Affine, second: Affine) -> float:
    """Largest distance, in voxels, of a corner of the grid under two affines."""
    corners = np.array([[*corner, 1] for corner in product(*((0, edge - 1) for edge in shape[:3]))], dtype=np.float64)
    distance = np.linalg.norm((corners @ first.T - corners @ second.T)[:, :3], axis=1).max()
    return float(distance / max(1e-9, np.linalg.norm(first[:3, :3], axis=0).min()))
