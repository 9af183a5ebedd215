"""The contract of a data set: its layout on disk, its targets and its geometry.

This module does not import torch, so that listing tasks is quick.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

SPACINGS = (1e-4, 1e4)  # accepted range in mm; a value outside it is a mistake or makes numbers overflow


@dataclass(frozen=True)
class Case:
    """One scan: its image files and its label map, if there is one.

    Attributes:
        id: name of the case, unique in the data set; it becomes a file name.
        images: one file per channel, in the order of `ImageSet.channels`, or one 4D file with all channels.
        label: file of the label map; None for a scan without labels.
        patient: the patient whose scan this is. All scans of one patient stay on the same side of a split. An empty
            string means that the patient has no other scan.
        numbering: pairs (value in this label file, value of the task), for a release that gives the same tissues other
            numbers. Any value that is not listed is an error. Empty means that the file has the task's own values.
    """

    id: str
    images: tuple[Path, ...]
    label: Path | None
    patient: str = ""
    numbering: tuple[tuple[int, int], ...] = ()

    @property
    def files(self) -> tuple[Path, ...]:
        """The image files, followed by the label map if there is one."""
        return (*self.images, self.label) if self.label else self.images


@dataclass(frozen=True)
class Percentiles:
    """Robust intensity scaling for MR, computed per image and per channel.

    The `low` and `high` percentiles (in percent) of the non-zero voxels are mapped to 0.001 and 1. Voxels that are exactly
    0 (outside a skull-stripped brain) stay 0.
    """

    low: float = 0.5
    high: float = 99.5


@dataclass(frozen=True)
class Window:
    """Fixed intensity window for CT: `low` and `high`, in Hounsfield units, are mapped to 0.001 and 1."""

    low: float
    high: float

    @property
    def usable(self) -> bool:
        """Whether float32, the type in which voxels are scaled, can hold both ends and tell them apart."""
        with np.errstate(all="ignore"):
            width = np.float32(self.high) - np.float32(self.low)
        return bool(np.finfo(np.float32).tiny < width < np.inf)


@dataclass(frozen=True)
class ZScore:
    """Mean 0 and standard deviation 1 over the box of the foreground, per image and per channel, as nnU-Net has it for MR.

    Values beyond 31 standard deviations are cut off. `hounsfield`: whether the voxels are Hounsfield units.
    """

    hounsfield: bool = False


Normalisation = Percentiles | Window | ZScore
"""How intensities are scaled."""


@dataclass(frozen=True)
class PhantomShape:
    """One labelled structure of a phantom.

    Attributes:
        label: value of the structure in the label file.
        centre: position of the centre, per axis, relative to the body's half axes, each in -1..1.
        radius: half axes of the structure, relative to the body's half axes, each in 0..1.
        contrast: intensity added per channel: in Hounsfield units for CT, otherwise in units of the body's intensity.
        inside: label of the structure that contains this one, which then cannot leave it; None for the body.
    """

    label: int
    centre: tuple[float, float, float]
    radius: tuple[float, float, float]
    contrast: tuple[float, ...]
    inside: int | None = None


@dataclass(frozen=True)
class Archive:
    """A public archive of a data set.

    Attributes:
        url: address of the archive.
        md5: MD5 sum of the archive, as hexadecimal digits.
        folder: name of the folder that the archive unpacks to.
    """

    url: str
    md5: str
    folder: str


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A set of scans that share one preprocessing: the common base of a task and of a corpus of unlabelled scans.

    Attributes:
        name: name under which the user selects it.
        version: version of this definition, as listed by `harness list`.
        description: one line for the lists.
        licence: licence of the data.
        reference: publication or web page of the data.
        channels: names of the channels, in the order of the network's input.
        aliases: other names of channels in the names of files: channel -> names.
        spacing: voxel spacing of the preprocessed volumes in mm; None keeps the spacing of each image.
        normalisation: how intensities are scaled: to [0, 1] unless it is a `ZScore`.
        targets: the regions that are scored, in the order of the leaderboard: name -> label values that the region is
            made of.
        labels: every value that a label file may hold, 0 included. Any other value is an error.
        registration: where to get the data, if it needs a registration.
        layout: the files and folders that are expected, described in words.
    """

    name: str
    version: str
    description: str
    licence: str
    reference: str
    channels: tuple[str, ...]
    spacing: tuple[float, float, float] | None
    normalisation: Normalisation
    aliases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    targets: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    labels: tuple[int, ...] = (0,)
    registration: str = ""
    layout: str = ""

    @property
    def hounsfield(self) -> bool:
        """Whether voxels are Hounsfield units."""
        how = self.normalisation
        return isinstance(how, Window) or (isinstance(how, ZScore) and how.hounsfield)

    def masks(self, label: NDArray[Any]) -> NDArray[np.bool_]:
        """Label map (x, y, z) -> one bool mask per target (targets, x, y, z)."""
        masks = [np.isin(label, values) for values in self.targets.values()]
        return np.stack(masks) if masks else np.zeros((0, *label.shape), dtype=np.bool_)


