"""Restores the task and the network of a finished run from its record and weights."""

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
from harness.api.task import Case, Normalisation, Percentiles, Task, Window, ZScore
from harness.compute.memory import is_too_large, weights_bytes
from harness.config.request import FinetuneProtocol
from harness.config.schema import Evaluate, Finetune, TaskSettings
from harness.data.cases import group_images
from harness.system.errors import UserError
from harness.system.files import digest_file
from harness.training.lineage import Lineage, lineage_of
from harness.training.models import new_network
from leaderboards.records import RecordError, read_record
from leaderboards.schema import Name, Part, Record

Value = Annotated[int, Field(ge=0, le=255)]
"""A label value."""


class _Description(Part):
    """The recorded description of a run's task."""

    channels: Annotated[list[Name], Field(min_length=1)]
    targets: Annotated[dict[Name, Annotated[list[Value], Field(min_length=1)]], Field(min_length=1)]
    labels: Annotated[list[Value], Field(min_length=1)]
    overlapping: bool
    aliases: dict[Name, list[Name]] = {}
    numbering: list[Annotated[list[Value], Field(min_length=2, max_length=2)]] = []


class _Prepared(Part):
    """The recorded preprocessing of a run's volumes."""

    spacing: list[float] | None
    normalisation: Literal["Window", "Percentiles", "ZScore"]
    low: float = 0.0
    high: float = 0.0
    hounsfield: bool = False


class _Trained(Part):
    """The recorded setting of fine-tuning that messages print."""

    crop: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=3, max_length=3)]


class _Config(Part):
    """The recorded settings that restoring needs."""

    prepared: _Prepared
    finetune: _Trained
    evaluate: dict[str, Any]
    backbone_settings: dict[str, Any]


class _Usable(Record):
    """A record from which the trained network can be restored."""

    protocol: FinetuneProtocol
    task_description: _Description
    config: _Config


@dataclass(frozen=True, kw_only=True)
class RecordedTask(Task):
    """The task in a record. It can preprocess images and turn probabilities into labels, but knows no layout of data on disk."""

    def find(self, data: Path) -> Path:
        """The folder itself."""
        return data

    def cases(self, root: Path) -> list[Case]:
        """The images in a folder, grouped into cases without labels."""
        return group_images(root, self)

    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Raises TypeError: phantoms need a layout on disk."""
        raise TypeError("a recorded task has no layout to write a phantom in")


@dataclass(frozen=True)
class Restored:
    """What inference needs from a finished run.

    Attributes:
        trained: settings of fine-tuning, for the extent of windows, the precision and the memory layout.
        lineage: of the weights; None for a run of an earlier version, which has none.
    """

    task: RecordedTask
    network: Any
    trained: Finetune
    evaluate: Evaluate
    lineage: Lineage | None


def read_run(run: Path) -> dict[str, Any]:
    """The record of a finished run, with all fields that restoring needs checked. Raises UserError if it cannot be used."""
    try:
        record = read_record(run / "record.json")
        if record.get("imported"):
            raise UserError(f"{run} holds results that were imported from other software: there is no network in it")
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
    """The task in a record. Raises UserError or ValueError if its preprocessing or its label values are impossible."""
    described, preprocessing = record["task_description"], record["config"]["prepared"]
    low, high = preprocessing.get("low", 0.0), preprocessing.get("high", 0.0)
    window = (low, high) if preprocessing["normalisation"] == "Window" else None
    settings = build(TaskSettings, {"spacing": preprocessing["spacing"], "window": window}, "prepared")
    how: Normalisation = Percentiles(low, high) if window is None else Window(low, high)
    if preprocessing["normalisation"] == "ZScore":
        how = ZScore(preprocessing.get("hounsfield", False))
    elif window is None and not 0 <= low < high <= 100:
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
        aliases={name: tuple(others) for name, others in described.get("aliases", {}).items()},
        targets={name: tuple(values) for name, values in described["targets"].items()},
        labels=tuple(described["labels"]),
        overlapping=described["overlapping"],
        spacing=settings.spacing,
        normalisation=how,
    )


@contextmanager
def in_memory(source: Path, crop: Sequence[int]) -> Iterator[None]:
    """Turn an out-of-memory error in the `with` block into a UserError about the windows, which have the training crop's extent.

    Args:
        source: file or folder that the message names.
    """
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
    """The task and the trained network of a run. Raises UserError if its record or weights cannot be used."""
    try:
        task, config = _recorded_task(record), record["config"]
        trained, settings = Finetune(**config["finetune"]), Evaluate(**config["evaluate"])
        backbone_class = registry.load("backbone", record["backbone"])
        own = build(backbone_class.Config, config["backbone_settings"], "backbone")
        # Bytes of input, output and weights alone. Features between them need more, which only inference itself shows.
        need = 4 * prod(trained.crop) * (len(task.channels) + task.num_outputs)
        need += weights_bytes(lambda: backbone_class(own, len(task.channels)))
        if need > (free := psutil.virtual_memory().available):
            raise ValueError(f"crop and settings that take {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
        backbone = backbone_class(own, len(task.channels))
        if any(edge % stride for edge, stride in zip(trained.crop, backbone.stride, strict=True)):
            raise ValueError(f"a crop of {trained.crop}, which is no multiple of {backbone.stride}")
        weights = run / "weights.safetensors"
        network = new_network(backbone, task, record["protocol"], weights)
        stated = (record.get("digests") or {}).get(weights.name)
        if stated is not None and digest_file(weights) != stated:
            raise ValueError(f"{weights.name} was changed after the run, as its digest in the record says")
        return Restored(task, network, trained, settings, lineage_of(weights, run.resolve().parent / "cache"))
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
