"""Ratios of times measured in one run; `pytest -m benchmark`."""

import time

import numpy as np
import pytest
import torch
from monai.metrics import compute_hausdorff_distance

from backbones.unet import UNet
from harness.metrics import hausdorff95
from methods.hybridmim import HybridMIM

pytestmark = pytest.mark.benchmark


def fastest(function, rounds=3) -> float:
    function()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def test_hd95_is_faster_than_monais():
    x = np.indices((96, 96, 96)) - 48
    r = np.sqrt((x**2).sum(axis=0))
    a, b = r < 30, np.roll(r < 28, 3, axis=0)
    tensors = [torch.from_numpy(mask)[None, None] for mask in (a, b)]
    mine = fastest(lambda: hausdorff95(a, b, (1, 1, 1)))
    theirs = fastest(
        lambda: compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=[1, 1, 1])
    )
    print(f"HD95, MONAI / ours: {theirs / mine:.1f}")
    assert theirs / mine > 2


def test_partial_region_makes_a_step_cheaper():
    image = {"image": torch.rand(2, 1, 96, 96, 96)}
    seconds = {}
    for region in (96, 64):
        backbone = UNet(UNet.Config(features=(16, 16, 32, 64, 128)), in_channels=1)
        method = HybridMIM(HybridMIM.Config(region=(region,) * 3), backbone)
        method.generator = torch.Generator().manual_seed(0)

        def step(method=method):
            sum(method(image).values()).backward()

        seconds[region] = fastest(step)
    print(f"HybridMIM step at 96^3, whole / partial 64^3: {seconds[96] / seconds[64]:.2f}")
    assert seconds[96] / seconds[64] > 1.3
