"""`harness data check`: opens every file of a data set and lists all problems that would spoil a run or deserve a look."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from harness.api.task import Case, ImageSet, Window
from harness.data.cases import (
    FEW_VALUES,
    LoadedCase,
    case_bytes,
    has_lost_intercept,
    load_case,
    looks_like_labels,
    num_workers,
)
from harness.data.duplicates import Signature, duplicate_pairs, signature
from harness.data.image_files import read_header
from harness.data.pictures import colours
from harness.data.preprocessing import normalise, preprocessed_extent
from harness.system.console import progress
from harness.system.errors import UserError
from harness.system.files import check_name

SPOILS, LOOK = "spoils a run", "deserves a look"
OUTSIDE = 0.5  # share of the labelled voxels in empty space above which a label map is reported
SPACING_RANGE = (0.05, 20.0)  # mm
THUMBNAIL = 96  # pixels along the longer edge


@dataclass(frozen=True)
class Problem:
    """A problem of a case: `kind` is a heading of the report, `weight` is SPOILS or LOOK."""

    weight: str
    kind: str
    case: str
    text: str


@dataclass
class CheckedCase:
    """Result of checking one case.

    Attributes:
        spacing: voxel edges in mm along the array axes.
        axes: orientation of the array axes, for instance "RAS".
        types: voxel types of the files.
        voxels: label value -> number of voxels.
        thumbnail: an axial slice, (rows, columns, 3) uint8.
    """

    case: Case
    problems: list[Problem] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    axes: str = ""
    types: str = ""
    voxels: dict[int, int] = field(default_factory=dict)
    thumbnail: NDArray[np.uint8] | None = None
    signature: Signature | None = None


def check_cases(images: ImageSet, cases: Sequence[Case]) -> list[CheckedCase]:
    """Check every case, then the data set as a whole: names, duplicates, and scans unlike the others."""
    largest = max(map(case_bytes, cases), default=1)
    with ThreadPoolExecutor(num_workers(largest, len(cases))) as pool:
        checked = list(progress(pool.map(partial(_check_case, images), cases), "check", total=len(cases)))
    _check_names(checked)
    _check_duplicates(checked)
    _check_outliers(checked)
    return checked


def _check_case(images: ImageSet, case: Case) -> CheckedCase:
    """Check the headers, the voxels and the label of one case."""
    result = CheckedCase(case)

    def problem(weight: str, kind: str, text: str) -> None:
        """Add a problem of this case."""
        result.problems.append(Problem(weight, kind, case.id, text))

    types = []
    for path in case.files:
        try:
            types.append(str(read_header(path).dtype))
        except UserError as error:
            problem(SPOILS, "files that cannot be used", str(error))
    result.types = ", ".join(dict.fromkeys(types))
    if result.problems:
        return result
    try:
        loaded = load_case(images, case)
        for channel in loaded.image:
            _check_contrast(images, channel, case)
        _check_memory(images, loaded, case)
    except UserError as error:
        problem(SPOILS, _heading(str(error)), str(error))
        return result
    result.shape, result.spacing = loaded.image.shape[1:], tuple(float(v) for v in loaded.spacing)
    result.axes = "".join(nib.orientations.aff2axcodes(loaded.affine))
    result.signature = np.stack([signature(channel) for channel in loaded.image])
    result.thumbnail = _thumbnail(images, loaded)
    if looks_like_labels(loaded.image):
        problem(
            LOOK,
            "label maps?",
            f"{case.images[0]}: at most {FEW_VALUES} whole values, as a label map has: is it a scan?",
        )
    if images.hounsfield and has_lost_intercept(loaded.image):
        problem(
            LOOK, "intensities", f"{case.images[0]}: no air, and much above 300 HU: was the intercept of -1024 lost?"
        )
    for note in loaded.notes:
        problem(LOOK, "labels that are not whole numbers", note)
    if not all(SPACING_RANGE[0] <= edge <= SPACING_RANGE[1] for edge in result.spacing):
        problem(LOOK, "odd spacings", f"{case.images[0]}: {_spacing(result.spacing)} mm")
    if loaded.label is not None:
        counts = np.bincount(loaded.label.ravel(), minlength=256)
        result.voxels = {value: int(counts[value]) for value in images.labels}
        _check_label(images, loaded, loaded.label, result, problem)
    return result


def _check_label(
    images: ImageSet, loaded: LoadedCase, label: NDArray[np.uint8], result: CheckedCase, problem: Any
) -> None:
    """Report empty labels, absent targets, and labels in empty space."""
    absent = [name for name, values in images.targets.items() if not any(result.voxels[value] for value in values)]
    if len(absent) == len(images.targets):
        problem(LOOK, "empty labels", f"{result.case.label}: no voxel of any target")
    elif absent:
        problem(LOOK, "absent targets (counted, not averaged)", f"{result.case.label}: no {', '.join(absent)}")
    empty = np.ones(label.shape, dtype=np.bool_)
    for channel in loaded.image:
        if images.hounsfield:
            # Only air counts as empty: a window may cut off tissue that belongs to a target.
            low = images.normalisation.low if isinstance(images.normalisation, Window) else -500
            empty &= channel <= min(low, -500)
        else:
            empty &= channel == 0
    labelled = label > 0
    share = int(np.count_nonzero(empty & labelled)) / max(1, int(np.count_nonzero(labelled)))
    if share > OUTSIDE:
        problem(
            LOOK,
            "labels outside of the body",
            f"{result.case.label}: {share:.0%} of its labelled voxels lie where the image has nothing: does it belong to it?",
        )


def _check_contrast(images: ImageSet, channel: NDArray[np.float32], case: Case) -> None:
    """Raises UserError if a channel is constant or cannot be normalised."""
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        raise UserError(f"{case.images[0]}: a channel has the same value {low:g} everywhere: restore the image")
    normalise(channel, images.normalisation, str(case.images[0]))


def _check_memory(images: ImageSet, loaded: LoadedCase, case: Case) -> None:
    """Raises UserError if the case cannot be resampled to the spacing of the data set, or not in the free memory."""
    order = nib.orientations.io_orientation(loaded.affine)[:, 0].astype(int).argsort()
    shape, spacing = np.array(loaded.image.shape[1:])[order], loaded.spacing[order]
    target = spacing if images.spacing is None else images.spacing
    preprocessed_extent(shape, spacing, target, len(loaded.image), str(case.images[0]))


def _heading(text: str) -> str:
    """The heading for a problem, chosen by words in its message."""
    kinds = {
        "NaN": "NaN and infinite voxels",
        "label values": "label values",
        "same value": "constant images",
        "no contrast in the window": "intensities outside of the window",
        "resampling it": "spacings that cannot be",
        "axes run": "mirrored or turned",
        "same grid": "images and labels on different grids",
        "different affines": "images and labels on different grids",
        "channels": "channels",
        "without a sign": "intensities",
    }
    return next((kind for words, kind in kinds.items() if words in text), "files that cannot be used")


def _check_names(checked: Sequence[CheckedCase]) -> None:
    """Report names that cannot be used in files or tables, and names that two cases share."""
    first: dict[str, CheckedCase] = {}
    for result in checked:
        try:
            # The id of a corpus's scan is its path, with slashes; no output is named after it, so slashes are allowed.
            check_name(result.case.id.replace("/", "_") if result.case.label is None else result.case.id)
        except UserError as error:
            result.problems.append(Problem(SPOILS, "names", result.case.id, str(error)))
        other = first.setdefault(result.case.id, result)
        if other is not result:
            text = f"{result.case.images[0]} has the name of another case: rename one"
            result.problems.append(Problem(SPOILS, "names", result.case.id, text))


def _check_duplicates(checked: Sequence[CheckedCase]) -> None:
    """Report scans that are the same as another scan of the data set."""
    readable = [result for result in checked if result.signature is not None]
    for i, j, value in duplicate_pairs([result.signature for result in readable if result.signature is not None]):
        first, second = readable[i], readable[j]
        text = f"{second.case.images[0]} looks like {first.case.images[0]} (correlation {value:.3f}): they count as one patient"
        second.problems.append(Problem(LOOK, "duplicates", second.case.id, text))


def _check_outliers(checked: Sequence[CheckedCase]) -> None:
    """Report spacings that differ from the median by a factor of more than 5, if there are five cases at least."""
    readable = [result for result in checked if result.shape]
    if len(readable) < 5:
        return
    spacings = np.array([sorted(result.spacing) for result in readable])
    median = np.median(spacings, axis=0)
    for result, spacing in zip(readable, spacings, strict=True):
        if (spacing > 5 * median).any() or (spacing < median / 5).any():
            text = f"{result.case.images[0]}: {_spacing(result.spacing)} mm, the median is {_spacing(median)}"
            result.problems.append(Problem(LOOK, "odd spacings", result.case.id, text))


def _spacing(values: Any) -> str:
    """Voxel edges as text."""
    return " x ".join(f"{value:.3g}" for value in values)


def _thumbnail(images: ImageSet, loaded: LoadedCase) -> NDArray[np.uint8]:
    """The axial slice with the most labelled voxels, labels in colour: (rows, columns, 3) uint8.

    Without labels it is the middle slice. The patient's right is on the left.
    """
    orientation = nib.orientations.io_orientation(loaded.affine)
    image = nib.orientations.apply_orientation(loaded.image[0], orientation)
    height = image.shape[2] // 2
    label = None
    if loaded.label is not None:
        label = nib.orientations.apply_orientation(loaded.label, orientation)
        if label.any():
            height = int((label > 0).sum(axis=(0, 1)).argmax())
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = loaded.spacing
    extent = np.array(image.shape[:2]) * spacing[:2]
    size = np.maximum(1, np.round(THUMBNAIL * extent / extent.max())).astype(int)
    rows, columns = (np.linspace(0, n - 1, m).round().astype(int) for n, m in zip(image.shape[:2], size, strict=True))
    pixels = image[:, :, height][np.ix_(rows, columns)]
    low, high = (
        (images.normalisation.low, images.normalisation.high)
        if isinstance(images.normalisation, Window)
        else np.percentile(pixels, (0.5, 99.5))
    )
    grey = ((pixels - low) / max(1e-9, high - low)).clip(0, 1)
    colour = np.repeat(grey[..., None] * 255, 3, axis=2)
    if label is not None:
        label_pixels = label[:, :, height][np.ix_(rows, columns)]
        for value, hex_colour in zip(images.labels[1:], colours(len(images.labels) - 1), strict=True):
            rgb = [int(hex_colour[start : start + 2], 16) for start in (1, 3, 5)]
            colour[label_pixels == value] = 0.5 * colour[label_pixels == value] + 0.5 * np.array(rgb)
    return colour[::-1, ::-1].transpose(1, 0, 2).astype(np.uint8)


def problems_of(checked: Sequence[CheckedCase]) -> dict[tuple[str, str], list[Problem]]:
    """Problems by (weight, kind): those that spoil a run first, then the most frequent kinds first."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for result in checked:
        for problem in result.problems:
            groups.setdefault((problem.weight, problem.kind), []).append(problem)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0] != SPOILS, -len(item[1]), item[0][1])))


def report_path(runs: Path, name: str) -> Path:
    """The file that the report of a data set is written to."""
    return runs / "checks" / f"{name}.html"
