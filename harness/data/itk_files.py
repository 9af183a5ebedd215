"""Reads and writes NRRD and MetaImage with SimpleITK. Headers that would crash SimpleITK are refused.

No other module imports SimpleITK.
"""

import re
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk  # noqa: N813 - SimpleITK's documentation uses this name
from numpy.typing import NDArray

from harness.data.image_files import Affine, Header, unreadable
from harness.data.image_names import NRRD
from harness.system.errors import UserError
from harness.system.files import file_size

# Names that ITK gives to voxel types.
PIXEL = re.compile(r"(\d+)-bit (signed integer|unsigned integer|float)")
KINDS = {"signed integer": "i", "unsigned integer": "u", "float": "f"}
# Fields of text headers that name another file. Only a data file beside the header is read.
NAMED_FILE = re.compile(
    rb"^[ \t]*(?:ElementDataFile[ \t]*[=:]|data[ \t]*file[ \t]*:)[ \t]*(.*?)[ \t\r]*$", re.MULTILINE | re.IGNORECASE
)
LONGEST_HEADER = 2**20  # bytes
LONGEST_LINE = 400  # bytes, NRRD only; ITK's error message about a longer line overruns a buffer
CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
# Lines of NRRD that may be longer: ITK keeps comments, `content` and key/value pairs unchanged.
UNLIMITED_LINE = re.compile(r"#|content: |[^:]+:=")
# A field begins with a letter, or is a DICOM tag, which may begin with a digit.
FIELD = re.compile(r"[ \t]*((?:[A-Za-z_]|[0-9A-Fa-f]{4}\|)[^=:]*)[=:](.*)")
# Fields whose numbers are positions, distances or directions.
SPATIAL_FIELDS = {
    "transformmatrix",
    "orientation",
    "rotation",
    "centerofrotation",
    "elementspacing",
    "elementsize",
    "offset",
}
SPATIAL_FIELDS |= {"origin", "position", "spacedirections", "spaceorigin", "spacings"}
FARTHEST = 1e6  # mm; ITK loops without end on numbers such as 1e308


def read_header(path: Path) -> Header:
    """Shape, voxel type and affine. Raises UserError if the header cannot be read, or would crash ITK or block it."""
    try:
        reader = _reader(path)
        reader.ReadImageInformation()
        dimension, shape = reader.GetDimension(), tuple(int(edge) for edge in reader.GetSize())
        name = sitk.GetPixelIDValueAsString(reader.GetPixelID())
        direction = np.asarray(reader.GetDirection()).reshape(dimension, dimension)[:3, :3]
        spacing, origin = np.asarray(reader.GetSpacing())[:3], np.asarray(reader.GetOrigin())[:3]
    except UserError:
        raise
    except Exception as error:
        raise unreadable(path, error) from None
    match = PIXEL.fullmatch(name)
    dtype = np.dtype(f"{KINDS[match[2]]}{int(match[1]) // 8}" if match else "V1")
    affine = np.eye(4)
    if dimension >= 3:
        # ITK's axes point to left, posterior, superior (LPS); NIfTI's to right, anterior, superior (RAS).
        affine[:3, :3], affine[:3, 3] = direction * spacing, origin
        affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    return Header(shape, dtype, affine)


def read_voxels(path: Path) -> NDArray[Any]:
    """Voxels (x, y, z). Raises any exception of ITK if the voxels cannot be read."""
    voxels: NDArray[Any] = sitk.GetArrayFromImage(_reader(path).Execute())
    return voxels.transpose()  # (z, y, x) -> (x, y, z), without a copy


