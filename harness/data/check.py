"""`harness data check`: every file of a data set opened, and everything found that would spoil a run or deserves a look."""

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
from harness.data.cases import Loaded, case_bytes, load_case, num_workers
from harness.data.duplicates import Signature, signature, twins
from harness.data.image_files import read_header
from harness.data.pictures import colours
from harness.data.preprocessing import normalise, preprocessed_extent
from harness.system.console import progress
from harness.system.errors import UserError
from harness.system.files import check_name

SPOILS, LOOK = "spoils a run", "deserves a look"
OUTSIDE = 0.5  # of a target's voxels that lie where the image has nothing
SPACING_RANGE = (0.05, 20.0)  # mm
THUMBNAIL = 96


@dataclass(frozen=True)
class Problem:
    """What is wrong with a case: `kind` is a heading of the report, `weight` is SPOILS or LOOK."""

    weight: str
    kind: str
    case: str
    text: str


@dataclass
class Checked:
    """One case as it was found; `thumbnail` is (rows, columns, 3) uint8, `voxels` per label value."""

    case: Case
    problems: list[Problem] = field(default_factory=list)
    shape: tuple[int, ...] = ()
    spacing: tuple[float, ...] = ()
    axes: str = ""
    types: str = ""
    voxels: dict[int, int] = field(default_factory=dict)
    thumbnail: NDArray[np.uint8] | None = None
    signature: Signature | None = None


def check_cases(images: ImageSet, cases: Sequence[Case]) -> list[Checked]:
    """Check every case, and then the set as a whole: duplicates and scans that are unlike the others."""
    largest = max(map(case_bytes, cases), default=1)
    with ThreadPoolExecutor(num_workers(largest, len(cases))) as pool:
        checked = list(progress(pool.map(partial(_check_case, images), cases), "check", total=len(cases)))
    _names(checked)
    _duplicates(checked)
    _unlike_the_others(checked)
    return checked


def _check_case(images: ImageSet, case: Case) -> Checked:
    found = Checked(case)

    def problem(weight: str, kind: str, text: str) -> None:
        found.problems.append(Problem(weight, kind, case.id, text))

    types = []
    for path in case.files:
        try:
            types.append(str(read_header(path).dtype))
        except UserError as error:
            problem(SPOILS, "files that cannot be used", str(error))
    found.types = ", ".join(dict.fromkeys(types))
    if found.problems:
        return found
    try:
        loaded = load_case(images, case)
        for channel in loaded.image:
            _contrast(images, channel, case)
        _room(images, loaded, case)
    except UserError as error:
        problem(SPOILS, _kind(str(error)), str(error))
        return found
    found.shape, found.spacing = loaded.image.shape[1:], tuple(float(v) for v in loaded.spacing)
    found.axes = "".join(nib.orientations.aff2axcodes(loaded.affine))
    found.signature = np.stack([signature(channel) for channel in loaded.image])
    found.thumbnail = _thumbnail(images, loaded)
    for note in loaded.notes:
        problem(LOOK, "labels that are not whole numbers", note)
    if not all(SPACING_RANGE[0] <= edge <= SPACING_RANGE[1] for edge in found.spacing):
        problem(LOOK, "odd spacings", f"{case.images[0]}: {_spacing(found.spacing)} mm")
    if loaded.label is not None:
        counts = np.bincount(loaded.label.ravel(), minlength=256)
        found.voxels = {value: int(counts[value]) for value in images.labels}
        _check_label(images, loaded, loaded.label, found, problem)
    return found


def _check_label(images: ImageSet, loaded: Loaded, label: NDArray[np.uint8], found: Checked, problem: Any) -> None:
    absent = [name for name, values in images.targets.items() if not any(found.voxels[value] for value in values)]
    if len(absent) == len(images.targets):
        problem(LOOK, "empty labels", f"{found.case.label}: no voxel of any target")
    elif absent:
        problem(LOOK, "absent targets (counted, not averaged)", f"{found.case.label}: no {', '.join(absent)}")
    empty = np.ones(label.shape, dtype=np.bool_)
    for channel in loaded.image:
        if isinstance(images.normalisation, Window):
            # Air, and only air: a window may well cut off tissue that belongs to a target.
            empty &= channel <= min(images.normalisation.low, -500)
        else:
            empty &= channel == 0
    inside = label > 0
    share = int(np.count_nonzero(empty & inside)) / max(1, int(np.count_nonzero(inside)))
    if share > OUTSIDE:
        problem(
            LOOK,
            "labels outside of the body",
            f"{found.case.label}: {share:.0%} of its labelled voxels lie where the image has nothing: does it belong to it?",
        )


def _contrast(images: ImageSet, channel: NDArray[np.float32], case: Case) -> None:
    low, high = float(channel.min()), float(channel.max())
    if low == high:
        raise UserError(f"{case.images[0]}: a channel has the same value {low:g} everywhere: restore the image")
    normalise(channel, images.normalisation, str(case.images[0]))


