"""Ratios of times, ours against the peer in the same run; `pytest -m benchmark -s`."""

import random
import time

import numpy as np
import pytest
from scipy import ndimage

from harness.data.geometry import resample
from methods.models_genesis import Distort, ModelsGenesis
from tests.benchmarks import plain_genesis

pytestmark = pytest.mark.benchmark


def fastest(function, rounds=3) -> float:
    """Seconds of the fastest of some calls after one that does not count."""
    function()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        function()
        times.append(time.perf_counter() - began)
    return min(times)


def test_resampling_is_faster_than_scipys(benchmark, claim):
    volume = np.random.default_rng(0).standard_normal((256, 256, 80)).astype(np.float32)
    extent = (192, 192, 120)
    factors = [new / old for new, old in zip(extent, volume.shape, strict=True)]
    theirs = fastest(lambda: ndimage.zoom(volume, factors, order=3, mode="nearest", grid_mode=True), rounds=2)
    benchmark.pedantic(resample, (volume, extent, 3), rounds=5, warmup_rounds=1)
    claim(
        "cubic resampling of 256 x 256 x 80: scipy / ours", theirs / np.asarray(benchmark.stats.stats.data), at_least=4
    )


def test_a_genesis_pair_is_far_faster_than_plain_python(benchmark, claim):
    """Mean over many pairs at the published 64x64x32: the distortions are drawn with their published probabilities."""
    cube = np.random.default_rng(0).random((1, 64, 64, 32), dtype=np.float32)
    distort, rng = Distort(ModelsGenesis.Config()), np.random.default_rng(0)
    random.seed(0)
    theirs = fastest(lambda: [plain_genesis.pair(cube) for _ in range(60)], rounds=2)
    benchmark.pedantic(lambda: [distort({"image": cube}, rng) for _ in range(60)], rounds=5, warmup_rounds=2)
    claim(
        "Models Genesis pair at 64x64x32: plain Python / ours",
        theirs / np.asarray(benchmark.stats.stats.data),
        at_least=20,
    )
