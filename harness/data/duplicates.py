"""Recognises a scan by its voxels, whatever the name, the voxel type and the header of its file say.

Signature of a scan: its intensities are clipped to percentiles and averaged onto a small cube of blocks. Two signatures are
compared in two steps:

1. The cubes at half their resolution are correlated in the 48 orientations of an array. Pairs above `CANDIDATE` go on.
2. In the orientation of step 1, the details of one cube (a difference of Gaussians) are fitted to those of the other, with a
   scale and a small shift and stretch along each axis. Two scans are alike if the fit correlates by at least `ALIKE`.

Heads that were registered to one template correlate by almost 0.99 in step 1, because what they share is coarse. What tells two
people apart is in the details. The shift and the stretch are for copies that were cropped by about a hundredth of an edge.

The comparison is robust to re-saving, to other voxel types, to rescaled, rounded, inverted or bent intensities, to wide
windows, to single bright voxels, to mirrored or turned arrays, to header edits, to resampling, to noise, and to a crop of about
a hundredth of an edge. It is not robust to narrow windows and deeper crops.

`tests/harness/data/test_duplicates_calibration.py` counts false alarms and misses; docs/data.md has the numbers.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

GRID = 24  # blocks along each axis; an even number
CANDIDATE = 0.95  # correlation at half the resolution from which the details are compared
ALIKE = 0.96  # correlation of the details from which two scans count as one
DETAIL = (0.75, 1.5)  # standard deviations of the two Gaussians, in blocks
CLIP = (1, 99)  # percentiles, so that a burnt-in marker or a hot voxel does not dominate the signature
ROWS = 4096  # number of signatures that are compared at a time, to bound the memory

Signature = NDArray[np.int8]
Cube = NDArray[np.float32]


class Match(NamedTuple):
    """Two scans that are alike: their indices, and the correlation of their details (0 to 1)."""

    first: int
    second: int
    correlation: float


def signature(voxels: NDArray[np.float32]) -> Signature:
    """Block means of an image: (x, y, z) -> (GRID, GRID, GRID), centred, from -127 to 127; zeros for a constant image."""
    sparse = voxels[tuple(slice(None, None, max(1, edge // 64)) for edge in voxels.shape)]
    blocks = voxels.clip(*np.percentile(sparse, CLIP).astype(np.float32))
    for axis in range(3):
        means = np.tensordot(_averaging_matrix(blocks.shape[axis]), blocks, (1, axis))
        blocks = np.moveaxis(means, 0, axis)
    # In a constant image the block means differ by rounding errors only.
    if np.ptp(blocks) <= 1e-5 * np.abs(blocks).max():
        return np.zeros(blocks.shape, np.int8)
    centred = blocks - blocks.mean()
    return np.round(centred * (127 / np.abs(centred).max())).astype(np.int8)


def same_scans(first: Sequence[Signature], second: Sequence[Signature]) -> list[Match]:
    """The pairs of `first[i]` and `second[j]`, cubes (GRID, GRID, GRID), that are alike, sorted by i and j."""
    highest: dict[tuple[int, int], float] = {}
    details: dict[int, NDArray[np.float32]] = {}
    for i, matches in _candidates(first, second).items():
        cubes = list(_orientations(first[i][None]))
        for orientation, others in matches.items():
            details |= {j: _details(second[j]) for j in others if j not in details}
            fitted = _fit(cubes[orientation][0], np.stack([details[j] for j in others], axis=1))
            for j, correlation in zip(others, fitted, strict=True):
                highest[i, j] = max(highest.get((i, j), 0.0), float(correlation))
    return [Match(i, j, value) for (i, j), value in sorted(highest.items()) if value >= ALIKE]


def named_pairs(
    first: Sequence[tuple[str, Signature]], second: Sequence[tuple[str, Signature]]
) -> dict[tuple[str, str], float]:
    """The names of scans of `first` and `second` that are alike, sorted; a scan with several channels has several entries.

    Returns:
        pair of names -> the highest correlation over their channels.
    """
    highest: dict[tuple[str, str], float] = {}
    for i, j, correlation in same_scans([cube for _, cube in first], [cube for _, cube in second]):
        pair = first[i][0], second[j][0]
        highest[pair] = max(highest.get(pair, 0.0), correlation)
    return dict(sorted(highest.items()))


def duplicate_pairs(signatures: Sequence[Signature]) -> list[Match]:
    """Pairs (i, j), i < j, of cases whose first channels are alike.

    Args:
        signatures: one array (channels, GRID, GRID, GRID) per case.
    """
    first_channels = [signature[0] for signature in signatures]
    return [match for match in same_scans(first_channels, first_channels) if match.first < match.second]


def _candidates(first: Sequence[Signature], second: Sequence[Signature]) -> dict[int, dict[int, list[int]]]:
    """Index in `first` -> number of the orientation -> indices in `second` that correlate at half the resolution."""
    candidates: dict[int, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    if not first or not second:
        return candidates
    columns = _halved(np.stack(second)).reshape(len(second), -1)
    for start in range(0, len(first), ROWS):
        rows = _halved(np.stack(first[start : start + ROWS]))
        for orientation, oriented in enumerate(_orientations(rows)):
            alike = np.abs(oriented.reshape(len(rows), -1) @ columns.T) > CANDIDATE
            for i, j in np.argwhere(alike).tolist():
                candidates[start + i][orientation].append(j)
    return candidates


def _halved(cubes: Signature) -> Cube:
    """The cubes (N, GRID, GRID, GRID) at half their resolution, centred, of length 1; zeros for a constant one."""
    half = GRID // 2
    means = cubes.reshape(len(cubes), half, 2, half, 2, half, 2).mean((2, 4, 6), dtype=np.float32)
    means -= means.mean((1, 2, 3), keepdims=True)
    lengths = np.linalg.norm(means.reshape(len(means), -1), axis=1)
    return np.asarray(means / np.where(lengths > 0, lengths, 1)[:, None, None, None])


def _band(cube: Signature) -> Cube:
    """A difference of Gaussians of a cube."""
    fine, coarse = (gaussian_filter(cube.astype(np.float32), sigma) for sigma in DETAIL)
    return np.asarray(fine - coarse)


def _details(cube: Signature) -> NDArray[np.float32]:
    """Every second block along each axis of a cube's details, as one vector, centred."""
    return _thinned(_band(cube))


