"""Sliding windows on a GPU: a whole CT, and the CPU's own numbers."""

import time

import numpy as np
import pytest
import torch

from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from harness.api.registry import Registry
from harness.config.schema import Evaluate, Finetune
from harness.evaluation.sliding_window import predict
from tests.gpu.fitted import whole_fp32

pytestmark = pytest.mark.gpu

TASK = Registry().task("btcv")


def network(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    made = UNet(UNet.Config(), in_channels=1) if kind == "unet" else SwinUNETR(SwinUNETR.Config(), in_channels=1)
    made.set_head(TASK.num_outputs)
    return made


def trained(edge: int, precision: str) -> Finetune:
    return Finetune(steps=1, crop=edge, batch_size=1, lr=1e-3, weight_decay=0.0, precision=precision)


@pytest.mark.parametrize("kind", ["unet", "swinunetr"])
def test_probabilities_are_those_of_the_cpu(kind, device):
    image = np.random.default_rng(0).random((1, 80, 72, 64), dtype=np.float32)
    made = network(kind)
    with whole_fp32():
        wanted, found = (
            predict(TASK, made.to(where), image, trained(64, "fp32"), Evaluate())
            for where in (torch.device("cpu"), device)
        )
    assert np.abs(found - wanted).max() < 1e-3
    assert (found.argmax(axis=0) == wanted.argmax(axis=0)).mean() > 0.999


@pytest.mark.parametrize("kind", ["unet", "swinunetr"])
def test_a_whole_ct_is_predicted(kind, gpu, said):
    image = np.random.default_rng(0).random((1, 512, 512, 300), dtype=np.float32)
    made = network(kind).to(gpu)
    torch.cuda.reset_peak_memory_stats(gpu)
    began = time.perf_counter()
    found = predict(TASK, made, image, trained(96, "bf16"), Evaluate())
    seconds, peak = time.perf_counter() - began, torch.cuda.max_memory_allocated(gpu) / 2**30
    said(f"512x512x300, {TASK.num_outputs} outputs, windows of 96, bf16: {seconds:.1f} s, {peak:.1f} GiB at most")
    assert found.shape == (TASK.num_outputs, 512, 512, 300)
    # A few slabs: sums over all of it would take longer than the prediction.
    for slab in (found[:, ::64], found[..., ::50]):
        assert np.abs(slab.sum(axis=0) - 1).max() < 1e-3
    # Nothing is left out at the borders, and the last window is as good as the first.
    assert found[:, -1, -1, -1].sum() == pytest.approx(1, abs=1e-3)
    small = image[:, -96:, -96:, -96:]
    corner = predict(TASK, made, np.ascontiguousarray(small), trained(96, "bf16"), Evaluate())
    # The outermost voxels see the same last window only.
    assert np.abs(corner[:, -8:, -8:, -8:] - found[:, -8:, -8:, -8:]).max() < 0.05
