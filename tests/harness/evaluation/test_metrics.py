"""Dice, HD95 and surface Dice against monai.metrics, scipy, brute force, analytic shapes and every empty-mask case."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from scipy import ndimage

from harness.evaluation.metrics import Scoring, hausdorff95, score, score_labels

SPACINGS = [(1, 1, 1), (0.7, 1.3, 2.5)]


def blob(rng, shape=(20, 17, 14)):
    """An irregular mask that may touch the border."""
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), 2)
    return smooth > np.quantile(smooth, rng.uniform(0.6, 0.9))


def single(first, second, spacing, **scoring):
    return score(first[None], second[None], spacing, Scoring(**scoring))[0]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_agrees_with_monai(seed, spacing):
    rng = np.random.default_rng(seed)
    a, b = blob(rng), blob(rng)
    got = single(a, b, spacing, tolerance=2.0)
    tensors = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    assert got.status == "scored"
    assert got.dice == pytest.approx(compute_dice(*tensors, include_background=True).item(), abs=1e-6)
    theirs = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=list(spacing))
    assert got.hd95_mm == pytest.approx(theirs.item(), abs=1e-4)
    # MONAI pads the image for surface Dice, so that the border counts as ours does.
    theirs = compute_surface_dice(*tensors, [2.0], include_background=True, spacing=list(spacing))
    assert got.surface_dice == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_agrees_with_scipy(seed, spacing):
    """Surfaces by scipy's erosion, distances by its exact distance transform."""
    rng = np.random.default_rng(50 + seed)
    masks = [blob(rng), rng.random((20, 17, 14)) > 0.98]  # the second is scattered: far points ask the tree
    edges = [mask & ~ndimage.binary_erosion(mask) for mask in masks]
    maps = [ndimage.distance_transform_edt(~edge, sampling=spacing) for edge in edges]
    there, back = maps[1][edges[0]], maps[0][edges[1]]
    directed = max(np.percentile(there, 95), np.percentile(back, 95))
    assert hausdorff95(*masks, spacing) == pytest.approx(directed, abs=1e-9)
    pooled = np.percentile(np.concatenate([there, back]), 95)
    assert hausdorff95(*masks, spacing, "pooled") == pytest.approx(pooled, abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("spacing", SPACINGS)
def test_agrees_with_surface_distance(seed, spacing):
    import surface_distance

    rng = np.random.default_rng(seed)
    a, b = blob(rng), blob(rng)
    got = single(a, b, spacing, hd95="area-weighted", tolerance=1.3)
    theirs = surface_distance.compute_surface_distances(b, a, spacing)
    assert got.hd95_mm == pytest.approx(surface_distance.compute_robust_hausdorff(theirs, 95), abs=1e-9)
    expected = surface_distance.compute_surface_dice_at_tolerance(theirs, 1.3)
    assert got.surface_dice == pytest.approx(expected, abs=1e-6)


def outer(mask):
    """Voxels with a face neighbour outside, by looking at each."""
    found = []
    for voxel in map(tuple, np.argwhere(mask)):
        for axis, step in product(range(3), (-1, 1)):
            there = list(voxel)
            there[axis] += step
            beyond = there[axis] < 0 or there[axis] >= mask.shape[axis]
            if beyond or not mask[tuple(there)]:
                found.append(voxel)
                break
    return [(voxel, 1.0) for voxel in found]


def cells(mask, spacing):
    """Cells that the surface crosses and its area there. Only for masks whose cells have a plain geometry, see below."""
    padded, found = np.pad(mask, 1), []
    for corner in product(*(range(side + 1) for side in mask.shape)):
        code = padded[tuple(slice(c, c + 2) for c in corner)]
        if code.any() and not code.all():
            found.append((corner, area(code, spacing)))
    return found


def area(code, spacing):
    """Area of marching cubes in one cell whose inside is a corner, an edge, a face or the complement of one of them."""
    if code.sum() > 4:
        code = ~code
    inside = np.argwhere(code)
    x, y, z = spacing
    number, span = len(inside), np.ptp(inside, axis=0)
    if number == 1:  # a corner is cut off: the triangle through the middles of its three edges
        return np.linalg.norm(np.cross([-x / 2, y / 2, 0], [-x / 2, 0, z / 2])) / 2
    along = np.array(spacing)
    if number == 2 and span.sum() == 1:  # an edge is cut off: a rectangle of its length
        others = along[span == 0] / 2
        return along[span == 1][0] * np.linalg.norm(others)
    if number == 4 and span.sum() == 2:  # a face
        return np.prod(along[span == 1])
    raise AssertionError(f"a cell that this reference does not know: {code}")


def brute(first, second, spacing, definition):
    """HD95 by comparing every pair of surface elements."""
    sides = [cells(mask, spacing) if definition == "area-weighted" else outer(mask) for mask in (first, second)]
    scale = np.asarray(spacing, dtype=float)
    directed = []
    for here, there in (sides, sides[::-1]):
        points = np.array([place for place, _ in there]) * scale
        nearest = [np.linalg.norm(points - np.array(place) * scale, axis=1).min() for place, _ in here]
        directed.append((np.array(nearest), np.array([weight for _, weight in here])))
    if definition == "pooled":
        return np.percentile(np.concatenate([near for near, _ in directed]), 95)
    if definition == "max-directed":
        return max(np.percentile(near, 95) for near, _ in directed)
    found = []
    for near, weights in directed:
        total, limit = 0.0, 0.95 * weights.sum()
        for distance, weight in sorted(zip(near, weights, strict=True)):
            total += weight
            if total >= limit * (1 - 1e-12):
                found.append(distance)
                break
    return max(found)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("definition", ["max-directed", "pooled"])
def test_agrees_with_brute_force(seed, definition):
    rng = np.random.default_rng(100 + seed)
    a, b = rng.random((6, 7, 5)) > 0.6, rng.random((6, 7, 5)) > 0.7
    spacing = (1.5, 0.8, 2.0)
    assert hausdorff95(a, b, spacing, definition) == pytest.approx(brute(a, b, spacing, definition))


@pytest.mark.parametrize("seed", range(6))
def test_area_weighted_agrees_with_brute_force(seed):
    """Boxes that are apart: their cells are faces, edges and corners, whose areas need no table."""
    rng = np.random.default_rng(seed)
    masks = []
    for _ in range(2):
        mask = np.zeros((13, 12, 11), bool)
        for origin in ((1, 1, 1), (7, 6, 6)):
            x, y, z = (start + rng.integers(0, 2) for start in origin)
            width, height, depth = rng.integers(1, 4, 3)
            mask[x : x + width, y : y + height, z : z + depth] = True
        masks.append(mask)
    spacing = (1.5, 0.8, 2.0)
    expected = brute(*masks, spacing, "area-weighted")
    assert hausdorff95(*masks, spacing, "area-weighted") == pytest.approx(expected)


@pytest.mark.parametrize("definition", ["max-directed", "pooled", "area-weighted"])
@pytest.mark.parametrize("spacing", [(2.0, 1.0, 1.0), (1.0, 3.0, 0.5)])
def test_shifted_cube_is_its_shift_in_mm(definition, spacing):
    a, b = np.zeros((30, 30, 30), bool), np.zeros((30, 30, 30), bool)
    a[5:15, 5:15, 5:15] = True
    b[8:18, 5:15, 5:15] = True
    got = single(a, b, spacing, hd95=definition)
    assert got.hd95_mm == pytest.approx(3 * spacing[0])
    assert got.dice == pytest.approx(0.7)


@pytest.mark.parametrize("definition", ["max-directed", "pooled", "area-weighted"])
@pytest.mark.parametrize("spacing", [(1, 1, 1), (1.0, 0.5, 2.0)])
def test_concentric_spheres_are_the_difference_of_radii_apart(definition, spacing):
    grid = np.meshgrid(*((np.arange(-24, 24 + edge, edge)) for edge in spacing), indexing="ij")
    r = np.sqrt(sum(axis**2 for axis in grid))
    got = single(r <= 20, r <= 15, spacing, hd95=definition, tolerance=6.5)
    assert got.hd95_mm == pytest.approx(5, abs=max(spacing) * 0.6)
    assert got.surface_dice == 1.0
    assert single(r <= 20, r <= 15, spacing, hd95=definition, tolerance=2.0).surface_dice == 0.0


def test_many_targets_are_scored_as_one_by_one():
    """More targets than one volume of codes holds, overlapping ones too."""
    rng = np.random.default_rng(3)
    label = [rng.integers(0, 20, (12, 11, 10)).astype(np.uint8) for _ in range(2)]
    targets = {str(value): (value,) for value in range(1, 20)} | {"some": (1, 2, 3), "absent": (77,)}
    together = score_labels(*label, targets, (1, 2, 3))
    masks = [np.stack([np.isin(each, values) for values in targets.values()]) for each in label]
    assert score(*masks, (1, 2, 3)) == together
    for number in range(len(targets)):
        assert score(masks[0][[number]], masks[1][[number]], (1, 2, 3)) == [together[number]]
    assert together[-1].status == "empty"


SPACING = (1.0, 2.0, 3.0)
DIAGONAL = math.sqrt(10**2 + 20**2 + 30**2)
EMPTY = {
    "worst": {(0, 1): (0, DIAGONAL, 0), (1, 0): (0, DIAGONAL, 0), (0, 0): (None, None, None), (1, 1): (1, 0, 1)},
    "skipped": {(0, 1): (0, None, 0), (1, 0): (0, None, 0), (0, 0): (None, None, None), (1, 1): (1, 0, 1)},
    "perfect": {(0, 1): (0, DIAGONAL, 0), (1, 0): (0, DIAGONAL, 0), (0, 0): (1, 0, 1), (1, 1): (1, 0, 1)},
}


STATUS = {(0, 1): "missed", (1, 0): "spurious", (0, 0): "empty", (1, 1): "scored"}


@pytest.mark.parametrize("definition", ["max-directed", "pooled", "area-weighted"])
@pytest.mark.parametrize(("empty", "there"), [(empty, there) for empty in EMPTY for there in STATUS])
def test_policies_for_empty_masks(definition, empty, there):
    masks = []
    for filled in there:
        mask = np.zeros((10, 10, 10), bool)
        mask[4:6, 4:6, 4:6] = filled
        masks.append(mask)
    got = single(*masks, SPACING, hd95=definition, empty=empty)
    assert got.status == STATUS[there]
    for value, expected in zip((got.dice, got.hd95_mm, got.surface_dice), EMPTY[empty][there], strict=True):
        assert value == (None if expected is None else pytest.approx(expected))


def test_every_definition_has_a_name_of_its_own():
    policies = {
        Scoring(hd95=definition, empty=empty).policy
        for definition in ("max-directed", "pooled", "area-weighted")
        for empty in EMPTY
    }
    assert len(policies) == 9
    assert Scoring().policy == "empty-is-worst-v1"


def test_missing_a_structure_never_improves_the_score():
    reference, poor = np.zeros((16, 16, 16), bool), np.zeros((16, 16, 16), bool)
    reference[:8], poor[15:, 15:, 15:] = True, True
    bad, missed = single(poor, reference, (1, 1, 1)), single(np.zeros_like(poor), reference, (1, 1, 1))
    assert missed.dice <= bad.dice
    assert missed.hd95_mm >= bad.hd95_mm


@pytest.mark.parametrize("shapes", [((1, 2, 2, 2), (1, 2, 2, 3)), ((2, 2, 2), (2, 2, 2))])
def test_shapes_must_match(shapes):
    with pytest.raises(ValueError, match="one shape"):
        score(*(np.ones(shape, bool) for shape in shapes), (1, 1, 1))


def test_labels_beyond_eight_bits_are_told_apart():
    label = np.zeros((6, 6, 6), np.int32)
    label[1:3, 1:3, 1:3], label[4:, 4:, 4:] = 1000, 1
    got = score_labels(label, label.astype(np.uint16), {"far": (1000,), "near": (1,)}, (1, 1, 1))
    assert [each.status for each in got] == ["scored", "scored"]
    assert [each.dice for each in got] == [1.0, 1.0]


def test_hd95_of_nothing_is_refused():
    with pytest.raises(ValueError, match="not empty"):
        hausdorff95(np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool), (1, 1, 1))


