"""The same scan under another name: a signature that survives re-saving, turning and resampling."""

from collections.abc import Iterator, Sequence
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

GRID = 16
SAME = 0.995  # copies within a data set, which then count as one patient
ALIKE = 0.988  # scans that must not be pre-trained on if one is a test case: to be looked at, so rather too many than too few
CLIP = (1, 99)  # percentiles; a burnt-in marker or a hot voxel must not decide
ROWS = 4096  # signatures that are compared at a time

Signature = NDArray[np.float32]


def signature(voxels: NDArray[np.float32]) -> Signature:
    """(x, y, z) -> block means (GRID, GRID, GRID), centred, of length 1; zeros for a constant image."""
    sparse = voxels[tuple(slice(None, None, max(1, edge // 64)) for edge in voxels.shape)]
    blocks = voxels.clip(*np.percentile(sparse, CLIP).astype(np.float32))
    for axis in range(3):
        means = np.tensordot(_averages(blocks.shape[axis]), blocks, (1, axis))
        blocks = np.moveaxis(means, 0, axis)
    # What differs in a constant image is rounding.
    if np.ptp(blocks) <= 1e-5 * np.abs(blocks).max():
        return np.zeros_like(blocks)
    centred = blocks - blocks.mean()
    return (centred / np.linalg.norm(centred)).astype(np.float32)


def same_scans(first: Sequence[Signature], second: Sequence[Signature], least: float = SAME) -> list[tuple[int, int]]:
    """Pairs (i, j) where the signatures (GRID, GRID, GRID) `first[i]` and `second[j]` correlate by more than `least`."""
    if not first or not second:
        return []
    theirs = np.stack(second).reshape(len(second), -1)
    pairs: set[tuple[int, int]] = set()
    for start in range(0, len(first), ROWS):
        mine = np.stack(first[start : start + ROWS])
        for turned in _orientations(mine):
            found = np.argwhere(np.abs(turned.reshape(len(mine), -1) @ theirs.T) > least)
            pairs |= {(start + int(i), int(j)) for i, j in found}
    return sorted(pairs)


def twins(signatures: Sequence[Signature]) -> list[tuple[int, int]]:
    """Pairs i < j of cases (channels, GRID, GRID, GRID) whose first channels are the same scan."""
    firsts = [signature[0] for signature in signatures]
    return [(i, j) for i, j in same_scans(firsts, firsts) if i < j]


def _orientations(cubes: Signature) -> Iterator[Signature]:
    """(N, GRID, GRID, GRID) in all 48 orders and directions of the axes."""
    for axes in permutations((1, 2, 3)):
        turned = cubes.transpose(0, *axes)
        for x, y, z in product((1, -1), repeat=3):
            yield turned[:, ::x, ::y, ::z]


def _averages(number: int) -> NDArray[np.float32]:
    """(GRID, number): means over equal parts of an axis; voxels on a border count in shares, alike from both ends."""
    edges, voxel = np.linspace(0, number, GRID + 1), np.arange(number)
    shares = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    shares = shares.clip(0)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
