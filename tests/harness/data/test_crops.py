"""Crops: what they hold, where they lie, and that they depend on seed and index alone."""

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from harness.data.crops import CropDataset
from harness.data.inventory import digest_cases
from harness.data.volumes import preprocess_cases
from tests.harness.short_stage import augment


@pytest.fixture
def volumes(phantom, tmp_path):
    task, root = phantom
    cases = task.cases(root)
    return task, preprocess_cases(task, cases, digest_cases(cases, tmp_path)[0], tmp_path)


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