def test_a_label_may_belong_to_several_targets():
    """As the regions of BraTS: each is scored as the mask of its labels, in whatever order they are listed."""
    rng = np.random.default_rng(5)
    label = [rng.integers(0, 4, (9, 8, 7)) for _ in range(2)]
    targets = {"whole": (1, 2, 3), "core": (1, 3), "enhancing": (3,), "rest": (2, 1)}
    for names in (list(targets), list(targets)[::-1]):
        found = score_labels(*label, {name: targets[name] for name in names}, (1, 2, 3))
        for name, got in zip(names, found, strict=True):
            masks = [np.isin(each, targets[name]) for each in label]
            assert got.dice == pytest.approx(2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum()))
            assert got == score(masks[0][None], masks[1][None], (1, 2, 3))[0]


@pytest.mark.parametrize("definition", ["max-directed", "pooled", "area-weighted"])
def test_a_score_does_not_depend_on_which_mask_is_the_reference(definition):
    rng = np.random.default_rng(8)
    a, b = blob(rng), blob(rng)
    one, other = (single(*pair, (0.7, 1.3, 2.5), hd95=definition, tolerance=1.5) for pair in ((a, b), (b, a)))
    assert one == other


def test_a_distance_of_exactly_the_tolerance_is_within_it():
    a, b = np.zeros((12, 4, 4), bool), np.zeros((12, 4, 4), bool)
    a[2], b[5] = True, True
    # The default is 1 mm.
    assert [score(a[None], b[None], (edge, 1, 1))[0].surface_dice for edge in (1 / 3, 0.34)] == [1, 0]
    for spacing in (0.1, 0.7, 1.0):
        for tolerance, share in ((3 * spacing, 1.0), (2.9 * spacing, 0.0)):
            assert single(a, b, (spacing, 1, 1), tolerance=tolerance).surface_dice == share
