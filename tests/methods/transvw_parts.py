"""What the tests of TransVW share."""

from dataclasses import dataclass

import numpy as np

from harness import cut
from methods.transvw import discover_words

CUBE = (42, 42, 42)


def discover(volumes, codes=None, extent=(16, 16, 16), words=6, instances=0.6, distance=5.0, seed=0):
    codes = np.arange(len(volumes), dtype=float)[:, None] if codes is None else codes
    return discover_words(volumes, codes, extent, words, instances, distance, np.random.default_rng(seed))


def box_of(mask):
    """The edges of the box that the mask is, or None."""
    ends = [np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis))) for axis in range(3)]
    edges = [int(end[-1] - end[0] + 1) if len(end) else 0 for end in ends]
    return (edges, [int(end[0]) for end in ends]) if mask.sum() == np.prod(edges) > 0 else None


def kind_of(seen, deformed):
    """Which distortion it was, from the voxels that changed."""
    changed = (seen != deformed)[0]
    if changed.mean() > 0.99:
        return "curve"
    if box_of(~changed) is not None:
        return "out"
    return "in" if box_of(changed) is not None and changed.sum() >= 7**3 else "shuffle"


@dataclass
class Coordinates:
    """A volume whose voxels say where they are and, in the second channel, whose they are."""

    number: int
    shape: tuple[int, int, int] = (40, 44, 36)

    @property
    def image(self):
        where = np.arange(np.prod(self.shape), dtype=np.float32).reshape(self.shape) + 1
        return np.stack([where, np.full(self.shape, self.number + 1, np.float32)])

    def crop(self, origin, size):
        return cut(self.image, origin, size)