def write_image(path: Path, voxels: NDArray[Any], affine: Affine) -> None:
    """Write voxels (x, y, z) with a diagonal affine in mm."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.transpose()))
    image.SetSpacing([float(value) for value in np.diag(affine)[:3]])
    # ITK's axes point to left, posterior, superior (LPS).
    image.SetDirection([-1.0, 0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 1.0])
    image.SetOrigin([float(value) for value in affine[:3, 3] * (-1, -1, 1)])
    sitk.WriteImage(image, str(path))


def _reader(path: Path) -> Any:
    """A SimpleITK reader of a file whose header was checked. Raises UserError for a header that must not be read."""
    voxel_files(path)  # raises UserError for names that lead elsewhere
    sitk.ProcessObject.SetGlobalWarningDisplay(False)
    reader = sitk.ImageFileReader()
    # ITK must not choose the reader itself: another one would use other fields than those that were checked.
    reader.SetImageIO("NrrdImageIO" if path.suffix in NRRD else "MetaImageIO")
    reader.SetFileName(str(path))
    return reader


def voxel_files(path: Path) -> list[Path]:
    """The files beside a text header that hold its voxels; none where it holds them itself.

    Raises:
        UserError: the header must not be read, or names a file elsewhere, several files, a pipe or a device.
    """
    files = []
    for name in _named_files(path):
        if name.upper() == "LOCAL":
            continue
        if name != Path(name).name or name in ("", ".", "..") or "%" in name or name.upper().startswith("LIST"):
            raise UserError(
                f"{path}: its voxels are in {name!r}; only a single file beside the header is read: move it there"
            )
        files.append(path.with_name(name))
        file_size(files[-1])  # raises UserError for a pipe or a device, which would never end
    return files


def _named_files(path: Path) -> list[str]:
    """The names of files in a text header, as written there. Raises UserError for a header that must not be read."""
    with path.open("rb") as file:
        text = file.read(LONGEST_HEADER + 1)
    # A header of NRRD ends with an empty line, one of MetaImage with the line that names the file of the voxels.
    end = re.search(
        rb"\r?\n\r?\n" if path.suffix in NRRD else rb"^[ \t]*ElementDataFile[ \t]*[=:][^\n]*", text, re.MULTILINE
    )
    if end is None and len(text) > LONGEST_HEADER:
        raise UserError(f"{path}: its header is longer than {LONGEST_HEADER >> 20} MiB: is this an image?")
    header = text[: end.end()] if end else text
    _check_fields(path, header.decode("latin-1"))
    return [name.decode(errors="replace") for name in NAMED_FILE.findall(header)]


def _check_fields(path: Path, header: str) -> None:
    """Raises UserError for a field that crashes ITK or makes it loop without end; ITK itself refuses all other bad fields."""
    nrrd, fields = path.suffix in NRRD, dict[str, str]()
    for line in (text.removesuffix("\r") for text in header.split("\n")):
        match = FIELD.fullmatch(line)
        key, value = (match[1].replace(" ", "").strip().lower(), match[2].strip()) if match else ("", "")
        fields[key] = value
        problem = ""
        if CONTROL.search(line) or not (nrrd or match or not line.strip()):
            problem = f"a line that is no field, {line[:40]!r}"
        elif nrrd and len(line) > LONGEST_LINE and not UNLIMITED_LINE.match(line):
            problem = f"a line of {len(line)} bytes, {line[:40]!r}; at most {LONGEST_LINE} are read"
        elif key in ("ndims", "dimension") and not re.fullmatch("[1-9]", value):
            problem = f"{value[:40]!r} dimensions"
        elif key in SPATIAL_FIELDS and not all(
            _is_plausible(number, nrrd) for number in re.split(r"[\s(),]+", value) if number
        ):
            problem = f"a number that is not within {FARTHEST:g} mm, {line[:80]!r}"
        if problem:
            raise UserError(f"{path} cannot be read, its header has {problem}: mend it, or write the image again")
    if fields.get("byteskip", "").startswith("-") and fields.get("encoding", "").lower() != "raw":
        raise UserError(f"{path} cannot be read, its byte skip is negative, which is for raw voxels: mend the header")


def _is_plausible(number: str, nrrd: bool) -> bool:
    """Whether a number is within FARTHEST; NRRD also has `none` and `nan`, for axes that are not spatial."""
    try:
        return (nrrd and number.lower() in ("none", "nan")) or abs(float(number)) <= FARTHEST
    except ValueError:
        return False
