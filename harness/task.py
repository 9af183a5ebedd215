"""What a data set is: its layout on disk, its targets, its geometry. Knows no torch, so that listing tasks is quick."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness.errors import UserError

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """One patient: an image file per channel (or one 4D file for all channels) and the label map, if there is one."""

    id: str
    images: tuple[Path, ...]
    label: Path | None


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


@dataclass(frozen=True)
class PhantomShape:
    """One labelled structure of a phantom.

    Attributes:
        label: its value in the label file.
        centre: relative to the body's half axes, each in -1..1.
        radius: half axes relative to the body's, each in 0..1.
        contrast: added intensity per channel, in units of the body's intensity.
        inside: label of the structure that contains it (it cannot leave that one), or None for the body.
    """

    label: int
    centre: Triple
    radius: Triple
    contrast: tuple[float, ...]
    inside: int | None = None


@dataclass(frozen=True, kw_only=True)
class Task(ABC):
    """A segmentation data set as its users have it on disk.

    Attributes:
        targets: what is scored, in the order of the leaderboard: name -> label values that make it up.
        labels: every value that a label file may hold, 0 included. Anything else is an error.
        overlapping: targets overlap (one sigmoid output each) or exclude each other (softmax, background first).
        spacing: of the prepared volumes, mm; None keeps each image's own.
        presets: preset name -> {"section.field": value}, laid over the engine's preset.
        phantom: the structures of a phantom; `phantom_size` its extent in voxels, `phantom_cases` how many by default.
        test_ids: the shipped test list; None splits by a rule that depends on the case names alone.
    """

    name: str
    version: str
    description: str
    licence: str
    reference: str
    channels: tuple[str, ...]
    targets: Mapping[str, tuple[int, ...]]
    labels: tuple[int, ...]
    overlapping: bool
    spacing: Triple | None
    normalisation: Percentiles | Window
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
        self, root: Path, number: int, images: NDArray[np.float32], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Write one phantom case in the task's exact layout; `images` is (channels, x, y, z), `label` (x, y, z)."""

    @classmethod
    def from_folder(cls, folder: Path) -> "Task | None":
        """A task made from a folder that describes itself, or None where this family does not recognise it."""
        return None

    @property
    def num_outputs(self) -> int:
        """Channels that the network's head needs."""
        return len(self.targets) + (not self.overlapping)

    def split(self, cases: Sequence[Case]) -> tuple[list[Case], list[Case]]:
        """Fixed 80/20 split. Training cases come in an order whose prefixes are the nested label fractions.

        Raises:
            UserError: fewer than two cases, or none left on one side.
        """
        ordered = sorted(cases, key=lambda case: hashlib.sha256(f"{self.name}:{case.id}".encode()).hexdigest())
        if self.test_ids is None:
            num_test = max(1, round(0.2 * len(ordered)))
            train, test = ordered[num_test:], ordered[:num_test]
        else:
            train = [case for case in ordered if case.id not in self.test_ids]
            test = [case for case in ordered if case.id in self.test_ids]
        if not train or not test:
            raise UserError(
                f"task {self.name!r}: {len(cases)} labelled cases split into {len(train)} for training and {len(test)} "
                "for testing; both need at least one: give the whole data set"
            )
        return train, sorted(test, key=lambda case: case.id)

    def masks(self, label: NDArray[Any]) -> NDArray[np.bool_]:
        """Label map (x, y, z) -> one mask per target (targets, x, y, z)."""
        return np.stack([np.isin(label, values) for values in self.targets.values()])

    def training_target(self, label: NDArray[Any]) -> NDArray[Any]:
        """What the loss compares with: (targets, ...) float32 if overlapping, else (1, ...) int64 class indices."""
        masks = self.masks(label)
        if self.overlapping:
            return masks.astype(np.float32)
        index = np.zeros((1, *label.shape), dtype=np.int64)
        for number, mask in enumerate(masks, start=1):
            index[0][mask] = number
        return index

    def decide(self, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Probabilities (outputs, x, y, z) -> one mask per target (targets, x, y, z)."""
        if self.overlapping:
            return probabilities > 0.5
        winner = probabilities.argmax(axis=0)
        return np.stack([winner == number for number in range(1, len(self.targets) + 1)])
