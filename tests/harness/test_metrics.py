"""Dice and HD95 against monai.metrics, brute force, analytic shapes and every empty-mask case."""

import math

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance

from harness.metrics import hausdorff95, score, surface


def blob(rng, shape=(20, 17, 14)):
    """An irregular mask that may touch the border."""
    from scipy import ndimage

    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    return smooth > np.quantile(smooth, rng.uniform(0.6, 0.9))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spacing", [(1, 1, 1), (0.7, 1.3, 2.5)])
def test_agrees_with_monai(seed, spacing):
    rng = np.random.default_rng(seed)
    a, b = blob(rng), blob(rng)
    got = score(a, b, spacing)
    tensors = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    assert got.status == "scored"
    assert got.dice == pytest.approx(compute_dice(*tensors, include_background=True).item(), abs=1e-6)
    theirs = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
    assert got.hd95_mm == pytest.approx(theirs.item(), abs=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_agrees_with_brute_force(seed):
    rng = np.random.default_rng(100 + seed)
    a, b = rng.random((6, 7, 5)) > 0.6, rng.random((6, 7, 5)) > 0.7
    spacing = np.array([1.5, 0.8, 2.0])

    def outer(mask):
        found = []
        for voxel in np.argwhere(mask):
            for axis in range(3):
                for step in (-1, 1):
                    there = voxel.copy()
                    there[axis] += step
                    outside = (there < 0).any() or (there >= mask.shape).any() or not mask[tuple(there)]
                    if outside:
                        found.append(tuple(voxel * spacing))
        return [np.array(point) for point in sorted(set(found))]

    def directed(here, there):
        return np.percentile([min(np.linalg.norm(p - q) for q in there) for p in here], 95)

    expected = max(directed(outer(a), outer(b)), directed(outer(b), outer(a)))
    assert hausdorff95(a, b, spacing) == pytest.approx(expected)


def test_shifted_cube_is_its_shift_in_mm():
    a, b = np.zeros((30, 30, 30), bool), np.zeros((30, 30, 30), bool)
    a[5:15, 5:15, 5:15] = True
    b[8:18, 5:15, 5:15] = True
    got = score(a, b, (2.0, 1.0, 1.0))
    assert got.hd95_mm == pytest.approx(6.0)
    assert got.dice == pytest.approx(0.7)


def test_concentric_spheres_are_the_difference_of_radii_apart():
    x = np.indices((41, 41, 41)) - 20
    r = np.sqrt((x**2).sum(axis=0))
    assert hausdorff95(r <= 15, r <= 10, (1, 1, 1)) == pytest.approx(5, abs=0.6)


def test_surface_touching_the_border_counts():
    full = np.ones((3, 3, 3), bool)
    assert len(surface(full)) == 26


SPACING = (1.0, 2.0, 3.0)
DIAGONAL = math.sqrt(10**2 + 20**2 + 30**2)


@pytest.mark.parametrize(
    ("predicted", "present", "expected"),
    [
        (False, True, ("missed", 0.0, DIAGONAL)),
        (True, False, ("spurious", 0.0, DIAGONAL)),
        (False, False, ("empty", None, None)),
        (True, True, ("scored", 1.0, 0.0)),
    ],
)
def test_policy_for_empty_masks(predicted, present, expected):
    masks = []
    for filled in (predicted, present):
        mask = np.zeros((10, 10, 10), bool)
        mask[4:6, 4:6, 4:6] = filled
        masks.append(mask)
    got = score(*masks, SPACING)
    assert (got.status, got.dice) == expected[:2]
    assert got.hd95_mm == (None if expected[2] is None else pytest.approx(expected[2]))


def test_missing_a_structure_never_improves_the_score():
    reference, poor = np.zeros((16, 16, 16), bool), np.zeros((16, 16, 16), bool)
    reference[:8], poor[15:, 15:, 15:] = True, True
    bad, missed = score(poor, reference, (1, 1, 1)), score(np.zeros_like(poor), reference, (1, 1, 1))
    assert missed.dice <= bad.dice
    assert missed.hd95_mm >= bad.hd95_mm


def test_shapes_must_match():
    with pytest.raises(ValueError, match="one shape"):
        score(np.ones((2, 2, 2), bool), np.ones((2, 2, 3), bool), (1, 1, 1))
