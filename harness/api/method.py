"""The contract of a pre-training method, which is a pretext task bound to a backbone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from harness.api.backbone import Backbone
from harness.api.settings import Settings, Triple
from harness.api.task import Task

Batch = dict[str, Tensor]
"""A batch of samples: `image`, (N, C, x, y, z) in [0, 1], and all tensors that the source or the method's transform adds."""

Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
"""Computation per sample on the CPU: the sample `{"image": (C, x, y, z) float32, ...}` and the sample's own generator -> the
transformed sample."""


class Source(Protocol):
    """An object that pre-training draws samples from: a preprocessed volume, or an object that `Method.prepare` returns."""

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """Draw one sample.

        Args:
            size: extent of the sample in voxels.
            rng: the sample's own generator; every draw must come from it.

        Returns:
            `{"image": (C, *size) float32 in [0, 1], ...}`.
        """


class VolumeSource(Source, Protocol):
    """A preprocessed volume with intensities in [0, 1]. `shape` and `crop` do not read the whole volume from disk."""

    @property
    def shape(self) -> Triple:
        """Extent (x, y, z) in voxels."""

    @property
    def image(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The whole volume in memory, (C, x, y, z)."""

    def crop(self, origin: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The region of `size` voxels that begins at voxel `origin`, (C, *size). Voxels outside the volume are 0."""


class Preparation(Protocol):
    """The services of the engine for `Method.prepare`.

    The time that `prepare` takes is part of the method's cost. A value that comes from the cache counts with the time
    that its computation took.

    Attributes:
        seed: seed of this method's preparation; every random number in `prepare` must be derived from it.
        device: the device on which `train` trains.
        crop: extent of the pre-training crop in voxels.
        steps: number of optimizer steps of pre-training, for schedules.
        task: of the labels, for a method that uses them; otherwise None.
    """

    seed: int
    device: torch.device
    crop: Triple
    steps: int
    task: Task | None

    def train(
        self, module: nn.Module, sources: Sequence[Source], *, size: Triple, steps: int, batch_size: int, lr: float
    ) -> None:
        """Train `module` with the engine's own loop: minimise the sum of the loss terms that `module(batch)` returns.

        Args:
            module: maps a batch to named loss terms, as `Method.forward`.
            sources: where samples are drawn from.
            size: extent of a sample in voxels.
            steps: number of optimizer steps.
            batch_size: samples per step.
            lr: peak learning rate.

        Raises:
            UserError: it is called outside `remember`, on whose arguments the files of the training depend.
        """

    def remember(self, name: str, depends_on: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """The value of `compute()`, or its cached value.

        A cached value is used if the method's source file and version, the data, the seed and `depends_on` are the same as
        when it was computed. A setting that is missing from `depends_on` may change without a new computation.

        Args:
            name: name of the value, in messages and in the cache.
            depends_on: every setting that the value depends on.
            compute: returns the value, which must be representable as JSON.
        """

    def report(self, message: str, **values: Any) -> None:
        """Print `message` as one line to the user, and add `values` to the run's record."""


class Method(nn.Module):
    """One pretext task bound to one backbone.

    A subclass sets `name`, defines `Config` and implements `forward`. The other methods are optional.

    Attributes:
        name: name under which the user selects the method.
        version: version of the implementation; it enters the identity of a run.
        reference: publication of the method.
        presets: preset name -> {"method.field" or "pretrain.field": value}. These values replace those of the engine's
            preset. A method cannot change fine-tuning, because its control must be fine-tuned in the same way.
        trains: names of the backbone parts that the method trains and passes on to fine-tuning. The other parts are
            frozen. If it is empty, there is no pre-training, and fine-tuning starts directly from `weights`.
        needs: optional abilities that the backbone must have, see `Backbone.abilities`.
        uses_labels: whether pre-training sees the labels of the training cases: batches then hold `target` too. Such a method
            is a control. Tables mark it and never rank it, and it pre-trains on the task's own training cases only.
        unit_range: whether the method needs intensities in [0, 1]. Others work with z-scores too (`task.normalisation=zscore`).
        variants: variant name -> {"section.field": value}, for `harness profile --compare NAME NAME`.
        generator: the run's random generator on the training device; the harness seeds it before every step. Values
            drawn with `harness.rand`, `random_integers` and `random_patches` do not depend on how the batch is divided
            among processes. Values drawn from the generator directly differ between processes.
    """

    plugin_kind: ClassVar[str] = "method"
    name: ClassVar[str]
    version: ClassVar[str] = "1"
    reference: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    trains: tuple[str, ...] = ("encoder", "decoder")
    needs: ClassVar[frozenset[str]] = frozenset()
    uses_labels: ClassVar[bool] = False
    unit_range: ClassVar[bool] = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    generator: torch.Generator | None = None

    class Config(Settings):
        """Settings of the pretext task. A subclass defines its own `Config`, in which every field states its source.

        If a field has the type `pathlib.Path`, the content of the file that it names is part of the identity of a run.
        """

    def __init__(self, config: Settings, backbone: Backbone) -> None:
        """Store the settings, an instance of the class's own `Config`, and the backbone."""
        super().__init__()
        self.config = config
        self.backbone = backbone

    @classmethod
    def transform(cls, config: Any) -> Transform | None:
        """The computation per sample that loader workers do on the CPU; None for the plain crop.

        The returned callable must be picklable and must not hold the model.
        """
        return None

    @classmethod
    def example(cls, backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Settings that the conformance checks need because they have no default: field name -> value.

        Files that these settings name must be written to `folder`.
        """
        return {}

    def expects(self) -> dict[str, Any]:
        """What the images of the task must be for the weights that the method starts from; empty if anything will do.

        `normalisation`: the class of the task's normalisation by name; another one is refused. `spacing` in mm along
        (x, y, z); another one is said.
        """
        return {}

    def check(self, crop: Triple, batch_size: int) -> None:
        """Check the settings before any data is read.

        Args:
            crop: extent of the pre-training crop in voxels.
            batch_size: crops per step, over all processes and micro-batches.

        Raises:
            UserError: the settings do not fit the crop, the batch or the backbone.
        """

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """Analyse the data once before training, and return the sources that pre-training draws its samples from.

        A module whose size depends on the data is created here. The default returns the volumes unchanged.

        Args:
            volumes: the preprocessed volumes of pre-training.
            preparation: the engine's services, such as the cache.

        Raises:
            UserError: the data is not sufficient for the method.
        """
        return volumes

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted loss terms, each a scalar. The harness minimises their sum.

        `batch` is one part of the global batch (see `harness.api.global_batch`), and the harness averages each term over
        the parts. That is right for a term that is a mean over crops. A term that compares crops with each other, or
        divides by something counted in them, must use `harness.gather` and `harness.total` to see the crops of all parts.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(batch)")

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """Images for one picture of what the method sees, hides and restores: name -> (N, C, x, y, z) in [0, 1].

        It is called once after pre-training, in evaluation mode and without gradients. An empty result means no picture.
        """
        return {}

    def after_step(self, step: int) -> None:
        """Called after each optimizer step, with its number from 1, for instance to update an EMA teacher or a queue."""

    def weights(self) -> dict[str, Tensor]:
        """The weights that fine-tuning starts from, by the backbone's state dict keys.

        The default returns the current weights of the parts in `trains`.
        """
        return self.backbone.part_weights(self.trains)
