"""Augmentation: image and target alike, as often as the paper says."""

import numpy as np
import pytest

from harness.config.schema import Finetune
from harness.training.augmentation import Augment
from tests.harness.short_stage import augment


def test_augmentation_turns_image_and_target_alike():
    rng = np.random.default_rng(0)
    image = rng.random((1, 8, 8, 8), np.float32)
    for index in range(20):
        turned = augment(flip=0.5, rotate=1)({"image": image, "target": image.copy()}, np.random.default_rng(index))
        assert np.array_equal(turned["image"], turned["target"])
        assert sorted(turned["image"].ravel()) == sorted(image.ravel())


def test_intensity_changes_leave_the_target_alone():
    image = np.full((1, 8, 8, 8), 0.5, np.float32)
    made = augment(scale=1, shift=1)({"image": image, "target": image.copy()}, np.random.default_rng(1))
    assert np.array_equal(made["target"], image)
    assert 0.5 * 0.9 - 0.1 <= made["image"].min() == made["image"].max() <= 0.5 * 1.1 + 0.1
    assert made["image"].dtype == np.float32


def test_rotation_keeps_the_shape_of_a_crop_that_is_no_cube():
    sample = {"image": np.zeros((1, 8, 12, 8), np.float32), "target": np.zeros((1, 8, 12, 8), np.int64)}
    for index in range(10):
        assert augment(rotate=1)(sample, np.random.default_rng(index))["image"].shape == (1, 8, 12, 8)


def test_probabilities_are_the_papers():
    settings = Finetune(steps=1, crop=(8, 8, 8), batch_size=1, lr=1, weight_decay=0)
    assert (settings.flip, settings.rotate, settings.scale, settings.shift) == (0.2, 0.2, 0.1, 0.1)
    image = np.random.default_rng(0).random((1, 6, 6, 6), np.float32)
    changed = [
        not np.array_equal(
            augment(flip=0.2)({"image": image, "target": image}, np.random.default_rng(i))["image"], image
        )
        for i in range(2000)
    ]
    assert np.mean(changed) == pytest.approx(1 - 0.8**3, abs=0.04)


def test_each_change_has_a_probability_of_its_own_and_the_papers_range():
    """On an image of one bright voxel: where it goes tells flips and turns, its value and the background's the rest."""
    settings = Finetune(steps=1, crop=(8, 8, 8), batch_size=1, lr=1, weight_decay=0)
    image, rng = np.zeros((1, 4, 4, 4), np.float32), np.random.default_rng(0)
    image[0, 0, 1, 2] = 1
    shifts, scales, moved = [], [], []
    for _ in range(4000):
        made = Augment(settings)({"image": image, "target": image.copy()}, rng)["image"][0]
        shifts.append(np.median(made))
        scales.append(made.max() - shifts[-1])
        moved.append(made.argmax() != image.argmax())
    for values, middle in ((shifts, 0.0), (scales, 1.0)):
        changed = np.array([value for value in values if abs(value - middle) > 1e-6])
        assert len(changed) / 4000 == pytest.approx(0.1, abs=0.025)
        np.testing.assert_allclose((changed.min(), changed.max()), (middle - 0.1, middle + 0.1), atol=0.01)
        assert changed.mean() == pytest.approx(middle, abs=0.015)
    assert np.mean(moved) == pytest.approx(1 - 0.8**4, abs=0.04)


def test_turns_are_all_nine_about_the_three_axes_and_flips_along_each():
    image = np.arange(27, dtype=np.float32).reshape(1, 3, 3, 3)
    rng, seen = np.random.default_rng(0), []
    for _ in range(900):
        seen.append(augment(rotate=1)({"image": image, "target": image}, rng)["image"].tobytes())
    turns = [np.rot90(image, k, plane) for k in (1, 2, 3) for plane in ((1, 2), (1, 3), (2, 3))]
    assert {np.ascontiguousarray(turn).tobytes() for turn in turns} == set(seen)
    assert max(map(seen.count, set(seen))) < 150
    assert min(map(seen.count, set(seen))) > 60
    flipped = augment(flip=1)({"image": image, "target": image}, rng)["image"]
    assert np.array_equal(flipped, image[:, ::-1, ::-1, ::-1])
