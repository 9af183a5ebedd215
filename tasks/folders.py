"""Data sets with a `dataset.json`: the Medical Segmentation Decathlon and raw data sets of nnU-Net v2."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import floor, log10
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, Field, ValidationError

import harness
from harness import IMAGE_ENDINGS, Case, Percentiles, Task, UserError, Window, slug, stem

FOLDER_NAME = re.compile(r"(?:Task|Dataset)\d+_(.+)")
WHOLE_CT = Window(-1000, 1000)  # HU; cuts off dense bone only; `--set task.window` narrows it


class _Entry(BaseModel):
    """A training case of the Decathlon: paths relative to `dataset.json`."""

    image: str
    label: str


class _Decathlon(BaseModel):
    """The fields of a Decathlon `dataset.json` that are used."""

    name: str = ""
    description: str = ""
    licence: str = "see dataset.json"
    num_training: Any = Field(None, alias="numTraining")
    modality: dict[int, str] = Field(min_length=1)
    labels: dict[int, str] = Field(min_length=2)
    training: list[_Entry] = []
    validation: list[Any] = []

    def labelled(self) -> list[_Entry]:
        """The labelled cases: those of `training`, and those of `validation` that have a label, as AMOS and MONAI list them."""
        more = [entry for entry in self.validation if isinstance(entry, dict) and entry.keys() >= {"image", "label"}]
        return [*self.training, *map(_Entry.model_validate, more)]

    def regions(self) -> dict[str, tuple[int, ...]]:
        """Label name -> label values that make it up, background included."""
        return {name: (value,) for value, name in sorted(self.labels.items())}

    def channels(self) -> dict[int, str]:
        """Number of a channel -> its name."""
        return self.modality


class _Listed(BaseModel):
    """A training case that nnU-Net's `dataset` lists: paths relative to `dataset.json`."""

    images: list[str] = Field(min_length=1)
    label: str


class _NNUNet(BaseModel):
    """The fields of an nnU-Net v2 `dataset.json` that are used."""

    name: str = ""
    description: str = ""
    licence: str = "see dataset.json"
    num_training: Any = Field(None, alias="numTraining")
    channel_names: dict[int, str] = Field(min_length=1)
    labels: dict[str, int | list[int]] = Field(min_length=2)
    file_ending: str
    dataset: dict[str, _Listed] | None = None

    def regions(self) -> dict[str, tuple[int, ...]]:
        """Label name -> label values that make it up, background included."""
        return {n: tuple(value) if isinstance(value, list) else (value,) for n, value in self.labels.items()}

    def channels(self) -> dict[int, str]:
        """Number of a channel -> its name."""
        return self.channel_names


Description = _Decathlon | _NNUNet