def _room(images: ImageSet, loaded: Loaded, case: Case) -> None:
    order = nib.orientations.io_orientation(loaded.affine)[:, 0].astype(int).argsort()
    shape, spacing = np.array(loaded.image.shape[1:])[order], loaded.spacing[order]
    target = spacing if images.spacing is None else images.spacing
    preprocessed_extent(shape, spacing, target, len(loaded.image), str(case.images[0]))


def _kind(text: str) -> str:
    """A heading for a problem, from its words."""
    kinds = {
        "NaN": "NaN and infinite voxels",
        "label values": "label values",
        "same value": "constant images",
        "outside of the window": "constant images",
        "resampling it": "spacings that cannot be",
        "axes run": "mirrored or turned",
        "same grid": "images and labels on different grids",
        "different affines": "images and labels on different grids",
        "channels": "channels",
        "without a sign": "intensities",
    }
    return next((kind for words, kind in kinds.items() if words in text), "files that cannot be used")


def _names(checked: Sequence[Checked]) -> None:
    """Names that cannot be a file's or a table's, and names of two cases."""
    first: dict[str, Checked] = {}
    for each in checked:
        try:
            # A scan of a corpus is named by its path, which nothing is written to.
            check_name(each.case.id.replace("/", "_") if each.case.label is None else each.case.id)
        except UserError as error:
            each.problems.append(Problem(SPOILS, "names", each.case.id, str(error)))
        other = first.setdefault(each.case.id, each)
        if other is not each:
            text = f"{each.case.images[0]} has the name of another case: rename one"
            each.problems.append(Problem(SPOILS, "names", each.case.id, text))


def _duplicates(checked: Sequence[Checked]) -> None:
    readable = [each for each in checked if each.signature is not None]
    for i, j in twins([each.signature for each in readable if each.signature is not None]):
        first, second = readable[i], readable[j]
        text = f"{second.case.images[0]} is the same scan as {first.case.images[0]}: they count as one patient"
        second.problems.append(Problem(LOOK, "duplicates", second.case.id, text))


def _unlike_the_others(checked: Sequence[Checked]) -> None:
    readable = [each for each in checked if each.shape]
    if len(readable) < 5:
        return
    spacings = np.array([sorted(each.spacing) for each in readable])
    median = np.median(spacings, axis=0)
    for each, spacing in zip(readable, spacings, strict=True):
        if (spacing > 5 * median).any() or (spacing < median / 5).any():
            text = f"{each.case.images[0]}: {_spacing(each.spacing)} mm, the median is {_spacing(median)}"
            each.problems.append(Problem(LOOK, "odd spacings", each.case.id, text))


def _spacing(values: Any) -> str:
    return " x ".join(f"{value:.3g}" for value in values)


def _thumbnail(images: ImageSet, loaded: Loaded) -> NDArray[np.uint8]:
    """The axial slice with the most labelled voxels, its labels in colour, patient's right on the left."""
    orientation = nib.orientations.io_orientation(loaded.affine)
    image = nib.orientations.apply_orientation(loaded.image[0], orientation)
    middle = image.shape[2] // 2
    label = None
    if loaded.label is not None:
        label = nib.orientations.apply_orientation(loaded.label, orientation)
        if label.any():
            middle = int((label > 0).sum(axis=(0, 1)).argmax())
    spacing = np.empty(3)
    spacing[orientation[:, 0].astype(int)] = loaded.spacing
    extent = np.array(image.shape[:2]) * spacing[:2]
    size = np.maximum(1, np.round(THUMBNAIL * extent / extent.max())).astype(int)
    rows, columns = (np.linspace(0, n - 1, m).round().astype(int) for n, m in zip(image.shape[:2], size, strict=True))
    shown = image[:, :, middle][np.ix_(rows, columns)]
    low, high = (
        (images.normalisation.low, images.normalisation.high)
        if isinstance(images.normalisation, Window)
        else np.percentile(shown, (0.5, 99.5))
    )
    grey = ((shown - low) / max(1e-9, high - low)).clip(0, 1)
    colour = np.repeat(grey[..., None] * 255, 3, axis=2)
    if label is not None:
        picked = label[:, :, middle][np.ix_(rows, columns)]
        for value, named in zip(images.labels[1:], colours(len(images.labels) - 1), strict=True):
            rgb = [int(named[place : place + 2], 16) for place in (1, 3, 5)]
            colour[picked == value] = 0.5 * colour[picked == value] + 0.5 * np.array(rgb)
    return colour[::-1, ::-1].transpose(1, 0, 2).astype(np.uint8)


def problems_of(checked: Sequence[Checked]) -> dict[tuple[str, str], list[Problem]]:
    """Problems by (weight, kind): what spoils a run first, then the most frequent."""
    groups: dict[tuple[str, str], list[Problem]] = {}
    for each in checked:
        for problem in each.problems:
            groups.setdefault((problem.weight, problem.kind), []).append(problem)
    return dict(sorted(groups.items(), key=lambda item: (item[0][0] != SPOILS, -len(item[1]), item[0][1])))


def report_path(runs: Path, name: str) -> Path:
    """Where the report of a data set goes."""
    return runs / "checks" / f"{name}.html"
