"""What a pre-training method is: a pretext task bound to a backbone."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from harness.api.backbone import Backbone
from harness.api.settings import Settings, Triple

Batch = dict[str, Tensor]
"""`image` (N, C, x, y, z) in [0, 1], plus whatever the method's transform adds."""

Transform = Callable[[dict[str, Any], np.random.Generator], dict[str, Any]]
"""Per-sample CPU work: `{"image": (C, x, y, z) float32}` and the sample's own generator -> the sample."""


class Source(Protocol):
    """What pre-training draws samples from: a prepared volume, or whatever `Method.prepare` made of them."""

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """One sample, `{"image": (C, *size) float32, ...}`, drawn with the sample's own generator."""


class VolumeSource(Source, Protocol):
    """A prepared volume, intensities in [0, 1]; `shape` and `crop` do not read all of it."""

    @property
    def shape(self) -> Triple:
        """Extent (x, y, z) in voxels."""

    @property
    def image(self) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(C, x, y, z), the whole volume in memory."""

    def crop(self, origin: Sequence[int], size: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(C, *size) from `origin`; zeros outside."""


class Preparation(Protocol):
    """What the engine offers to `Method.prepare`. Its time, cached or not, is part of the method's cost.

    Attributes:
        seed: of this method's preparation; every draw in `prepare` comes from it.
        device: where `train` trains.
        crop: extent of the pre-training crop in voxels.
    """

    seed: int
    device: torch.device
    crop: Triple

    def train(
        self, module: nn.Module, sources: Sequence[Source], *, size: Triple, steps: int, batch_size: int, lr: float
    ) -> None:
        """Minimise the named terms that `module(batch)` returns, by the engine's own loop."""

    def remember(self, name: str, depends_on: Mapping[str, Any], compute: Callable[[], Any]) -> Any:
        """`compute()`, or what it gave before: the same for this method's source, data, seed and `depends_on`.

        What it gives must be JSON. The settings that do not enter `depends_on` may change without a new computation.
        """

    def report(self, message: str, **values: Any) -> None:
        """One line to the user, and `values` into the run's record."""


class Method(nn.Module):
    """One pretext task bound to one backbone.

    Attributes:
        trains: backbone parts that it updates and hands over; the rest is frozen. Empty: there is nothing to
            pre-train and the harness goes straight to fine-tuning, from whatever `weights` gives.
        needs: optional abilities that the backbone must offer.
        variants: settings under a name, for `harness profile --compare NAME NAME`.
        generator: the run's own source of randomness on the training device; the harness seeds it for every step. What
            is drawn with `harness.rand` (and `random_integers`, `random_patches`) does not depend on how the batch is
            dealt out over processes; what is drawn from it directly is each process's own.
    """

    plugin_kind: ClassVar[str] = "method"
    name: ClassVar[str]
    version: ClassVar[str] = "1"
    reference: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    trains: tuple[str, ...] = ("encoder", "decoder")
    needs: ClassVar[frozenset[str]] = frozenset()
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    generator: torch.Generator | None = None

    class Config(Settings):
        """Settings of the pretext task; a subclass defines its own, every field with its source.

        The content of a file that a `pathlib.Path` field names is part of what identifies a run.
        """

    def __init__(self, config: Settings, backbone: Backbone) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone

    @classmethod
    def transform(cls, config: Any) -> Transform | None:
        """Per-sample CPU work done in loader workers; picklable, never holds the model. None: the plain crop."""
        return None

    @classmethod
    def example(cls, backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Settings for the conformance checks where a setting has no default; files that they name go to `folder`."""
        return {}

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError where the settings do not fit the crop, the batch or the backbone; no data is read before."""

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """Once before training, for methods that discover something in the data: volumes -> what to sample from.

        Modules whose size depends on what is found are made here. Raises UserError where the data does not suffice.
        """
        return volumes

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Named, weighted loss terms; the harness minimises their sum.

        The batch is this process's part. A term that is a mean over crops is averaged over the parts; one that compares
        crops, or divides by what it counts in them, sees all of them through `harness.gather` and `harness.total`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement forward(batch)")

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """What the method sees, hides and restores of a batch: name -> (N, C, x, y, z) in [0, 1], for one picture.

        Called once after pre-training, in evaluation mode and without gradients. Empty: there is nothing to see.
        """
        return {}

    def after_step(self, step: int) -> None:
        """After each optimizer step: EMA teachers, queues."""

    def weights(self) -> dict[str, Tensor]:
        """What fine-tuning starts from, under the backbone's names: the parts in `trains`, as they are now."""
        return self.backbone.part_weights(self.trains)
