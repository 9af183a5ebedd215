"""What a data set is: its layout on disk, its targets, its geometry. Knows no torch, so that listing tasks is quick."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPACINGS = (1e-4, 1e4)  # mm; beyond lie mistakes, and numbers that overflow


@dataclass(frozen=True)
class Case:
    """One scan: an image file per channel (or one 4D file for all channels) and the label map, if there is one.

    Attributes:
        patient: whose scan it is; scans of one patient never straddle a split. Empty: a patient of its own.
        numbering: (value in this label file, value of the task) pairs, where a release numbers the same tissues
            differently; any other value is an error. Empty: the file has the task's own values.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str = ""
    numbering: tuple[tuple[int, int], ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """Images, then the label map if there is one."""
        return (*self.images, self.label) if self.label else self.images


@dataclass(frozen=True)
class Percentiles:
    """Robust per-image, per-channel scaling for MR: `low`..`high` percentiles of the non-zero voxels -> [0.001, 1].

    Voxels that are exactly 0 (outside a skull-stripped brain) stay 0.
    """

    low: float = 0.5
    high: float = 99.5


@dataclass(frozen=True)
class Window:
    """Fixed intensity window for CT: `low`..`high` Hounsfield units -> [0.001, 1]."""

    low: float
    high: float

    @property
    def usable(self) -> bool:
        """Whether float32, which voxels are scaled in, holds both ends and tells them apart."""
        with np.errstate(all="ignore"):
            width = np.float32(self.high) - np.float32(self.low)
        return bool(np.finfo(np.float32).tiny < width < np.inf)


@dataclass(frozen=True)
class PhantomShape:
    """One labelled structure of a phantom.

    Attributes:
        label: its value in the label file.
        centre: relative to the body's half axes, each in -1..1.
        radius: half axes relative to the body's, each in 0..1.
        contrast: added intensity per channel: Hounsfield units for CT, else in units of the body's intensity.
        inside: label of the structure that contains it (it cannot leave that one), or None for the body.
    """

    label: int
    centre: tuple[float, float, float]
    radius: tuple[float, float, float]
    contrast: tuple[float, ...]
    inside: int | None = None


@dataclass(frozen=True)
class Archive:
    """A public archive of a data set: where it lies, its MD5 sum, and the folder that it unpacks to."""

    url: str
    md5: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """Scans that are prepared alike: what a task and a corpus of unlabelled scans have in common.

    Attributes:
        channels: names, in the order of the network's input.
        spacing: of the prepared volumes, mm; None keeps each image's own.
        targets: what is scored, in the order of the leaderboard: name -> label values that make it up.
        labels: every value that a label file may hold, 0 included. Anything else is an error.
        registration: where to get the data, for those that need a registration.
        layout: the files and folders that are expected, in words.
    """

    name: str
    version: str
    description: str
    licence: str
    reference: str
    channels: tuple[str, ...]
    spacing: tuple[float, float, float] | None
    normalisation: Percentiles | Window
    targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[int, ...] = (0,)
    registration: str = ""
    layout: str = ""

    def masks(self, label: NDArray[Any]) -> NDArray[np.bool_]:
        """Label map (x, y, z) -> one mask per target (targets, x, y, z)."""
        masks = [np.isin(label, values) for values in self.targets.values()]
        return np.stack(masks) if masks else np.zeros((0, *label.shape), dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class Task(ImageSet, ABC):
    """A segmentation data set as its users have it on disk.

    Attributes:
        overlapping: targets overlap (one sigmoid output each) or exclude each other (softmax, background first).
        presets: preset name -> {"section.field": value}, laid over the engine's preset.
        phantom: the structures of a phantom; `phantom_size` its extent in voxels, `phantom_cases` how many by default.
        test_ids: the shipped test list, for releases whose case names are known; other cases are split by rule.
    """

    overlapping: bool
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    phantom: tuple[PhantomShape, ...] = ()
    phantom_size: tuple[int, int, int] = (64, 64, 64)
    phantom_cases: int = 15
    test_ids: frozenset[str] | None = None

    @abstractmethod
    def find(self, data: Path) -> Path:
        """The task's own folder, given that folder or the one that contains it. Raises UserError where it is not."""

    @abstractmethod
    def cases(self, root: Path) -> list[Case]:
        """Labelled cases below `root`, sorted by id. Raises UserError where there are none or files are missing."""

    @abstractmethod
    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Write one phantom case in the task's exact layout; `images` is (channels, x, y, z), `label` (x, y, z)."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Task | None":
        """A task made from a folder that describes itself, or None where this family does not recognise it."""
        return None

    def archive(self) -> Archive | None:
        """The public archive that `harness data fetch` brings; None where there is none."""
        return None

    @property
    def num_outputs(self) -> int:
        """Channels that the network's head needs."""
        return len(self.targets) + (not self.overlapping)

    def training_target(self, label: NDArray[Any]) -> NDArray[Any]:
        """What the loss compares with: (targets, ...) float32 if overlapping, else (1, ...) int64 class indices."""
        if self.overlapping:
            return self.masks(label).astype(np.float32)
        table = np.zeros(256, dtype=np.int64)
        for number, values in enumerate(self.targets.values(), start=1):
            table[list(values)] = number
        index: NDArray[np.int64] = table[label][None]
        return index

    def decide(self, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Probabilities (outputs, x, y, z) -> one mask per target (targets, x, y, z)."""
        if self.overlapping:
            return probabilities > 0.5
        winner = probabilities.argmax(axis=0)
        return np.stack([winner == number for number in range(1, len(self.targets) + 1)])

    def compose(self, masks: NDArray[np.bool_], numbering: Sequence[tuple[int, int]] = ()) -> NDArray[np.uint8]:
        """Masks (targets, x, y, z) -> a label map: each voxel gets the value whose targets differ in fewest from its own.

        Of values that differ in equally many, the first in `labels`. `numbering` is a case's own (`Case.numbering`).
        """
        own = {ours: theirs for theirs, ours in numbering}
        label = np.zeros(masks.shape[1:], dtype=np.uint8)
        if not self.overlapping:
            for mask, values in zip(masks, self.targets.values(), strict=True):
                label[mask] = own.get(values[0], values[0])
            return label
        fewest = np.full(masks.shape[1:], 255, dtype=np.uint8)
        for value in self.labels:
            differs = np.zeros(masks.shape[1:], dtype=np.uint8)
            for mask, values in zip(masks, self.targets.values(), strict=True):
                differs += mask != (value in values)
            closer = differs < fewest
            fewest[closer], label[closer] = differs[closer], own.get(value, value)
        return label
