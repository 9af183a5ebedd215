"""Surfaces of many masks in one pass over a volume, and exact distances between them in mm.

Masks are stored as a volume of codes: one unsigned integer per voxel, whose bit t is mask t. So the same code serves label
maps and overlapping regions, and one pass over the volume serves all masks.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
from monai.metrics.utils import get_code_to_measure_table
from numba import njit
from numpy.typing import NDArray
from scipy.spatial import KDTree

BITS = 16
"""Number of masks that a volume of codes can hold; more masks are processed in groups of this size."""

NEAR = 600
"""Grid points around a surface element that are searched before a k-d tree is used; a radius of about five voxels."""

Codes = NDArray[np.uint16]
"""A volume (x, y, z) of masks: bit t of a voxel is mask t."""


@dataclass(frozen=True)
class Surface:
    """The surface of one mask.

    Attributes:
        indices: (n,) flat indices of the surface elements in `Surfaces.volume`.
        weights: (n,) area in mm² of each element; empty if all elements count the same.
    """

    indices: NDArray[np.int64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of all masks of a volume. Bit t of `volume` (x, y, z) is set where mask t has a surface element."""

    volume: Codes
    masks: list[Surface]


def surface_voxels(codes: Codes, number: int) -> Surfaces:
    """Voxels of each mask that have a face neighbour outside it; everything beyond the array is outside."""
    volume = np.zeros(codes.shape, np.uint16)
    counts = _mark_voxels(codes, volume, number)
    return _collect(volume, counts)


def surface_cubes(codes: Codes, number: int, spacing: Sequence[float]) -> Surfaces:
    """Cubes with the area in mm² of the surface in them.

    The corners of a cube are the centres of eight neighbouring voxels, some of them inside a mask and some outside. The area
    is that of marching cubes, from MONAI's table, which is the table of DeepMind's surface-distance.
    """
    padded = np.pad(codes, 1)
    volume = np.zeros([side - 1 for side in padded.shape], np.uint16)
    counts = _mark_cubes(padded, volume, number)
    marked = _collect(volume, counts)
    areas = _areas(tuple(map(float, spacing)))
    masks = [
        Surface(mask.indices, areas[_corners(padded, np.asarray(volume.shape), mask.indices, bit)])
        for bit, mask in enumerate(marked.masks)
    ]
    return Surfaces(volume, masks)