@dataclass(frozen=True, kw_only=True)
class Task(ImageSet, ABC):
    """A segmentation data set in the layout that its users have on disk.

    Attributes:
        overlapping: True if targets may overlap (one sigmoid output per target), False if they exclude each other
            (softmax, with the background as the first output).
        presets: preset name -> {"section.field": value}. These values replace those of the engine's preset.
        phantom: the structures of a phantom, the synthetic data of a run for which the user names no data.
        phantom_size: extent of a phantom in voxels.
        phantom_cases: number of phantom cases by default.
        test_ids: ids of the shipped test list, for a release whose case names are known. None, or data in which no case
            is on the list: a rule splits the cases.
    """

    overlapping: bool
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    phantom: tuple[PhantomShape, ...] = ()
    phantom_size: tuple[int, int, int] = (64, 64, 64)
    phantom_cases: int = 15
    test_ids: frozenset[str] | None = None

    @abstractmethod
    def find(self, data: Path) -> Path:
        """The task's own folder. `data` is that folder or the folder that contains it.

        Raises:
            UserError: the task's folder is neither of them.
        """

    @abstractmethod
    def cases(self, root: Path) -> list[Case]:
        """The labelled cases below `root`, sorted by id.

        Raises:
            UserError: there are no cases, or files are missing.
        """

    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Write one phantom case in the exact layout of the task. A task without `phantom` needs none.

        Args:
            root: the task's own folder, as `find` returns it.
            number: number of the case, from which its id is made.
            images: (channels, x, y, z).
            label: (x, y, z).
            affine: (4, 4), from voxel indices to mm.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has the structures of a phantom and must implement write_case"
        )

    @classmethod
    def from_folder(cls, folder: Path) -> "Task | None":
        """A task made from a folder that describes itself; None if this class does not recognise the folder."""
        return None

    def archive(self) -> Archive | None:
        """The public archive that `harness data fetch` downloads; None if there is none."""
        return None

    @property
    def num_outputs(self) -> int:
        """Number of output channels that the network's head needs: one per target, and the background for softmax."""
        return len(self.targets) + (not self.overlapping)

    def training_target(self, label: NDArray[Any]) -> NDArray[Any]:
        """Label map (x, y, z) -> the target of the loss.

        Returns:
            (targets, x, y, z) float32 if targets overlap, otherwise class indices (1, x, y, z) int64.
        """
        if self.overlapping:
            return self.masks(label).astype(np.float32)
        table = np.zeros(256, dtype=np.int64)
        for class_index, values in enumerate(self.targets.values(), start=1):
            table[list(values)] = class_index
        classes: NDArray[np.int64] = table[label][None]
        return classes

    def decide(self, probabilities: NDArray[np.float32]) -> NDArray[np.bool_]:
        """Probabilities (outputs, x, y, z) -> one bool mask per target (targets, x, y, z)."""
        if self.overlapping:
            return probabilities > 0.5
        classes = probabilities.argmax(axis=0)
        return np.stack([classes == class_index for class_index in range(1, len(self.targets) + 1)])

    def compose(self, masks: NDArray[np.bool_], numbering: Sequence[tuple[int, int]] = ()) -> NDArray[np.uint8]:
        """Masks (targets, x, y, z) -> a label map (x, y, z) uint8.

        Where targets overlap, a voxel gets the label value whose set of targets differs from the voxel's masks in the
        fewest targets. If several values differ equally, the first of them in `labels` is taken.

        Args:
            numbering: `Case.numbering`, to write the label map with the values of that case's label file.
        """
        file_values = {task_value: file_value for file_value, task_value in numbering}
        if not self.overlapping:
            label = np.full(masks.shape[1:], file_values.get(0, 0), dtype=np.uint8)
            for mask, values in zip(masks, self.targets.values(), strict=True):
                label[mask] = file_values.get(values[0], values[0])
            return label
        label = np.zeros(masks.shape[1:], dtype=np.uint8)
        fewest = np.full(masks.shape[1:], 255, dtype=np.uint8)
        for value in self.labels:
            differs = np.zeros(masks.shape[1:], dtype=np.uint8)
            for mask, values in zip(masks, self.targets.values(), strict=True):
                differs += mask != (value in values)
            closer = differs < fewest
            fewest[closer], label[closer] = differs[closer], file_values.get(value, value)
        return label
