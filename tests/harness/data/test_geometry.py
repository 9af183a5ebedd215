"""Resampling against scipy, and the way back to the native grid."""

from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from harness.api.registry import Registry
from harness.data.cases import LoadedCase
from harness.data.geometry import Geometry, resample, resample_label
from harness.data.preprocessing import preprocess

EXTENTS = [(30, 50, 25), (21, 17, 60), (40, 37, 25), (80, 12, 3)]


@pytest.mark.parametrize("extent", EXTENTS)
@pytest.mark.parametrize("order", [1, 3])
def test_resampling_is_scipys(extent, order):
    values = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal((40, 37, 25)), 1).astype(np.float32)
    factors = [new / old for new, old in zip(extent, values.shape, strict=True)]
    theirs = ndimage.zoom(values, factors, order=order, mode="nearest", grid_mode=True)
    assert np.allclose(resample(values, extent, order), theirs, atol=1e-5)


@pytest.mark.parametrize("extent", EXTENTS)
def test_labels_are_the_largest_linear_share(extent):
    rng = np.random.default_rng(1)
    label = ndimage.median_filter(rng.integers(0, 6, (40, 37, 25)).astype(np.uint8), 5)
    label[label == 4] = 0  # a hole in the numbering
    factors = [new / old for new, old in zip(extent, label.shape, strict=True)]
    values = np.unique(label)
    shares = [
        ndimage.zoom((label == v).astype(np.float32), factors, order=1, mode="nearest", grid_mode=True) for v in values
    ]
    assert (resample_label(label, extent) != values[np.argmax(shares, axis=0)]).mean() < 1e-3


@pytest.mark.parametrize("name", ["btcv", "brats"])
def test_slabs_decide_as_the_whole_does(name, monkeypatch):
    task = Registry().task(name)
    rng = np.random.default_rng(0)
    probabilities = rng.random((task.num_outputs, 20, 16, 12), np.float32)
    affine = nib.orientations.inv_ornt_aff(np.array([[1, -1], [0, 1], [2, -1]]), (27, 30, 17))
    geometry = Geometry((30, 27, 17), affine.tolist(), ((2, 26), (1, 29), (0, 17)), (1.0, 1.0, 1.0))
    whole = geometry.decide(task, probabilities)
    monkeypatch.setattr("harness.data.geometry.SLAB_BYTES", 1)
    assert np.array_equal(geometry.decide(task, probabilities), whole)
    box = [(2, 26), (1, 29), (0, 17)]
    native = np.stack([resample(channel, [b - a for a, b in box], 1) for channel in probabilities])
    assert whole.sum() == task.decide(native).sum()


ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)]


def blobs(rng, shape):
    """Smooth structures of thirteen labels that touch each other."""
    fields = np.stack([ndimage.gaussian_filter(rng.standard_normal(shape), 3) for _ in range(14)])
    return fields.argmax(axis=0).astype(np.uint8)


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_label_maps_go_there_and_back(axes, flips):
    """At equal spacing Dice is 1 whatever the orientation, obliquely placed as well; shapes and spacings are drawn."""
    rng = np.random.default_rng(abs(hash((axes, flips))) % 2**32)
    shape = tuple(int(edge) for edge in rng.integers(14, 30, 3))
    spacing = rng.uniform(0.6, 3, 3).round(2)
    turn, _ = np.linalg.qr(np.eye(3) + rng.uniform(-0.15, 0.15, (3, 3)))
    turn *= np.sign(np.diag(turn))
    affine = np.eye(4)
    affine[:3, :3] = turn @ np.stack([np.eye(3)[axis] * flip for axis, flip in zip(axes, flips, strict=True)], axis=1)
    affine[:3, :3] *= spacing
    affine[:3, 3] = rng.uniform(-200, 200, 3)
    label = blobs(rng, shape)
    image = rng.uniform(-100, 200, (1, *shape)).astype(np.float32)
    task = replace(Registry().task("btcv"), spacing=None)
    _, prepared, geometry = preprocess(task, LoadedCase(image, label, affine), "x")
    assert prepared is not None
    probabilities = np.stack([prepared == value for value in task.labels]).astype(np.float32)
    masks = geometry.decide(task, probabilities)
    for mine, theirs in zip(masks, task.masks(label), strict=True):
        assert 2 * (mine & theirs).sum() >= 0.99 * (mine.sum() + theirs.sum())
    assert np.array_equal(task.compose(masks), label)