def distances(first: Surfaces, second: Surfaces, mask: int, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Distance in mm from each surface element of `first` to the nearest one of `second`; neither may be empty.

    The distances are exact. Grid points are searched in the order of their distance, so that the first hit is the nearest.
    The few elements without a hit among the `NEAR` nearest grid points use a k-d tree.
    """
    first_indices, second_indices = first.masks[mask].indices, second.masks[mask].indices
    offsets, lengths = _ball(tuple(float(edge) for edge in spacing))
    nearest = _nearest(first_indices, second.volume, np.uint16(1 << mask), offsets, lengths)
    far = np.isnan(nearest)
    if far.any():
        scale = np.asarray(spacing, dtype=float)
        flat_indices = (second_indices, first_indices[far])
        points = [np.stack(np.unravel_index(indices, second.volume.shape), 1) * scale for indices in flat_indices]
        # A tree that splits at sliding midpoints is built several times faster, and its queries are as fast.
        tree = KDTree(points[0], compact_nodes=False, balanced_tree=False)
        nearest[far] = tree.query(points[1], workers=-1)[0]
    return nearest


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Area in mm² of the surface in a cube, for each of the 256 combinations of corners inside the mask."""
    areas: NDArray[np.float64] = get_code_to_measure_table(spacing)[0].numpy().astype(float)
    return areas


@lru_cache(maxsize=64)
def _ball(spacing: tuple[float, ...]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Offsets (n, 3) in voxels to the about `NEAR` grid points of a ball, nearest first, and their lengths in mm."""
    radius = (NEAR * 3 / (4 * np.pi) * np.prod(spacing)) ** (1 / 3)
    spans = [np.arange(-int(radius / edge), int(radius / edge) + 1) for edge in spacing]
    offsets = np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 3)
    lengths = np.linalg.norm(offsets * np.asarray(spacing), axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= radius]
    return offsets[order].astype(np.int32), lengths[order]


def _collect(volume: Codes, counts: NDArray[np.int64]) -> Surfaces:
    """The flat indices of the surface elements of each mask, in `counts` numbers, without weights."""
    indices = np.empty(int(counts.sum()), np.int64)
    bounds = np.concatenate([[0], np.cumsum(counts)])
    _fill(volume.reshape(-1), indices, bounds[:-1].copy())
    no_weights = np.empty(0)
    return Surfaces(volume, [Surface(indices[begin:end], no_weights) for begin, end in pairwise(bounds)])


@njit(cache=True, nogil=True)
def count(first: Codes, second: Codes, number: int) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """Numbers of voxels of each mask in the first volume, in the second, and in both: (number, 3)."""
    counts = np.zeros((number, 3), np.int64)
    a, b = first.reshape(-1), second.reshape(-1)
    for index in range(a.size):
        code_a, code_b = a[index], b[index]
        if code_a | code_b:
            for mask in range(number):
                bit_a, bit_b = (code_a >> mask) & 1, (code_b >> mask) & 1
                counts[mask, 0] += bit_a
                counts[mask, 1] += bit_b
                counts[mask, 2] += bit_a & bit_b
    return counts


@njit(cache=True, nogil=True)
def _mark_voxels(codes: Codes, volume: Codes, number: int) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """Mark the surface voxels of each mask in `volume`, which is zero before. Returns their number per mask."""
    counts = np.zeros(number, np.int64)
    width, height, depth = codes.shape
    for x in range(width):
        for y in range(height):
            for z in range(depth):
                code = codes[x, y, z]
                if code:
                    inside = code
                    inside &= codes[x - 1, y, z] if x > 0 else 0
                    inside &= codes[x + 1, y, z] if x + 1 < width else 0
                    inside &= codes[x, y - 1, z] if y > 0 else 0
                    inside &= codes[x, y + 1, z] if y + 1 < height else 0
                    inside &= codes[x, y, z - 1] if z > 0 else 0
                    inside &= codes[x, y, z + 1] if z + 1 < depth else 0
                    edge = code & ~inside
                    if edge:
                        volume[x, y, z] = edge
                        for mask in range(number):
                            counts[mask] += (edge >> mask) & 1
    return counts


@njit(cache=True, nogil=True)
def _mark_cubes(padded: Codes, volume: Codes, number: int) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """Mark the cubes through which the surface of each mask runs in `volume`, which is zero before; their number per mask."""
    counts = np.zeros(number, np.int64)
    width, height, depth = volume.shape
    for x in range(width):
        for y in range(height):
            for z in range(depth):
                any_corner, all_corners = padded[x, y, z], padded[x, y, z]
                for corner in range(1, 8):
                    code = padded[x + (corner >> 2), y + ((corner >> 1) & 1), z + (corner & 1)]
                    any_corner |= code
                    all_corners &= code
                edge = any_corner & ~all_corners
                if edge:
                    volume[x, y, z] = edge
                    for mask in range(number):
                        counts[mask] += (edge >> mask) & 1
    return counts


@njit(cache=True, nogil=True)
def _corners(
    padded: Codes, shape: NDArray[np.int64], cubes: NDArray[np.int64], mask: int
) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """The corners of each cube that are in the mask, as a sum of the table's numbers: 128 for the first, 1 for the last.

    Args:
        cubes: flat indices in a volume of extent `shape`.
    """
    rows = np.zeros(cubes.size, np.int64)
    for number in range(cubes.size):
        index = cubes[number]
        x, y, z = index // (shape[1] * shape[2]), (index // shape[2]) % shape[1], index % shape[2]
        for corner in range(8):
            code = padded[x + (corner >> 2), y + ((corner >> 1) & 1), z + (corner & 1)]
            rows[number] |= ((code >> mask) & 1) << (7 - corner)
    return rows


@njit(cache=True, nogil=True)
def _fill(volume: Codes, indices: NDArray[np.int64], ends: NDArray[np.int64]) -> None:  # pragma: no cover - compiled
    """Write the flat indices of the marked elements of each mask to `indices`, from the mask's position in `ends` on."""
    for index in range(volume.size):
        code = volume[index]
        if code:
            for mask in range(ends.size):
                if (code >> mask) & 1:
                    indices[ends[mask]] = index
                    ends[mask] += 1


@njit(cache=True, nogil=True)
def _nearest(
    elements: NDArray[np.int64],
    volume: Codes,
    bit: np.uint16,
    offsets: NDArray[np.int32],
    lengths: NDArray[np.float64],
) -> NDArray[np.float64]:  # pragma: no cover - compiled
    """Distance in mm from each element (flat index) to the nearest voxel of `volume` with `bit` set; NaN if none is near.

    Args:
        offsets: to the grid points that are searched, nearest first.
        lengths: of the offsets, in mm.
    """
    width, height, depth = volume.shape
    nearest = np.full(elements.size, np.nan)
    for number in range(elements.size):
        index = elements[number]
        x, y, z = index // (height * depth), (index // depth) % height, index % depth
        for step in range(lengths.size):
            a, b, c = x + offsets[step, 0], y + offsets[step, 1], z + offsets[step, 2]
            if 0 <= a < width and 0 <= b < height and 0 <= c < depth and volume[a, b, c] & bit:
                nearest[number] = lengths[step]
                break
    return nearest
