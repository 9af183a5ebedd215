"""Surfaces: their areas, and where they touch the border."""

import math

import numpy as np

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
