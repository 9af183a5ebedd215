"""Crops: what they hold, where they lie, and that they depend on seed and index alone."""

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch.utils.data import DataLoader

from harness.data.crops import CropDataset, Warp
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


def test_exactly_the_last_crops_of_each_batch_are_centred_on_a_target(volumes):
    """nnU-Net's rule: of a batch of 2 with a share of 0.33, the second; of 9, the last three."""
    task, prepared = volumes
    for batch, share, centred in ((2, 0.33, {1}), (9, 0.33, {6, 7, 8}), (4, 0.0, set()), (3, 1.0, {0, 1, 2})):
        data = CropDataset(prepared, (5, 5, 5), 90, 0, task=task, foreground=share, exact_batch=batch)
        hits = {n: [] for n in range(batch)}
        for index in range(90):
            target = np.asarray(data[index]["target"])[0]
            hits[index % batch].append(target[2, 2, 2] != 0)
        always = {n for n, values in hits.items() if all(values)}
        assert always == centred


QUARTER = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # an offset along x is read along y


def test_a_quarter_turn_is_numpys():
    rng = np.random.default_rng(0)
    image, label = rng.random((2, 6, 6, 4), np.float32), rng.integers(0, 4, (6, 6, 4)).astype(np.uint8)
    warp = Warp(QUARTER)
    assert warp.margin((6, 6, 4)) == (0, 0, 0)
    np.testing.assert_allclose(warp.image(image, (6, 6, 4)), np.rot90(image, 1, (2, 1)), atol=1e-5)
    np.testing.assert_array_equal(warp.label(label, (6, 6, 4)), np.rot90(label, 1, (1, 0)))


def test_a_warp_reads_what_scipy_reads():
    """Turned, scaled, and moved out of the volume's centre by the margin: the same as scipy's linear interpolation."""
    cosine, sine = np.cos(0.4), np.sin(0.4)
    matrix = 1.3 * np.array([[cosine, -sine, 0], [sine, cosine, 0], [0, 0, 1]])
    size, warp = (8, 6, 5), Warp(matrix)
    margin = warp.margin(size)
    extent = [edge + 2 * more for edge, more in zip(size, margin, strict=True)]
    larger = np.random.default_rng(0).random(extent, np.float32)
    centre, middle = ((np.asarray(each) - 1) / 2 for each in (extent, size))
    expected = ndimage.affine_transform(larger, matrix, centre - matrix @ middle, size, order=1)
    np.testing.assert_allclose(warp.image(larger[None], size)[0], expected, atol=1e-5)
    # No voxel more than needed: with one less on a side, the outermost voxel is read beyond the edge.
    reach = np.abs(matrix) @ ((np.asarray(size) - 1) / 2)
    assert all(centre >= reach - 1e-6)
    assert all(centre - 1 < reach)


def test_a_crop_that_reaches_out_of_the_volume_is_0_there_also_when_it_is_scaled(volumes):
    task, prepared = volumes
    data = CropDataset(
        prepared, (64, 64, 64), 4, 0, task=task, draw_warp=lambda size, rng: Warp(1.4 * np.eye(3)), transform=None
    )
    sample = data[0]
    assert sample["image"].shape[1:] == sample["target"].shape[1:] == (64, 64, 64)
    assert not sample["image"][:, 0].any()
    assert not sample["target"][:, 0].any()
    plain = CropDataset(prepared, (64, 64, 64), 4, 0, task=task)[0]
    assert np.count_nonzero(sample["target"]) == pytest.approx(np.count_nonzero(plain["target"]) / 1.4**3, rel=0.15)
