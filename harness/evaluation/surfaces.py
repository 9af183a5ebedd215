"""Surfaces of many masks in one pass over a volume, and exact distances between them in mm.

A volume of masks is held as codes: one unsigned integer a voxel, bit t is mask t. So label maps and overlapping regions
are one case, and a pass over the volume serves all masks.
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
"""Masks in one volume of codes; more are taken in groups."""

NEAR = 600
"""Grid points around a surface point that are looked at before a tree is asked; covers about five voxels."""

Codes = NDArray[np.uint16]


@dataclass(frozen=True)
class Surface:
    """The surface of one mask.

    Attributes:
        places: (n,) flat indices into `volume`.
        weights: (n,) area in mm² of each element; empty where elements count alike.
    """

    places: NDArray[np.int64]
    weights: NDArray[np.float64]


@dataclass(frozen=True)
class Surfaces:
    """The surfaces of all masks of a volume; bit t of `volume` (x, y, z) tells where that of mask t runs."""

    volume: Codes
    masks: list[Surface]


def surface_voxels(codes: Codes, number: int) -> Surfaces:
    """Voxels of each mask that have a face neighbour outside it; beyond the array is outside."""
    volume = np.zeros(codes.shape, np.uint16)
    counts = _mark_voxels(codes, volume, number)
    return _collect(volume, counts)


def surface_cells(codes: Codes, number: int, spacing: Sequence[float]) -> Surfaces:
    """Cells between eight voxels that hold voxels inside and outside a mask, with the area of the surface in each.

    Area by marching cubes in each cell, from MONAI's table, which is that of DeepMind's surface-distance.
    """
    padded = np.pad(codes, 1)
    volume = np.zeros([side - 1 for side in padded.shape], np.uint16)
    counts = _mark_cells(padded, volume, number)
    marked = _collect(volume, counts)
    area = _areas(tuple(map(float, spacing)))
    found = [
        Surface(mask.places, area[_corners(padded, np.asarray(volume.shape), mask.places, bit)])
        for bit, mask in enumerate(marked.masks)
    ]
    return Surfaces(volume, found)


def distances(first: Surfaces, second: Surfaces, mask: int, spacing: Sequence[float]) -> NDArray[np.float64]:
    """Distance in mm of each surface element of `first` to the nearest one of `second`; neither may be empty.

    Exact. Grid points are looked at in the order of their distance, so that the first hit is the nearest; the few
    elements that have none within `NEAR` of them ask a k-d tree.
    """
    here, there = first.masks[mask].places, second.masks[mask].places
    steps, lengths = _ball(tuple(float(edge) for edge in spacing))
    found = _nearest(here, second.volume, np.uint16(1 << mask), steps, lengths)
    far = np.isnan(found)
    if far.any():
        scale = np.asarray(spacing, dtype=float)
        points = [np.stack(np.unravel_index(p, second.volume.shape), 1) * scale for p in (there, here[far])]
        # Sliding midpoints: built several times faster, and asked as fast.
        tree = KDTree(points[0], compact_nodes=False, balanced_tree=False)
        found[far] = tree.query(points[1], workers=-1)[0]
    return found


@lru_cache(maxsize=64)
def _areas(spacing: tuple[float, ...]) -> NDArray[np.float64]:
    """Area in mm² of the surface in a cell for each of the 256 ways in which its corners can be inside."""
    areas: NDArray[np.float64] = get_code_to_measure_table(spacing)[0].numpy().astype(float)
    return areas


@lru_cache(maxsize=64)
def _ball(spacing: tuple[float, ...]) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Steps (n, 3) to the grid points of a ball of about `NEAR` points, nearest first, and their lengths in mm."""
    radius = (NEAR * 3 / (4 * np.pi) * np.prod(spacing)) ** (1 / 3)
    spans = [np.arange(-int(radius / edge), int(radius / edge) + 1) for edge in spacing]
    steps = np.stack(np.meshgrid(*spans, indexing="ij"), -1).reshape(-1, 3)
    lengths = np.linalg.norm(steps * np.asarray(spacing), axis=1)
    order = np.argsort(lengths, kind="stable")
    order = order[lengths[order] <= radius]
    return steps[order].astype(np.int32), lengths[order]


