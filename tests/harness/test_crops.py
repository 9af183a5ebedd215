"""Crops: what they hold, where they lie, and that they depend on seed and index alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from harness.config.schema import Finetune
from harness.data.arrays import cut
from harness.data.crops import CropDataset
from harness.data.inventory import digest_cases
from harness.data.volumes import preprocess_cases
from harness.training.finetune import Augment


@pytest.fixture
def volumes(phantom, tmp_path):
    task, root = phantom
    cases = task.cases(root)
    return task, preprocess_cases(task, cases, digest_cases(cases, tmp_path)[0], tmp_path)


def augment(**probabilities) -> Augment:
    off = {"flip": 0, "rotate": 0, "scale": 0, "shift": 0}
    return Augment(Finetune(steps=1, crop=(8, 8, 8), batch_size=1, lr=1, weight_decay=0, **off | probabilities))


def test_cut_fills_with_zeros_outside():
    array = np.arange(1, 28, dtype=np.float32).reshape(1, 3, 3, 3)
    crop = cut(array, (-1, 1, 0), (3, 4, 2))
    assert crop.shape == (1, 3, 4, 2)
    assert (crop[:, 0] == 0).all()
    assert (crop[:, :, 2:] == 0).all()
    assert np.array_equal(crop[:, 1:, :2], array[:, :2, 1:, :2])


def test_sample_depends_on_seed_and_index_only(volumes):
    task, prepared = volumes
    data = CropDataset(
        prepared, (16, 16, 16), 12, seed=3, transform=augment(flip=0.5, shift=1), task=task, foreground=0.5
    )
    inline = [batch["image"] for batch in DataLoader(data, 2)]
    workers = [batch["image"] for batch in DataLoader(data, 2, num_workers=2)]
    assert all(torch.equal(a, b) for a, b in zip(inline, workers, strict=True))
    other = CropDataset(prepared, (16, 16, 16), 12, seed=4, task=task)
    assert not np.array_equal(other[0]["image"], data[0]["image"])


def test_every_case_comes_up_once_per_pass(volumes):
    _, prepared = volumes
    data = CropDataset(prepared, (48, 48, 48), 8, seed=0)
    for turn in (0, 4):
        totals = {round(float(data[turn + place]["image"].sum()), 2) for place in range(4)}
        assert totals == {round(float(volume.image.sum()), 2) for volume in prepared}


def test_foreground_crops_hold_a_target(volumes):
    task, prepared = volumes
    data = CropDataset(prepared, (8, 8, 8), 40, seed=0, task=task, foreground=1.0)
    assert all(np.asarray(data[index]["target"]).any() for index in range(40))


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
