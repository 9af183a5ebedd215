"""SparK's norms see visible positions only."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from methods import spark
from methods.spark import sparse_norm
from tests.methods.parts import generator
from tests.methods.spark_parts import numpy_norm


@pytest.mark.parametrize(
    ("layer", "groups", "over_batch"),
    [
        (nn.InstanceNorm3d(8, affine=True), 8, False),
        (nn.InstanceNorm3d(8), 8, False),
        (nn.GroupNorm(2, 8), 2, False),
        (nn.BatchNorm3d(8), 8, True),
        (nn.BatchNorm3d(8, track_running_stats=False), 8, True),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_norms_have_the_moments_of_visible_voxels(layer, groups, over_batch, training):
    """The masked positions of the input hold large numbers here, which must not count."""
    rng = np.random.default_rng(0)
    features = rng.normal(3, 2, (3, 8, 4, 6, 5)) * np.arange(1, 9)[:, None, None, None]
    visible = rng.random((3, 1, 4, 6, 5)) < 0.4
    features = np.where(visible, features, 1e3)
    due = numpy_norm(features, visible, groups, over_batch)
    layer = copy.deepcopy(layer).double().train(training)
    if layer.weight is not None:
        layer.weight.data, layer.bias.data = torch.from_numpy(rng.normal(size=8)), torch.from_numpy(rng.normal(size=8))
        weight, bias = (value.detach().numpy()[:, None, None, None] for value in (layer.weight, layer.bias))
        due = np.where(visible, due * weight + bias, 0)
    found = sparse_norm(layer, torch.from_numpy(features), torch.from_numpy(visible))
    np.testing.assert_allclose(found.detach().numpy(), due, rtol=1e-9, atol=1e-9)


def test_batch_norm_updates_its_running_moments_with_visible_voxels_in_training_only():
    layer, rng = nn.BatchNorm3d(2, momentum=0.3).double(), np.random.default_rng(0)
    visible = rng.random((3, 1, 4, 4, 4)) < 0.5
    features = np.where(visible, rng.normal(5, 2, (3, 2, 4, 4, 4)), 1e3)
    sparse_norm(layer, torch.from_numpy(features), torch.from_numpy(visible))
    values = np.stack([features[:, channel][visible[:, 0]] for channel in range(2)])
    np.testing.assert_allclose(layer.running_mean.numpy(), 0.3 * values.mean(axis=1))
    np.testing.assert_allclose(layer.running_var.numpy(), 0.7 + 0.3 * values.var(axis=1, ddof=1))
    assert layer.num_batches_tracked == 1
    before = copy.deepcopy(layer.state_dict())
    sparse_norm(layer.eval(), torch.from_numpy(features), torch.from_numpy(visible))
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_batch_norm_has_the_moments_of_all_parts_of_a_batch(monkeypatch):
    """`total` stands for the other parts: it gives the sums of the whole batch to the norm of its first two crops."""
    features, layer = torch.randn(5, 3, 4, 4, 4, dtype=torch.float64, generator=generator()), nn.BatchNorm3d(3).double()
    visible = torch.rand(5, 1, 4, 4, 4, generator=generator(1)) < 0.5
    sums = []
    monkeypatch.setattr(spark, "total", lambda value: sums.append(value) or value)
    whole = sparse_norm(layer, features, visible)
    moments = layer.running_var.clone()
    layer.reset_running_stats()
    monkeypatch.setattr(spark, "total", lambda value: sums.pop(0))
    torch.testing.assert_close(sparse_norm(layer, features[:2], visible[:2]), whole[:2])
    assert not sums
    torch.testing.assert_close(layer.running_var, moments)


@pytest.mark.parametrize("layer", [nn.InstanceNorm3d(2), nn.GroupNorm(1, 2)])
def test_norms_of_one_sample_ask_no_other_part_of_the_batch(layer, monkeypatch):
    monkeypatch.setattr(spark, "total", None)
    sparse_norm(layer, torch.randn(2, 2, 4, 4, 4), torch.ones(2, 1, 4, 4, 4, dtype=torch.bool))


def test_features_in_half_precision_are_normalised_in_single_and_returned_in_half():
    features, visible = (
        100 + torch.randn(1, 4, 8, 8, 8, generator=generator()),
        torch.ones(1, 1, 8, 8, 8, dtype=torch.bool),
    )
    half = features.bfloat16()
    found = sparse_norm(nn.InstanceNorm3d(4), half, visible)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), F.instance_norm(half.float()), rtol=0.01, atol=0.01)
