"""Preparing: orientation, spacing, box, intensities, cache; and the way back."""

import json
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from harness import Percentiles, UserError, Window
from harness.api.registry import Registry
from harness.data.cases import Loaded
from harness.data.inventory import digest_cases, fingerprint
from harness.data.preprocessing import normalise, preprocess
from harness.data.volumes import preprocess_cases

TASK = Registry().task("msd_hippocampus")
ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)]


def anatomy(shape=(20, 24, 16)):
    rng = np.random.default_rng(0)
    image = rng.uniform(10, 100, (1, *shape)).astype(np.float32)
    image[:, :3], image[:, :, -2:] = 0, 0  # background to be cropped away
    label = np.zeros(shape, np.uint8)
    label[6:12, 5:14, 4:9], label[12:15, 6:12, 4:8] = 1, 2
    return image, label


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_native_round_trip_in_every_orientation(axes, flips):
    image, label = anatomy()
    affine = np.zeros((4, 4))
    for axis, (world, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[world, axis] = flip
    affine[:, 3] = [7, -3, 2, 1]
    prepared, prepared_label, geometry = preprocess(TASK, Loaded(image, label, affine), "x")
    assert prepared.shape[1:] == prepared_label.shape
    probabilities = np.stack([prepared_label == value for value in (0, 1, 2)]).astype(np.float32)
    back = geometry.decide(TASK, probabilities)
    assert np.array_equal(back, TASK.masks(label))


def test_prepared_orientation_is_canonical():
    image, label = anatomy()
    turned = nib.orientations.apply_orientation(image[0], [[1, -1], [0, 1], [2, -1]])
    turned_label = nib.orientations.apply_orientation(label, [[1, -1], [0, 1], [2, -1]])
    affine = nib.orientations.inv_ornt_aff(np.array([[1, -1], [0, 1], [2, -1]]), image.shape[1:])
    straight, *_ = preprocess(TASK, Loaded(image, label, np.eye(4)), "x")
    other, *_ = preprocess(TASK, Loaded(turned[None], turned_label, affine), "x")
    # The inverse affine belongs to the turned array, so both describe the same anatomy.
    assert np.allclose(straight, other)


def test_resampled_round_trip_keeps_the_structures():
    task = replace(TASK, spacing=(1.0, 1.0, 1.0))
    x = np.indices((30, 40, 24)).astype(float)
    r = np.sqrt(
        (((x - np.array([15, 20, 12]).reshape(3, 1, 1, 1)) * np.array([1, 1, 2]).reshape(3, 1, 1, 1)) ** 2).sum(0)
    )
    label = (r < 9).astype(np.uint8) + (r < 5).astype(np.uint8)
    image = (100 + 50 * label + np.random.default_rng(0).uniform(0, 5, label.shape)).astype(np.float32)[None]
    prepared, prepared_label, geometry = preprocess(task, Loaded(image, label, np.diag([1, 1, 2, 1])), "x")
    assert prepared.shape == (1, 30, 40, 48)
    probabilities = np.stack([prepared_label == value for value in (0, 1, 2)]).astype(np.float32)
    back = geometry.decide(task, probabilities)
    for mine, theirs in zip(back, task.masks(label), strict=True):
        assert 2 * (mine & theirs).sum() / (mine.sum() + theirs.sum()) > 0.95


def test_foreground_is_cropped_and_scaled_to_the_unit_interval():
    image, label = anatomy()
    prepared, _, geometry = preprocess(TASK, Loaded(image, label, np.eye(4)), "x")
    assert geometry.box == ((3, 20), (0, 22), (0, 16))
    assert prepared.min() >= 0.001
    assert prepared.max() == 1


def test_percentiles_resist_outliers_and_keep_zero_apart():
    channel = np.random.default_rng(0).uniform(1, 100, (20, 20, 20)).astype(np.float32)
    channel[0, 0, 0], channel[1] = 1e6, 0
    scaled = normalise(channel, Percentiles(), "x")
    assert (scaled[1] == 0).all()
    assert scaled[2:].min() >= 0.001
    assert scaled[2:].std() > 0.2


def test_window_maps_its_ends():
    scaled = normalise(np.array([-1000, -175, 250, 3000], np.float32).reshape(4, 1, 1), Window(-175, 250), "x")
    assert scaled.ravel().tolist() == pytest.approx([0.001, 0.001, 1, 1])


@pytest.mark.parametrize("value", [0, 5])
def test_an_image_without_contrast_is_refused(value):
    with pytest.raises(UserError, match="x: a channel"):
        normalise(np.full((4, 4, 4), value, np.float32), Percentiles(), "x")


@pytest.fixture
def prepared(phantom, tmp_path):
    task, root = phantom
    cases = task.cases(root)
    digests = digest_cases(cases, tmp_path)[0]
    return task, cases, digests, preprocess_cases(task, cases, digests, tmp_path), tmp_path


def test_cache_is_memory_mapped_and_not_made_twice(prepared):
    task, cases, digests, volumes, cache = prepared
    assert isinstance(volumes[0].label, np.memmap)
    assert isinstance(volumes[0]._stored, np.memmap)
    assert volumes[0].shape == volumes[0].label.shape
    written = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.npy")}
    again = preprocess_cases(task, cases, digests, cache)
    assert {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.npy")} == written
    assert np.array_equal(again[0].image, volumes[0].image)


def test_an_interrupted_prepare_goes_on(prepared):
    task, cases, digests, volumes, cache = prepared
    Path(f"{volumes[1].stem}.json").unlink()
    Path(f"{volumes[1].stem}.image.npy").write_bytes(b"half")
    before = volumes[0].image.copy()
    again = preprocess_cases(task, cases, digests, cache)
    assert again[1].shape == again[1].label.shape
    assert np.array_equal(again[0].image, before)


def test_foreground_points_lie_in_their_targets(prepared):
    task, _, _, volumes, _ = prepared
    masks = task.masks(np.array(volumes[0].label))
    points = volumes[0].points
    assert set(points[:, 0]) == set(range(len(task.targets)))
    assert all(masks[tuple(row)] for row in points)


def test_fingerprint_follows_content_not_place_or_time(phantom, tmp_path):
    import shutil

    task, root = phantom
    shutil.copytree(root, tmp_path / "copy")
    first = fingerprint(digest_cases(task.cases(root), tmp_path / "a")[0])
    second = fingerprint(digest_cases(task.cases(tmp_path / "copy"), tmp_path / "b")[0])
    assert first == second
    cases = task.cases(tmp_path / "copy")
    shutil.copy(cases[0].label, cases[1].label)
    assert fingerprint(digest_cases(task.cases(tmp_path / "copy"), tmp_path / "b")[0]) != first
    assert json.loads((tmp_path / "b" / "digests.json").read_text())
