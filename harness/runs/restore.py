"""The task and the network of a finished run, from its record and weights."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import psutil
from numpy.typing import NDArray
from pydantic import Field, ValidationError
from safetensors import SafetensorError

from harness.api.registry import Registry
from harness.api.settings import build
from harness.api.task import Case, Percentiles, Task, Window
from harness.compute.memory import is_too_large, weights_bytes
from harness.config.request import FinetuneProtocol
from harness.config.schema import Evaluate, Finetune, TaskSettings
from harness.data.cases import group_images
from harness.system.errors import UserError
from harness.training.models import new_network
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

    protocol: FinetuneProtocol
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
        network = new_network(backbone, task, record["protocol"], run / "weights.safetensors")
        return Restored(task, network, trained, settings)
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
