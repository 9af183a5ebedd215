"""Orientation, spacing, box and intensities of one case; and the way back."""

import shutil
from dataclasses import replace
from itertools import permutations, product

import nibabel as nib
import numpy as np
import pytest

from harness import Percentiles, UserError, Window, ZScore
from harness.api.registry import Registry
from harness.data.cases import LoadedCase
from harness.data.preprocessing import Z_LIMIT, Z_STEPS, normalise, preprocess, quantise
from tests.harness.commands import harness, last_error

TASK = Registry().task("msd_hippocampus")
ORIENTATIONS = [(axes, flips) for axes in permutations(range(3)) for flips in product((1, -1), repeat=3)]


def anatomy(shape=(20, 24, 16)):
    rng = np.random.default_rng(0)
    image = rng.uniform(10, 100, (1, *shape)).astype(np.float32)
    image[:, :3], image[:, :, -2:] = 0, 0  # background to be cropped away
    label = np.zeros(shape, np.uint8)
    label[6:12, 5:14, 4:9], label[12:15, 6:12, 4:8] = 1, 2
    return image, label


def test_z_scores_are_those_of_the_cropped_image():
    """As nnU-Net's: background inside the box counts, and resampling comes after."""
    image, label = anatomy()
    task = replace(TASK, normalisation=ZScore())
    prepared, *_ = preprocess(task, LoadedCase(image, label, np.eye(4)), "x")
    inside = image[0, 3:, :-2].astype(np.float64)
    np.testing.assert_allclose(prepared[0], (inside - inside.mean()) / inside.std(), atol=1e-5)
    finer, *_ = preprocess(replace(task, spacing=(0.5, 0.5, 0.5)), LoadedCase(image, label, np.eye(4)), "x")
    assert finer.min() < prepared.min(), "cubic splines overshoot, and nothing cuts z-scores at 0"


def test_a_z_score_beyond_the_limit_is_cut():
    values = np.zeros((20, 20, 20), np.float32)
    values[0, 0, 0] = 1e6
    scaled = normalise(values, ZScore(), "x")
    assert scaled.max() == Z_LIMIT
    assert np.abs(quantise(scaled, Z_STEPS).astype(np.float32) / Z_STEPS - scaled).max() <= 0.5 / Z_STEPS


@pytest.mark.parametrize("value", [0.0, 7.0, 1e6])
def test_a_constant_image_has_no_z_score(value):
    with pytest.raises(UserError, match="same value"):
        normalise(np.full((4, 4, 4), value, np.float32), ZScore(), "x")


@pytest.mark.parametrize(("axes", "flips"), ORIENTATIONS)
def test_native_round_trip_in_every_orientation(axes, flips):
    image, label = anatomy()
    affine = np.zeros((4, 4))
    for axis, (world, flip) in enumerate(zip(axes, flips, strict=True)):
        affine[world, axis] = flip
    affine[:, 3] = [7, -3, 2, 1]
    prepared, prepared_label, geometry = preprocess(TASK, LoadedCase(image, label, affine), "x")
    assert prepared.shape[1:] == prepared_label.shape
    probabilities = np.stack([prepared_label == value for value in (0, 1, 2)]).astype(np.float32)
    back = geometry.decide(TASK, probabilities)
    assert np.array_equal(back, TASK.masks(label))


def test_prepared_orientation_is_canonical():
    image, label = anatomy()
    turned = nib.orientations.apply_orientation(image[0], [[1, -1], [0, 1], [2, -1]])
    turned_label = nib.orientations.apply_orientation(label, [[1, -1], [0, 1], [2, -1]])
    affine = nib.orientations.inv_ornt_aff(np.array([[1, -1], [0, 1], [2, -1]]), image.shape[1:])
    straight, *_ = preprocess(TASK, LoadedCase(image, label, np.eye(4)), "x")
    other, *_ = preprocess(TASK, LoadedCase(turned[None], turned_label, affine), "x")
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
    prepared, prepared_label, geometry = preprocess(task, LoadedCase(image, label, np.diag([1, 1, 2, 1])), "x")
    assert prepared.shape == (1, 30, 40, 48)
    probabilities = np.stack([prepared_label == value for value in (0, 1, 2)]).astype(np.float32)
    back = geometry.decide(task, probabilities)
    for mine, theirs in zip(back, task.masks(label), strict=True):
        assert 2 * (mine & theirs).sum() / (mine.sum() + theirs.sum()) > 0.95


def test_foreground_is_cropped_and_scaled_to_the_unit_interval():
    image, label = anatomy()
    prepared, _, geometry = preprocess(TASK, LoadedCase(image, label, np.eye(4)), "x")
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


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_spacings_that_cannot_be(scale, hippocampus_phantom, finished_simmim, tmp_path, capsys):
    """Metres, or micrometres: no grid of that size is made, and none of a voxel."""
    root = tmp_path / "data"
    shutil.copytree(hippocampus_phantom, root)
    case = Registry().task("msd_hippocampus").cases(root)[0]
    for path in case.files:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([scale] * 3 + [1])), path)
    harness("data", "check", "msd_hippocampus", "--data", root, "--runs", tmp_path, status=2)
    assert "spacings that cannot be (spoils a run, 1)" in capsys.readouterr().out
    harness("data", "prepare", "msd_hippocampus", "--data", root, "--runs", tmp_path, status=2)
    assert "is its spacing in mm?" in last_error(capsys) or scale > 1  # or the disk could not hold it
    (folder,) = [path.parent for path in finished_simmim.glob("*/record.json")]
    harness("predict", "--run", folder, case.images[0], tmp_path / "out.nii.gz", status=2)
    assert "is its spacing in mm?" in last_error(capsys)


@pytest.mark.parametrize("values", [(0, 1), (300, 4000), (-3024, -1200), (100, 102)])
def test_a_ct_without_contrast_in_its_window_is_refused(values):
    """Rescaled to 0..1, all above the window, all below it; not one that spans a tenth of it."""
    channel = np.linspace(*values, 64, dtype=np.float32).reshape(4, 4, 4)
    with pytest.raises(UserError, match=r"no contrast in the window from -175 to 250 HU: are they Hounsfield units\?"):
        normalise(channel, Window(-175, 250), "a.nii.gz")
    assert np.ptp(normalise(np.linspace(0, 42, 64, dtype=np.float32).reshape(4, 4, 4), Window(-175, 250), "a")) > 0.09
