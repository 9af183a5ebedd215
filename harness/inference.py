"""New images through a finished run: `harness predict`. Needs the run's folder and its backbone, not its data."""

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from harness.config import Evaluate, Finetune, Protocol, TaskSettings
from harness.errors import UserError
from harness.files import walk
from harness.formats import ENDINGS, is_named_label, read_header, stem, write_label
from harness.images import load_case
from harness.progress import progress
from harness.registry import Registry
from harness.settings import build
from harness.task import Case, Percentiles, Task, Window
from leaderboards.records import RecordError, read_record
from leaderboards.schema import Name, Part, Record

Value = Annotated[int, Field(ge=0, le=255)]


class _Description(Part):
    """The task of a run."""

    channels: Annotated[list[Name], Field(min_length=1)]
    targets: Annotated[dict[Name, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
    labels: Annotated[list[Value], Field(min_length=1)]
    overlapping: bool


class _Prepared(Part):
    """How its volumes were prepared."""

    spacing: list[float] | None
    normalisation: Literal["Window", "Percentiles"]
    low: float
    high: float


class _Trained(Part):
    """The part of its fine-tuning that is printed."""

    crop: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)]


class _Config(Part):
    prepared: _Prepared
    finetune: _Trained
    evaluate: dict[str, Any]
    backbone_settings: dict[str, Any]


class _Usable(Record):
    """A record that the trained network can be made from."""

    protocol: Protocol
    task_description: _Description
    config: _Config


@dataclass(frozen=True, kw_only=True)
class RecordedTask(Task):
    """What a record says of its task: enough to prepare and decide, without the data's layout on disk."""

    def find(self, data: Path) -> Path:
        return data

    def cases(self, root: Path) -> list[Case]:
        return group_images(root, self.channels)

    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        raise TypeError("a recorded task has no layout to write a phantom in")


@dataclass(frozen=True)
class Restored:
    """What inference needs of a finished run."""

    task: RecordedTask
    network: Any
    trained: Finetune
    evaluate: Evaluate


def predict_images(run: Path, inputs: Sequence[Path], output: Path, plugins: Sequence[str]) -> list[Path]:
    """Segment one case (a file per channel, or one 4D file) into a file, or a folder of cases into a folder.

    Raises:
        UserError: a record that cannot be used, images that do not fit the task, or outputs that would be overwritten.
    """
    record = read_run(run)
    restored = restore(run, record, Registry(plugins))
    task = restored.task
    folder = len(inputs) == 1 and inputs[0].is_dir()
    if folder:
        cases = group_images(inputs[0], task.channels)
        if output.exists() and not output.is_dir():
            raise UserError(f"{output} is no folder, and {inputs[0]} is one: give a folder to write to")
    else:
        if output.parent.exists() and not output.parent.is_dir():
            raise UserError(f"{output.parent} is no folder: give another place to write to")
        if not output.name.endswith((".nii.gz", ".nii")):
            raise UserError(f"{output}: predictions are written as .nii.gz or .nii: give such a name")
        cases = [Case(id=stem(output), images=tuple(inputs), label=None)]
    places = [output / f"{case.id}.nii.gz" if folder else output for case in cases]
    for case in cases:
        headers = [read_header(path) for path in case.images]
        number = sum(header.shape[3] if len(header.shape) == 4 else 1 for header in headers)
        if number != len(task.channels):
            raise UserError(
                f"{case.images[0]}: {number} channels, {task.name!r} has {len(task.channels)}: {', '.join(task.channels)}: "
                "give a file for each in this order, or one 4D file"
            )
    read = {path.resolve() for case in cases for path in case.images}
    for place in places:
        if place.resolve() in read:
            raise UserError(f"{place} is an input, which would be overwritten: give another output")
    for case, place in zip(progress(cases, "predict"), places, strict=True):
        _predict(restored, case, place)
    return places


def _predict(restored: "Restored", case: Case, place: Path) -> None:
    from harness.evaluation import predict
    from harness.volumes import STEPS, prepare_arrays, quantise

    loaded = load_case(restored.task, case)
    image, _, geometry = prepare_arrays(restored.task, loaded, str(case.images[0]))
    # As the cache holds it, so that a test case gets the prediction that was scored.
    image = quantise(image).astype(np.float32) * np.float32(1 / STEPS)
    with in_memory(case.images[0], restored.trained.crop):
        probabilities = predict(restored.task, restored.network, image, restored.trained, restored.evaluate)
    write_label(place, restored.task.compose(geometry.decide(restored.task, probabilities)), loaded.affine)


