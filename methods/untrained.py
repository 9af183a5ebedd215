"""The whole path without a single step of pre-training: the control whose difference from scratch must be luck."""

from torch import Tensor

from harness import Method


class Untrained(Method):
    """Initial values of pre-training, without pre-training: the negative control of a comparison.

    Encoder and decoder get the values with which the other methods begin their pre-training, and are transferred as theirs
    are. These values are random and differ from those of `scratch`. So the difference from scratch is luck. A table in which
    it is not (its interval excludes 0) is mis-calibrated: its intervals are too narrow. It is never ranked.
    """

    name = "untrained"
    reference = "the negative control of every comparison"
    trains = ()

    def weights(self) -> dict[str, Tensor]:
        """The initial values of encoder and decoder."""
        return self.backbone.part_weights(("encoder", "decoder"))