def _collect(volume: Codes, counts: NDArray[np.int64]) -> Surfaces:
    places = np.empty(int(counts.sum()), np.int64)
    starts = np.concatenate([[0], np.cumsum(counts)])
    _fill(volume.reshape(-1), places, starts[:-1].copy())
    nothing = np.empty(0)
    return Surfaces(volume, [Surface(places[a:b], nothing) for a, b in pairwise(starts)])


@njit(cache=True, nogil=True)
def count(first: Codes, second: Codes, number: int) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """Voxels per mask in the first, in the second, and in both: (number, 3)."""
    found = np.zeros((number, 3), np.int64)
    a, b = first.reshape(-1), second.reshape(-1)
    for place in range(a.size):
        here, there = a[place], b[place]
        if here | there:
            for mask in range(number):
                mine, theirs = (here >> mask) & 1, (there >> mask) & 1
                found[mask, 0] += mine
                found[mask, 1] += theirs
                found[mask, 2] += mine & theirs
    return found


@njit(cache=True, nogil=True)
def _mark_voxels(codes: Codes, volume: Codes, number: int) -> NDArray[np.int64]:  # pragma: no cover - compiled
    counts = np.zeros(number, np.int64)
    width, height, depth = codes.shape
    for x in range(width):
        for y in range(height):
            for z in range(depth):
                here = codes[x, y, z]
                if here:
                    inside = here
                    inside &= codes[x - 1, y, z] if x > 0 else 0
                    inside &= codes[x + 1, y, z] if x + 1 < width else 0
                    inside &= codes[x, y - 1, z] if y > 0 else 0
                    inside &= codes[x, y + 1, z] if y + 1 < height else 0
                    inside &= codes[x, y, z - 1] if z > 0 else 0
                    inside &= codes[x, y, z + 1] if z + 1 < depth else 0
                    edge = here & ~inside
                    if edge:
                        volume[x, y, z] = edge
                        for mask in range(number):
                            counts[mask] += (edge >> mask) & 1
    return counts


@njit(cache=True, nogil=True)
def _mark_cells(padded: Codes, volume: Codes, number: int) -> NDArray[np.int64]:  # pragma: no cover - compiled
    counts = np.zeros(number, np.int64)
    width, height, depth = volume.shape
    for x in range(width):
        for y in range(height):
            for z in range(depth):
                some, every = padded[x, y, z], padded[x, y, z]
                for corner in range(1, 8):
                    code = padded[x + (corner >> 2), y + ((corner >> 1) & 1), z + (corner & 1)]
                    some |= code
                    every &= code
                edge = some & ~every
                if edge:
                    volume[x, y, z] = edge
                    for mask in range(number):
                        counts[mask] += (edge >> mask) & 1
    return counts


@njit(cache=True, nogil=True)
def _corners(
    padded: Codes, shape: NDArray[np.int64], places: NDArray[np.int64], mask: int
) -> NDArray[np.int64]:  # pragma: no cover - compiled
    """Which of the eight corners of each cell are in the mask, as the table numbers them: the first one is 128."""
    found = np.zeros(places.size, np.int64)
    for number in range(places.size):
        place = places[number]
        x, y, z = place // (shape[1] * shape[2]), (place // shape[2]) % shape[1], place % shape[2]
        for corner in range(8):
            code = padded[x + (corner >> 2), y + ((corner >> 1) & 1), z + (corner & 1)]
            found[number] |= ((code >> mask) & 1) << (7 - corner)
    return found


@njit(cache=True, nogil=True)
def _fill(volume: Codes, places: NDArray[np.int64], free: NDArray[np.int64]) -> None:  # pragma: no cover - compiled
    for place in range(volume.size):
        code = volume[place]
        if code:
            for mask in range(free.size):
                if (code >> mask) & 1:
                    places[free[mask]] = place
                    free[mask] += 1


@njit(cache=True, nogil=True)
def _nearest(
    places: NDArray[np.int64],
    volume: Codes,
    bit: np.uint16,
    steps: NDArray[np.int32],
    lengths: NDArray[np.float64],
) -> NDArray[np.float64]:  # pragma: no cover - compiled
    width, height, depth = volume.shape
    found = np.full(places.size, np.nan)
    for number in range(places.size):
        place = places[number]
        x, y, z = place // (height * depth), (place // depth) % height, place % depth
        for step in range(lengths.size):
            a, b, c = x + steps[step, 0], y + steps[step, 1], z + steps[step, 2]
            if 0 <= a < width and 0 <= b < height and 0 <= c < depth and volume[a, b, c] & bit:
                found[number] = lengths[step]
                break
    return found
