"""Pre-trained weights into a fresh backbone, with a report; never a silent partial load."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from harness.api.backbone import Backbone, inflate


@dataclass(frozen=True)
class Transfer:
    """What became of every tensor.

    Attributes:
        loaded: names taken over.
        inflated: those of them that were made for one channel and repeated for all.
        skipped: names in the weights that the backbone lacks or has in another shape.
        reinitialised: names of the backbone that keep their random values.
        encoder_fraction: share of the encoder's parameters (counted in numbers, not tensors) that was loaded.
    """

    loaded: list[str]
    inflated: list[str]
    skipped: list[str]
    reinitialised: list[str]
    encoder_fraction: float

    def as_record(self) -> dict[str, Any]:
        """Counts and names for the record; the loaded names are counted only, they are the rest."""
        return asdict(self) | {"loaded": len(self.loaded), "num_tensors": len(self.loaded) + len(self.reinitialised)}

    def __str__(self) -> str:
        inflated = f" ({_named(self.inflated)} repeated from one channel)" if self.inflated else ""
        return (
            f"transfer: {len(self.loaded)} tensors loaded{inflated}, {_named(self.skipped)} skipped, "
            f"{_named(self.reinitialised)} re-initialised, {self.encoder_fraction:.1%} of the encoder's parameters"
        )


def _named(keys: list[str], most: int = 4) -> str:
    shown = ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
    return f"{len(keys)} ({shown})" if keys else "0"


def transfer(backbone: Backbone, weights: Mapping[str, Tensor], repeat_stem: bool = False) -> Transfer:
    """Copy what fits by name and shape into `backbone`, in place, and report everything.

    With `repeat_stem`, convolutions of a single input channel serve a backbone of several (see `inflate`).
    """
    own = backbone.state_dict()
    inflated = []
    if repeat_stem:
        grown = {key: inflate(value, own[key].shape) if key in own else value for key, value in weights.items()}
        inflated = [key for key in weights if grown[key].shape != weights[key].shape]
        weights = grown
    fits = {key: value for key, value in weights.items() if key in own and own[key].shape == value.shape}
    backbone.load_state_dict({**own, **fits})
    encoder = {key: value.numel() for key, value in backbone.named_parameters() if backbone.part_of(key) == "encoder"}
    return Transfer(
        loaded=sorted(fits),
        inflated=sorted(inflated),
        skipped=sorted(set(weights) - set(fits)),
        reinitialised=sorted(set(own) - set(fits)),
        encoder_fraction=sum(number for key, number in encoder.items() if key in fits) / max(1, sum(encoder.values())),
    )
