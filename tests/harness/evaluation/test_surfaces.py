"""Surfaces: their areas, and where they touch the border."""

import math

import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial import distance

from harness.evaluation import surfaces


def test_the_area_of_a_sphere_is_that_of_a_sphere():
    spacing = (1.0, 0.5, 2.0)
    grid = np.meshgrid(*((np.arange(-24, 24 + edge, edge)) for edge in spacing), indexing="ij")
    codes = (sum(axis**2 for axis in grid) <= 20**2).astype(np.uint16)
    (sphere,) = surfaces.surface_cubes(codes, 1, spacing).masks
    # Stairs of a binary mask have more surface than the sphere, by less than a fifth.
    assert 1 < sphere.weights.sum() / (4 * math.pi * 20**2) < 1.2


def test_surface_touching_the_border_counts():
    codes = np.ones((3, 3, 3), np.uint16)
    assert len(surfaces.surface_voxels(codes, 1).masks[0].indices) == 26


SPACINGS = [(1.0, 1.0, 1.0), (0.7, 1.3, 2.5)]


def several(seed, share, shape=(19, 16, 13)):
    """Three masks that overlap, and their codes."""
    masks = np.random.default_rng(seed).random((3, *shape)) < share
    return masks, sum(mask.astype(np.uint16) << np.uint16(bit) for bit, mask in enumerate(masks))


def test_surface_voxels_are_those_that_scipys_erosion_removes():
    """Of each mask for itself, beyond the border is outside."""
    for seed, share in enumerate((0.05, 0.5, 0.9, 0.97)):
        masks, codes = several(seed, share)
        found = surfaces.surface_voxels(codes, 3)
        for bit, mask in enumerate(masks):
            edge = mask & ~ndimage.binary_erosion(mask)
            assert found.masks[bit].indices.tolist() == np.flatnonzero(edge).tolist()
            assert np.array_equal((found.volume >> bit) & 1, edge)


def test_counts_are_numpys():
    (first, one), (second, other) = several(0, 0.3), several(1, 0.6)
    expected = [[a.sum(), b.sum(), (a & b).sum()] for a, b in zip(first, second, strict=True)]
    assert surfaces.count(one, other, 3).tolist() == expected


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("share", [0.002, 0.01, 0.3])
def test_distances_are_those_of_every_pair(share, spacing):
    """Few points are far apart, so that most of them ask the tree; many are near."""
    for seed in range(8):
        _, one = several(seed, share)
        _, other = several(100 + seed, share)
        sides = [surfaces.surface_voxels(codes, 3) for codes in (one, other)]
        for mask in range(3):
            points = [np.argwhere(side.volume & (1 << mask)) * np.array(spacing) for side in sides]
            if not all(map(len, points)):
                continue
            expected = distance.cdist(*points).min(axis=1)
            np.testing.assert_allclose(surfaces.distances(*sides, mask, spacing), expected, rtol=1e-12)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_near_point_along_an_axis_is_nearer_than_a_corner_of_the_box_that_is_searched(spacing):
    """Just beyond the ball of the nearest 600 grid points: along one axis, and in the corner of its box."""
    radius = (surfaces.NEAR * 3 / (4 * math.pi) * np.prod(spacing)) ** (1 / 3)
    reach = [int(radius / edge) for edge in spacing]
    for axis in range(3):
        one, other = np.zeros((40, 40, 40), np.uint16), np.zeros((40, 40, 40), np.uint16)
        one[20, 20, 20] = 1
        other[tuple(20 + n for n in reach)] = 1
        beyond = [20, 20, 20]
        beyond[axis] += reach[axis] + 1
        other[tuple(beyond)] = 1
        sides = [surfaces.surface_voxels(codes, 1) for codes in (one, other)]
        (found,) = surfaces.distances(*sides, 0, spacing)
        assert found == pytest.approx((reach[axis] + 1) * spacing[axis])


@pytest.mark.parametrize("spacing", SPACINGS)
def test_the_area_of_a_box_is_that_of_its_cut_faces_edges_and_corners(spacing):
    """Marching cubes run half a voxel around its voxels' centres: faces, edges at 45 degrees, and triangles at corners."""
    codes = np.zeros((9, 8, 7), np.uint16)
    sides = np.array([3, 4, 2])
    codes[2:5, 2:6, 3:5] = 2
    x, y, z = np.array(spacing)
    length = (sides - 1) * np.array(spacing)
    faces = 2 * (length[0] * length[1] + length[0] * length[2] + length[1] * length[2])
    half = np.array(spacing) / 2
    edges = 4 * sum(length[axis] * np.linalg.norm(np.delete(half, axis)) for axis in range(3))
    corners = 8 * np.linalg.norm(np.cross([-x / 2, y / 2, 0], [-x / 2, 0, z / 2])) / 2
    _, box = surfaces.surface_cubes(codes, 2, spacing).masks
    assert box.weights.sum() == pytest.approx(faces + edges + corners)
    assert len(box.indices) == (4 * 5 * 3) - (2 * 3 * 1)
