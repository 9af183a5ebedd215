"""Effective rank: bounds, a second computation, and that measuring it changes nothing."""

import numpy as np
import pytest
import torch

from backbones.unet import UNet
from harness.training.effective_rank import MOST_VOXELS, effective_rank, effective_ranks


def unet():
    torch.manual_seed(0)
    return UNet(UNet.Config(features=(4, 4, 8, 8, 16), dropout=0.5), in_channels=1)


def test_it_counts_directions():
    rng = torch.Generator().manual_seed(0)
    line = torch.randn(200, 1, generator=rng) * torch.tensor([[1.0, -2.0, 3.0, 0.5]])
    assert effective_rank(line) == pytest.approx(1, abs=1e-4)
    signs = torch.tensor([[a, b, c] for a in (-1.0, 1) for b in (-1.0, 1) for c in (-1.0, 1)])
    assert effective_rank(signs + 7) == pytest.approx(3)  # the mean does not count
    assert effective_rank(torch.full((10, 4), 3.0)) == 0
    assert effective_rank(torch.tensor([[1.0, float("inf")], [2.0, 3.0]])) == 0


def test_it_equals_numpys_singular_values():
    features = np.random.default_rng(0).normal(size=(50, 6)) * [5, 3, 2, 1, 0.1, 0.01]
    values = np.linalg.svd(features - features.mean(axis=0), compute_uv=False)
    shares = values / values.sum()
    assert effective_rank(torch.tensor(features)) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


def test_one_rank_per_level_without_dropout_and_without_a_trace():
    backbone = unet().train()
    images = [torch.rand(1, 32, 32, 32, generator=torch.Generator().manual_seed(n)) for n in range(2)]
    ranks = effective_ranks(backbone, images)
    assert len(ranks) == len(backbone.strides)
    assert all(1 < rank <= channels for rank, channels in zip(ranks, backbone.channels, strict=True))
    assert backbone.training
    assert ranks == effective_ranks(backbone, images)
    deepest = [backbone.eval().encode(image[None])[-1][0].flatten(1).T for image in images]
    assert ranks[-1] == pytest.approx(effective_rank(torch.cat(deepest)), rel=1e-4)


def test_many_voxels_are_thinned_out():
    backbone, images = unet(), [torch.rand(1, 32, 32, 32)]
    voxels = backbone.eval().encode(images[0][None])[0][0].flatten(1).T
    thinned = voxels[:: 32**3 // MOST_VOXELS]
    assert len(thinned) == MOST_VOXELS
    assert effective_ranks(backbone, images)[0] == pytest.approx(effective_rank(thinned), rel=1e-4)
