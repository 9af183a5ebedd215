"""Dice and HD95 of a many-organ CT beside MONAI's, in the same run; `pytest -m benchmark -s`."""

import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks.utils import one_hot

from harness.evaluation.metrics import score_labels

pytestmark = pytest.mark.benchmark

SHAPE, NUMBER, SPACING = (314, 214, 234), 13, (1.5, 1.5, 2.0)
TARGETS = {str(value): (value,) for value in range(1, NUMBER + 1)}


def organs() -> np.ndarray:
    """Thirteen ellipsoids of the sizes of abdominal organs."""
    rng, label = np.random.default_rng(0), np.zeros(SHAPE, np.uint8)
    grid = np.meshgrid(*(np.arange(side, dtype=np.float32) for side in SHAPE), indexing="ij", sparse=True)
    for value in range(1, NUMBER + 1):
        centre, radius = (rng.uniform(low, high, 3) * SHAPE for low, high in ((0.2, 0.8), (0.06, 0.16)))
        label[sum(((axis - c) / r) ** 2 for axis, c, r in zip(grid, centre, radius, strict=True)) < 1] = value
    return label


def good(reference: np.ndarray) -> np.ndarray:
    return np.roll(reference, (1, 2, -1), (0, 1, 2))


def noisy(reference: np.ndarray) -> np.ndarray:
    """2 % of the voxels have a label at random."""
    rng = np.random.default_rng(5)
    hit = rng.random(SHAPE) < 0.02
    found = reference.copy()
    found[hit] = rng.integers(0, NUMBER + 1, hit.sum())
    return found


def monai(prediction: np.ndarray, reference: np.ndarray) -> tuple[list[float], list[float]]:
    masks = [one_hot(torch.from_numpy(each)[None, None].long(), NUMBER + 1) for each in (prediction, reference)]
    dice = compute_dice(*masks, include_background=False)
    hd95 = compute_hausdorff_distance(*masks, include_background=False, percentile=95, spacing=list(SPACING))
    return dice[0].tolist(), hd95[0].tolist()


@pytest.mark.parametrize(("make", "least"), [(good, 25), (noisy, 4)])
def test_thirteen_organs_beside_monai(benchmark, claim, make, least):
    reference = organs()
    prediction = make(reference)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        dice, hd95 = monai(prediction, reference)
        times.append(time.perf_counter() - began)
    scores = benchmark.pedantic(
        score_labels, (prediction, reference, TARGETS, SPACING), rounds=5, warmup_rounds=1, iterations=1
    )
    ratios = [theirs / benchmark.stats.stats.median for theirs in times]
    assert [each.dice for each in scores] == pytest.approx(dice, abs=1e-6)
    assert [each.hd95_mm for each in scores] == pytest.approx(hd95, abs=1e-4)
    claim(f"metrics of 13 organs, {make.__name__} prediction: MONAI / ours", ratios, at_least=least)


MEASURE = """
import resource, sys
from tests.benchmarks import test_metrics_speed as t
reference = t.organs()
prediction = getattr(t, sys.argv[1])(reference)
t.score_labels(prediction[:8].copy(), reference[:8].copy(), t.TARGETS, t.SPACING)  # compiled code is loaded
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak begins anew
read = lambda name: next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name))
before = read("VmRSS")
t.score_labels(prediction, reference, t.TARGETS, t.SPACING)
print((read("VmHWM") - before) / 2**20)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak of the resident memory from /proc")
@pytest.mark.parametrize("make", [good, noisy])
def test_memory_stays_below_three_tenths_of_a_gibibyte(make):
    words = [sys.executable, "-c", MEASURE, make.__name__]
    grown = float(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    print(f"{make.__name__}: memory grew by {grown:.2f} GiB at most")
    assert grown < 0.3
