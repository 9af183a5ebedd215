"""Copies pre-trained weights into a new backbone, and reports every tensor that did not fit: no silent partial load."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import floor
from typing import Any

from torch import Tensor

from harness.api.backbone import Backbone, inflate
from harness.config.request import TransferParts
from harness.system.errors import UserError


@dataclass(frozen=True)
class Transfer:
    """What happened to every tensor.

    Attributes:
        loaded: names of the tensors that were copied.
        inflated: names of the copied tensors that were made for one channel and repeated for all channels.
        skipped: names of the tensors in the weights that the backbone lacks or has in another shape.
        reinitialised: names of the backbone's tensors that keep their random values.
        encoder_fraction: share of the encoder's parameters that was loaded, counted in single numbers, not in tensors.
        random_stem: names of the encoder's convolutions that keep their random values because the weights have them for
            another number of input channels. They hold few parameters, but all other layers depend on them.
    """

    loaded: list[str]
    inflated: list[str]
    skipped: list[str]
    reinitialised: list[str]
    encoder_fraction: float
    random_stem: list[str] = field(default_factory=list)

    def as_record(self) -> dict[str, Any]:
        """Counts and names for the record. Loaded names are only counted; they are all of the backbone's but `reinitialised`.

        `random_stem` is there only if it is not empty.
        """
        names = {key: value for key, value in asdict(self).items() if key != "random_stem" or value}
        return names | {"loaded": len(self.loaded), "num_tensors": len(self.loaded) + len(self.reinitialised)}

    def __str__(self) -> str:
        if not self.loaded and not self.skipped:
            return "transfer: nothing, all weights are random"
        inflated = f" ({_named(self.inflated)} repeated from one channel)" if self.inflated else ""
        # Rounded down: 100.0% means all of them.
        percent = floor(1000 * self.encoder_fraction) / 10
        stem = ", but its first convolution is random, as the weights have it for another number of modalities: "
        return (
            f"transfer: {len(self.loaded)} tensors loaded{inflated}, {_named(self.skipped)} skipped, "
            f"{_named(self.reinitialised)} re-initialised, {percent:.1f}% of the encoder's parameters"
            + (stem + _named(self.random_stem) if self.random_stem else "")
        )


def _named(keys: list[str], most: int = 4) -> str:
    """The number of keys, and the first `most` of them."""
    first = ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
    return f"{len(keys)} ({first})" if keys else "0"


def select_parts(backbone: Backbone, weights: Mapping[str, Tensor], parts: TransferParts) -> dict[str, Tensor]:
    """The pre-trained tensors that fine-tuning starts from.

    Args:
        parts: "encoder": those of the encoder only; "method" and "all": all that the method passes on.

    Raises:
        UserError: "encoder" leaves nothing to start from.
    """
    if parts != "encoder":
        return dict(weights)
    owned = set(backbone.state_dict())
    chosen = {key: value for key, value in weights.items() if key in owned and backbone.part_of(key) == "encoder"}
    if not chosen:
        raise UserError("--transfer encoder leaves nothing to transfer: no pre-trained tensor belongs to the encoder")
    return chosen


def transfer(backbone: Backbone, weights: Mapping[str, Tensor], repeat_stem: bool = False) -> Transfer:
    """Copy the tensors that fit by name and shape into `backbone`, in place, and report all of them.

    With `repeat_stem`, convolutions with one input channel are repeated for a backbone with several channels (see `inflate`).
    """
    own = backbone.state_dict()
    inflated = []
    if repeat_stem:
        repeated = {key: inflate(value, own[key].shape) if key in own else value for key, value in weights.items()}
        inflated = [key for key in weights if repeated[key].shape != weights[key].shape]
        weights = repeated
    fitting = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    backbone.load_state_dict({**own, **fitting})
    encoder = {key: value.numel() for key, value in backbone.named_parameters() if backbone.part_of(key) == "encoder"}
    return Transfer(
        loaded=sorted(fitting),
        inflated=sorted(inflated),
        skipped=sorted(set(weights) - set(fitting)),
        reinitialised=sorted(set(own) - set(fitting)),
        encoder_fraction=sum(size for key, size in encoder.items() if key in fitting) / max(1, sum(encoder.values())),
        random_stem=[
            key
            for key in encoder
            if key in weights
            and key not in fitting
            and own[key].ndim == weights[key].ndim == 5
            and own[key].shape[:1] + own[key].shape[2:] == weights[key].shape[:1] + weights[key].shape[2:]
        ],
    )