def group_images(folder: Path, channels: Sequence[str]) -> list[Case]:
    """The images of a folder (and below) as cases: one file each, or grouped where the task has several channels.

    Channels are told by a suffix: `_0000`, `_0001` ... as nnU-Net's, or the channel's name after `_` or `-`. Files that
    carry none are whole cases (4D).

    Raises:
        UserError: no image, or a case without one of its channels.
    """
    found = (Path(path) for path in walk(folder))
    images = [path for path in found if path.name.endswith(ENDINGS) and not path.name.startswith(".")]
    paths = sorted(path for path in images if not is_named_label(path.relative_to(folder)))
    if not paths:
        raise UserError(f"{folder} holds no image; images end in {', '.join(ENDINGS)}: give another folder")
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


def read_run(run: Path) -> dict[str, Any]:
    """The record of a run that describes its task, every field checked. Raises UserError where it is none."""
    try:
        record = read_record(run / "record.json")
        _Usable.model_validate(record)
    except RecordError as error:
        raise UserError(f"{run} is no finished run ({error}): give a run id or a run folder") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise UserError(
            f"{run / 'record.json'}: {where} = {problem['input']!r:.80} cannot be used, {problem['msg']}: run it again with "
            "this version"
        ) from None
    return record


def _recorded_task(record: dict[str, Any]) -> RecordedTask:
    """Raises UserError or ValueError for a preparation, or label values, that no task has."""
    described, prepared = record["task_description"], record["config"]["prepared"]
    low, high = prepared["low"], prepared["high"]
    window = (low, high) if prepared["normalisation"] == "Window" else None
    settings = build(TaskSettings, {"spacing": prepared["spacing"], "window": window}, "prepared")
    if window is None and not 0 <= low < high <= 100:
        raise ValueError(f"percentiles {low:g} to {high:g}")
    values = {value for region in described["targets"].values() for value in region}
    if not values <= set(described["labels"]):
        raise ValueError(f"label values {sorted(values)}")
    return RecordedTask(
        name=record["task"],
        version=record["task_version"],
        description="",
        licence=record["data"]["licence"],
        reference="",
        channels=tuple(described["channels"]),
        targets={name: tuple(values) for name, values in described["targets"].items()},
        labels=tuple(described["labels"]),
        overlapping=described["overlapping"],
        spacing=settings.spacing,
        normalisation=Percentiles(low, high) if window is None else Window(low, high),
    )


@contextmanager
def in_memory(source: Path, crop: Sequence[int]) -> Iterator[None]:
    """Raises UserError where a window of the training crop does not fit the memory with what is computed from it."""
    from harness.fitting import is_too_large

    try:
        yield
    except (RuntimeError, TypeError, OverflowError, MemoryError) as error:
        if not is_too_large(error):
            raise
        raise UserError(
            f"{source}: a window of {' x '.join(map(str, crop))} voxels, the training crop, does not fit the memory: use a "
            "machine with more"
        ) from None


def restore(run: Path, record: dict[str, Any], registry: Registry) -> Restored:
    """The task and the trained network of a record. Raises UserError where it cannot be used."""
    import psutil
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from harness.fitting import weights_bytes
    from harness.protocols import with_head
    from harness.training import new_accelerator

    try:
        task, config = _recorded_task(record), record["config"]
        trained, settings = Finetune(**config["finetune"]), Evaluate(**config["evaluate"])
        backbone_class = registry.load("backbone", record["backbone"])
        own = build(backbone_class.Config, config["backbone_settings"], "backbone")
        # Input and output alone, and the weights; what is between needs more, and is found out by trying.
        need = 4 * prod(trained.crop) * (len(task.channels) + task.num_outputs)
        need += weights_bytes(lambda: backbone_class(own, len(task.channels)))
        if need > (free := psutil.virtual_memory().available):
            raise ValueError(f"crop and settings that take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        backbone = backbone_class(own, len(task.channels))
        if any(edge % stride for edge, stride in zip(trained.crop, backbone.stride, strict=True)):
            raise ValueError(f"a crop of {trained.crop}, which is no multiple of {backbone.stride}")
        network = with_head(backbone, task.num_outputs, record["protocol"])
        network.load_state_dict(load_file(run / "weights.safetensors"))
        return Restored(task, network.to(new_accelerator().device), trained, settings)
    except (
        KeyError,
        OverflowError,
        TypeError,
        ValueError,
        AttributeError,
        RuntimeError,
        OSError,
        SafetensorError,
    ) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{run} cannot be used ({type(error).__name__}: {reason}): is it a run of this version?"
        ) from None
