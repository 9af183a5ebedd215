"""Windows leave no trace: a network that looks at single voxels gives what it gives to the whole image."""

import numpy as np
import pytest
import torch
from torch import nn

from harness.config.schema import Evaluate, Training
from harness.evaluation.sliding_window import predict


class Pointwise(nn.Module):
    """Logits of each voxel by itself; what it is shown is kept."""

    def __init__(self, channels, outputs):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.drop, self.seen = nn.Conv3d(channels, outputs, 1), nn.Dropout(0.5), []

    def forward(self, image):
        self.seen.append((tuple(image.shape), torch.is_grad_enabled(), self.training))
        return self.drop(self.layer(image))


def trained(crop, **changed):
    return Training(
        **({"steps": 1, "crop": crop, "batch_size": 1, "lr": 1, "weight_decay": 0, "precision": "fp32"} | changed)
    )


@pytest.mark.parametrize("overlap", [0.0, 0.5, 0.75])
@pytest.mark.parametrize("shape", [(20, 17, 9), (8, 8, 8), (5, 12, 4)])
@pytest.mark.parametrize("name", ["msd_hippocampus", "msd_brats"])
def test_windows_are_put_together_to_the_whole(name, shape, overlap, registry):
    task = registry.task(name)
    network = Pointwise(len(task.channels), task.num_outputs).train()
    image = np.random.default_rng(0).random((len(task.channels), *shape), dtype=np.float32)
    found = predict(task, network, image, trained((8, 8, 8)), Evaluate(overlap=overlap))
    with torch.no_grad():
        logits = network.layer(torch.from_numpy(image)[None])[0]
    expected = logits.sigmoid() if task.overlapping else logits.softmax(dim=0)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected.numpy(), atol=1e-5)
    if not task.overlapping:
        np.testing.assert_allclose(found.sum(axis=0), 1, atol=1e-5)
    assert {window[0][2:] for window in network.seen} == {(8, 8, 8)}
    assert not any(gradient or training for _, gradient, training in network.seen)


def test_more_overlap_is_more_windows(registry):
    task, numbers = registry.task("msd_hippocampus"), []
    for overlap in (0.0, 0.5):
        network = Pointwise(1, 3)
        predict(task, network, np.ones((1, 16, 16, 8), np.float32), trained((8, 8, 8)), Evaluate(overlap=overlap))
        numbers.append(sum(window[0][0] for window in network.seen))
    assert numbers == [4, 9]


def test_the_precision_and_the_layout_are_those_of_the_training(registry):
    task, image = registry.task("msd_hippocampus"), np.random.default_rng(0).random((1, 8, 8, 8), dtype=np.float32)
    exact = predict(task, Pointwise(1, 3), image, trained(8, channels_last=False), Evaluate())
    same = predict(task, Pointwise(1, 3), image, trained(8, channels_last=True), Evaluate())
    rough = predict(task, Pointwise(1, 3), image, trained(8, precision="bf16"), Evaluate())
    np.testing.assert_allclose(same, exact, atol=1e-6)
    assert 1e-5 < np.abs(rough - exact).max() < 1e-2
    assert rough.dtype == np.float32


class Ramp(nn.Module):
    """Logits that say where in its window a voxel lies along x, in each of three targets."""

    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, image):
        along = torch.arange(float(image.shape[2])).view(1, 1, -1, 1, 1) / 4
        return along.expand(len(image), 3, -1, *image.shape[3:]).contiguous()


def test_where_windows_overlap_their_middles_count_more(registry):
    """By hand: two windows of 8, the second 4 further, weighted by a Gaussian of an eighth of the window (Isensee 2021)."""
    task = registry.task("msd_brats")
    image = np.zeros((len(task.channels), 12, 8, 8), np.float32)
    found = predict(task, Ramp(), image, trained((8, 8, 8)), Evaluate(overlap=0.5))[0, :, 3, 3]
    place = np.arange(8)
    weight, value = np.exp(-(((place - 3.5) / 1.0) ** 2) / 2), place / 4
    both = (weight[4:] * value[4:] + weight[:4] * value[:4]) / (weight[4:] + weight[:4])
    expected = np.concatenate([value[:4], both, value[4:]])
    np.testing.assert_allclose(np.log(found / (1 - found)), expected, atol=0.03)


class Lopsided(nn.Module):
    """A network whose output depends on the direction of every axis."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.calls = nn.Conv3d(1, 3, 3, padding=1), 0

    def forward(self, image):
        self.calls += 1
        return 10 * self.layer(image)


def test_mirrored_logits_are_averaged_over_all_eight_images(registry):
    task, network = registry.task("msd_hippocampus"), Lopsided()
    image = np.random.default_rng(0).random((1, 8, 8, 8), dtype=np.float32)
    plain, mirrored = (
        predict(task, network, image, trained((8, 8, 8)), Evaluate(mirror=mirror)) for mirror in (False, True)
    )
    assert network.calls == 1 + 8
    with torch.no_grad():
        logits = [
            network(torch.from_numpy(image)[None].flip(axes)).flip(axes)
            for axes in [(), (2,), (3,), (4,), (2, 3), (2, 4), (3, 4), (2, 3, 4)]
        ]
    np.testing.assert_allclose(plain, logits[0].softmax(1)[0].numpy(), atol=1e-5)
    np.testing.assert_allclose(mirrored, torch.stack(logits).mean(0).softmax(1)[0].numpy(), atol=1e-5)
    assert np.abs(plain - mirrored).max() > 0.01