@dataclass(frozen=True, kw_only=True)
class FolderTask(Task):
    """A data set in a folder with `dataset.json`, in the layout of the Decathlon or of nnU-Net v2.

    Attributes:
        folder: name of the folder as unpacked.
        titles: other names of the data set, in `dataset.json` or in a folder's name.
        names: names of the labels from 1 on in `dataset.json`, if they differ from the targets' names.
    """

    folder: str
    titles: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def find(self, data: Path) -> Path:
        """The folder of the data set: `data` or a folder of its name in it.

        Raises:
            UserError: there is none, or its `dataset.json` describes another data set.
        """
        named = sorted(path for path in data.iterdir() if self._is_named(path.name)) if data.is_dir() else []
        for root in (data, data / self.folder, *named):
            if (root / "dataset.json").is_file():
                break
        else:
            raise UserError(
                f"task {self.name!r}: no dataset.json in {data} nor in {data / self.folder}: give --data the task's "
                "folder or the one that contains it"
            )
        described = read_description(root)
        if not self._describes(described):
            raise UserError(
                f"task {self.name!r}: {root / 'dataset.json'} describes {described.name!r} with {len(described.channels())} "
                f"channels and labels {_inline(described)}; expected {len(self.channels)} channels and labels "
                f"{', '.join(map(str, self.labels))} ({', '.join(self.targets)}): give --data the folder {self.folder}, "
                f"or --task {root} to use this one"
            )
        return root

    def cases(self, root: Path) -> list[Case]:
        """The labelled cases, sorted by id. Raises UserError if `dataset.json` cannot be used or lists no case."""
        described = read_description(root)
        cases = (
            _decathlon_cases(root, described) if isinstance(described, _Decathlon) else _nnunet_cases(root, described)
        )
        if not cases:
            raise UserError(f"{root / 'dataset.json'}: 'training' must list the labelled cases, it lists none")
        stated = described.num_training
        if isinstance(stated, int) and stated != len(cases):
            harness.say_once(
                f"{root / 'dataset.json'} says numTraining {stated}, {len(cases)} labelled cases are there"
            )
        return sorted(cases, key=lambda case: case.id)

    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Write one phantom case in the Decathlon's layout and add it to `dataset.json`."""
        name = f"{_title(self.folder).lower()}_{number:03d}.nii.gz"
        for subfolder, voxels in (
            ("imagesTr", np.moveaxis(images, 0, -1) if len(images) > 1 else images[0]),
            ("labelsTr", label),
        ):
            harness.write_image(root / subfolder / name, voxels, affine)
        path = root / "dataset.json"
        described: dict[str, Any] = json.loads(path.read_text()) if path.exists() else self._description()
        described["training"].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        described["numTraining"] = len(described["training"])
        path.write_text(json.dumps(described, indent=1))

    def _description(self) -> dict[str, Any]:
        """Content of the `dataset.json` of a phantom, without cases."""
        names = dict(zip(self.labels, ("background", *(self.names or self.targets)), strict=True))
        return {
            "name": self.titles[0] if self.titles else self.name,
            "description": f"phantom in the layout of {self.folder}, not real data",
            "reference": self.reference,
            "licence": self.licence,
            "tensorImageSize": "3D" if len(self.channels) == 1 else "4D",
            "modality": {str(number): channel for number, channel in enumerate(self.channels)},
            "labels": {str(value): name for value, name in names.items()},
            "training": [],
            "numTest": 0,
            "test": [],
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "FolderTask | None":
        """A task from any folder with `dataset.json`, in either layout; None if there is no `dataset.json`.

        The file gives the channels, the targets and whether they overlap. The version is a digest of these, so that results for
        other targets are never those of this task. The spacing is the median over the cases, and the crops follow from the
        median extent. CT (all channels have this name) gets the window from -1000 to 1000 HU, other images are scaled by
        percentiles.

        Raises:
            UserError: `dataset.json` exists but cannot be used.
        """
        if not (folder / "dataset.json").is_file():
            return None
        described = read_description(folder)
        title = described.name or _title(folder.resolve().name)
        regions = described.regions()
        overlapping = isinstance(described, _NNUNet) and any(isinstance(v, list) for v in described.labels.values())
        channels = tuple(name for _, name in sorted(described.channels().items()))
        targets = {target_name(name): values for name, values in regions.items() if values != (0,)}
        meaning = repr((channels, list(targets.items()), overlapping)).encode(errors="surrogateescape")
        task = FolderTask(
            name=slug(title),
            version=hashlib.blake2b(meaning, digest_size=4).hexdigest(),
            description=described.description or title,
            licence=described.licence,
            reference="",
            channels=channels,
            targets=targets,
            labels=tuple(sorted({0} | {value for values in regions.values() for value in values})),
            overlapping=overlapping,
            spacing=None,
            normalisation=WHOLE_CT if _is_ct(channels) else Percentiles(),
            folder=folder.name,
            titles=(title,),
        )
        return _with_geometry(task, folder)

    def recognises(self, folder: Path) -> bool:
        """Whether a folder with `dataset.json` has a name of this task, its labels and its channels."""
        described = read_description(folder)
        title = described.name or _title(folder.resolve().name)
        return self._is_named(title) and self._describes(described) and self._names_labels(described)

    def _is_named(self, name: str) -> bool:
        """Whether `name` is a name of this task, whatever its case, its separators and its number."""
        return _normalised(_title(name)) in {_normalised(_title(self.folder)), *map(_normalised, self.titles)}

    def _describes(self, described: Description) -> bool:
        """Whether a description fits this task.

        Label values, number of channels and CT or not must be those of the task, and also its name or its label names.
        """
        values = {value for region in described.regions().values() for value in region} | {0}
        channels = described.channels().values()
        if (
            len(channels) != len(self.channels)
            or values != set(self.labels)
            or _is_ct(channels) != _is_ct(self.channels)
        ):
            return False
        return self._is_named(described.name) or self._names_labels(described)

    def _names_labels(self, described: Description) -> bool:
        """Whether the labels of a description have the names that this task expects."""
        names = {region: _normalised(name) for name, region in described.regions().items() if region != (0,)}
        expected = (
            {(value,): name for value, name in zip(self.labels[1:], self.names, strict=True)}
            if self.names
            else {values: name for name, values in self.targets.items()}
        )
        return names == {region: _normalised(name) for region, name in expected.items()}


def crops(extent: Sequence[float], **budgets: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Presets with crops that follow from the median extent of a data set in voxels.

    Each edge is the multiple of 32 that is nearest to the extent, from 32 to 64 (demo), 96 (small and paper) or 128 (nnunet). If
    all edges were 32, the longest one is 64.

    Args:
        budgets: preset name -> further settings of the preset.
    """
    nearest = [max(32, 32 * round(edge / 32)) for edge in extent]
    if max(nearest) == 32:  # the deepest features would be a single voxel, which cannot be normalised
        nearest[int(np.argmax(extent))] = 64
    presets = {}
    for preset, longest in (("demo", 64), ("small", 96), ("paper", 96), ("nnunet", 128)):
        crop = tuple(min(longest, edge) for edge in nearest)
        presets[preset] = {"pretrain.crop": crop, "finetune.crop": crop, **budgets.get(preset, {})}
    return presets


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Raises ValueError where a name occurs twice: readers take one of the two without a word."""
    names = [name for name, _ in pairs]
    if twice := [name for name in dict.fromkeys(names) if names.count(name) > 1]:
        raise ValueError(f"{twice[0][:80]!r} occurs twice in one object: keep one")
    return dict(pairs)


@cache
def _read(path: Path, changed: int) -> Description:
    """Read and check a `dataset.json`. `changed` is its time of modification, so that a changed file is read again."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=_once)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {' '.join(str(error).split())[:160]}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(content).__name__}")
    if "channel_names" not in content and "modality" not in content:
        raise UserError(
            f"{path} is no description of a data set: it has neither 'modality' (Decathlon) nor 'channel_names' (nnU-Net v2)"
        )
    content = {name: value for name, value in content.items() if value is not None}  # some write null for nothing
    try:
        described: Description = (_NNUNet if "channel_names" in content else _Decathlon).model_validate(content)
        if isinstance(described, _Decathlon):
            described.labelled()  # its entries are checked here, too
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(f"{path}: {where} = {str(problem['input'])[:80]!r} cannot be used: {problem['msg']}") from None
    _check(path, described)
    return described


def read_description(root: Path) -> Description:
    """The validated content of `dataset.json`. Raises UserError if it does not describe a data set."""
    path = root / "dataset.json"
    return _read(path, path.stat().st_mtime_ns if path.exists() else 0)


def _check(path: Path, described: Description) -> None:
    """Raises UserError for channels or labels that this harness cannot use."""
    channels, regions = described.channels(), described.regions()
    if sorted(channels) != list(range(len(channels))):
        raise UserError(f"{path}: channels are numbered {sorted(channels)}: number them from 0 without a gap")
    values = [value for region in regions.values() for value in region]
    if (bad := [value for value in values if not 0 <= value <= 255]) or () in regions.values():
        raise UserError(
            f"{path}: labels are whole numbers of 0..255, one or more each; it has {bad or 'an empty list'}"
        )
    if (0,) not in regions.values():
        raise UserError(f"{path}: no label is 0: name the background, as 0")
    if any(name.casefold() == "ignore" for name in regions):
        raise UserError(f"{path}: an 'ignore' label is not supported: every voxel counts here; give the voxels a label")
    names = [target_name(name) for name in regions]
    if len(set(names)) < len(names) or "average" in names:
        raise UserError(f"{path}: label names {', '.join(regions)} cannot be told apart, or one is 'average': rename")
    single = [region for region in regions.values() if len(region) == 1]
    if len(set(single)) < len(single):
        raise UserError(f"{path}: two labels have the same value ({_inline(described)}): give each its own")


def _decathlon_cases(root: Path, described: _Decathlon) -> list[Case]:
    """The labelled cases that a Decathlon `dataset.json` lists.

    nnU-Net v1 lists `imagesTr/CASE.nii.gz` for the files `imagesTr/CASE_0000.nii.gz`, `CASE_0001.nii.gz`, ...
    """
    cases = []
    for entry in described.labelled():
        image, label = _inside(root, entry.image), _inside(root, entry.label)
        name = stem(image)
        ending = image.name.removeprefix(name)
        channels = tuple(image.with_name(f"{name}_{number:04d}{ending}") for number in range(len(described.modality)))
        one_each = not image.exists() and channels[0].exists()
        cases.append(Case(id=name, images=channels if one_each else (image,), label=label))
    return cases


def _nnunet_cases(root: Path, described: _NNUNet) -> list[Case]:
    """The labelled cases of an nnU-Net data set: those that `dataset` lists, or all in imagesTr.

    Raises:
        UserError: imagesTr is missing, a case lacks a channel, the file ending is unknown, or a path leaves the folder.
    """
    if described.dataset is not None:
        return [
            Case(
                id=name,
                images=tuple(_inside(root, image) for image in listed.images),
                label=_inside(root, listed.label),
            )
            for name, listed in described.dataset.items()
        ]
    ending = described.file_ending
    if ending not in IMAGE_ENDINGS:
        raise UserError(
            f"{root / 'dataset.json'}: file_ending {ending!r} is not read here: use {', '.join(IMAGE_ENDINGS)}"
        )
    images, number = root / "imagesTr", len(described.channel_names)
    if not images.is_dir():
        raise UserError(
            f"{images} is missing: an nnU-Net data set has imagesTr/CASE_0000{ending} and labelsTr/CASE{ending}"
        )
    files = sorted(path for path in images.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))
    if not files:
        present = ", ".join(sorted(path.name for path in images.iterdir())[:3]) or "nothing"
        raise UserError(
            f"{images}: no file ends in {ending}, which dataset.json says ('file_ending'); there is {present}"
        )
    labels = root / "labelsTr"
    if number == 1 and all((labels / path.name).exists() for path in files):  # no channel in names, which labels share
        return [Case(id=stem(path), images=(path,), label=labels / path.name) for path in files]
    pattern = re.compile(rf"(.+)_(\d{{4}}){re.escape(ending)}", re.DOTALL)
    channels_of_cases: dict[str, set[int]] = {}
    for path in files:
        if match := pattern.fullmatch(path.name):
            channels_of_cases.setdefault(match[1], set()).add(int(match[2]))
    if not channels_of_cases:
        raise UserError(
            f"{images}: no file is named CASE_0000{ending}, as nnU-Net v2 has it; there is {files[0].name}: rename the files, or "
            "list them under 'dataset' in dataset.json"
        )
    cases = []
    for name, channels in channels_of_cases.items():
        if channels != set(range(number)):
            raise UserError(
                f"{images / name}: channels {', '.join(f'{c:04d}' for c in sorted(channels))} are there, "
                f"{', '.join(f'{c:04d}' for c in range(number))} are due: restore what is missing or take the case out"
            )
        paths = tuple(images / f"{name}_{channel:04d}{ending}" for channel in range(number))
        cases.append(Case(id=name, images=paths, label=labels / f"{name}{ending}"))
    return cases


def _inside(root: Path, name: str) -> Path:
    """The path of a file that `dataset.json` names, relative to `root` or absolute, with slashes or backslashes.

    Raises:
        UserError: it leaves the folder; the user's links may leave it.
    """
    given, name = name, name.replace("\\", "/")
    try:
        valid = b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:  # a lone surrogate
        valid = False
    if valid and Path(name).is_absolute():
        name = os.path.relpath(os.path.normpath(name), root.absolute())
    if not valid or Path(os.path.normpath(name)).parts[:1] == ("..",):
        raise UserError(
            f"{root / 'dataset.json'}: {given[:200]!r} leaves the task's folder, or is no path: name files below it"
        )
    return root / os.path.normpath(name)


def target_name(label: str) -> str:
    """The name of a target: that of the label in lower-case letters, digits and underscores, of any script."""
    return re.sub(r"[^\w]+|_+", "_", label.lower()).strip("_") or "unnamed"


def _with_geometry(task: FolderTask, folder: Path) -> FolderTask:
    """The task with the median spacing of its cases and with crops from their median extent, along the canonical axes.

    A header that cannot be read is skipped here, because it is reported when its case is opened.

    Raises:
        UserError: no header can be read.
    """
    spacings, extents, problem = [], [], None
    for case in task.cases(folder):
        try:
            header = harness.read_header(case.images[0])
        except UserError as error:
            problem = problem or error
            continue
        order = header.canonical_axes
        spacings.append(header.spacing[order])
        extents.append(np.asarray(header.shape[:3])[order] * header.spacing[order])
    if problem is not None and not spacings:
        raise problem
    median = np.median(spacings, axis=0)
    # Four decimals; for the smaller spacings of a microscope four significant digits.
    x, y, z = (round(float(value), max(4, 3 - floor(log10(value)))) for value in median)
    return replace(task, spacing=(x, y, z), presets=crops(list(np.median(extents, axis=0) / median)))


def _is_ct(channels: Iterable[str]) -> bool:
    """Whether all channels are named CT."""
    return all(name.casefold() == "ct" for name in channels)


def _title(name: str) -> str:
    """Name of a data set from its folder's name: without `TaskNN_` or `DatasetNNN_`."""
    match = FOLDER_NAME.fullmatch(name)
    return match[1] if match else name


def _normalised(name: str) -> str:
    """A name for comparison: case, separators and the spelling of tumour do not matter."""
    return slug(name).replace("_", "").replace("tumour", "tumor")


def _inline(described: Description) -> str:
    """The labels of a description in one line, for messages."""
    return ", ".join(f"{'+'.join(map(str, values))} {name}" for name, values in described.regions().items())