def _thinned(cube: Cube) -> NDArray[np.float32]:
    """Every second block along each axis, as one centred vector: details of that size need no more."""
    vector = cube[::2, ::2, ::2].ravel()
    return np.asarray(vector - vector.mean())


def _fit(cube: Signature, others: NDArray[np.float32]) -> NDArray[np.float64]:
    """Correlation of the columns of `others` (blocks, N) with the details of `cube`, scaled, shifted and stretched: (N,).

    To first order, a shift along an axis adds the derivative along it, and a stretch adds the derivative times the position.
    """
    band = _band(cube)
    position = (np.arange(GRID) - (GRID - 1) / 2) / GRID
    terms = [band]
    for axis, derivative in enumerate(np.gradient(band)):
        terms += [derivative, derivative * np.expand_dims(position, [other for other in range(3) if other != axis])]
    columns = np.stack([_thinned(term) for term in terms], axis=1).astype(np.float64)
    products = columns.T @ others
    coefficients = np.linalg.lstsq(columns.T @ columns, products, rcond=None)[0]
    explained, total = (products * coefficients).sum(axis=0), np.square(others, dtype=np.float64).sum(axis=0)
    return np.asarray(np.sqrt(np.clip(explained / np.where(total > 0, total, 1), 0, 1)))


def _orientations(cubes: NDArray[Any]) -> Iterator[NDArray[Any]]:
    """The cubes (N, edge, edge, edge) in all 48 orders and directions of their axes."""
    for axes in permutations((1, 2, 3)):
        turned = cubes.transpose(0, *axes)
        for x, y, z in product((1, -1), repeat=3):
            yield turned[:, ::x, ::y, ::z]


def _averaging_matrix(number: int) -> NDArray[np.float32]:
    """Matrix (GRID, number) that averages an axis of `number` voxels over GRID intervals of equal length.

    A voxel on the border of two intervals counts in each by its share. The matrix is symmetric under reversal of the axis.
    """
    edges, voxel = np.linspace(0, number, GRID + 1), np.arange(number)
    shares = np.minimum(edges[1:, None], voxel + 1) - np.maximum(edges[:-1, None], voxel)
    shares = shares.clip(0)
    return (shares / shares.sum(axis=1, keepdims=True)).astype(np.float32)
