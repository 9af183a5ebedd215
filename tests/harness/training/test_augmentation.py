"""Augmentation: image and target alike, as often as the paper says."""

import numpy as np
import pytest

from harness.config.schema import Finetune
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
