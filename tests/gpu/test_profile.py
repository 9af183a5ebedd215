"""What a profile says of a GPU: its memory without a process per cell, and what holds a step back."""

from dataclasses import replace

import pytest

from harness.config.request import Request
from harness.costs.profile import measure, summarise
from harness.costs.trial import TrialResult, measure_in_new_process, resolve_trial

pytestmark = pytest.mark.gpu

REQUEST = Request(
    method="simmim", task="msd_hippocampus", settings=("pretrain.precision=fp32", "pretrain.batch_size=4")
)


def test_small_steps_wait_for_the_host_and_large_ones_for_the_device(gpu, said):
    edges = (32, 96)
    cells = [
        resolve_trial(replace(REQUEST, settings=(*REQUEST.settings, f"pretrain.crop={edge},{edge * 2},{edge}")))
        for edge in edges
    ]
    found, rates = measure(cells, rounds=1, short=True)
    small, large = summarise(found, rates)
    for row, edge in zip((small, large), edges, strict=True):
        said(
            f"{edge}x{edge * 2}x{edge} x 4: busy {row['device_busy']:.0%}, {row['of_bandwidth']:.0%} of copy, {row['bound']}"
        )
        assert 0 < row["device_busy"] <= 1
        # Of ceilings that are right where nothing else uses the GPU, as other processes of `-n` do.
        assert row["of_bandwidth"] > 0
    assert small["bound"] == "launch"
    assert large["bound"] in ("compute", "memory")
    assert large["device_busy"] > 0.9
    # One process for all cells says what a process of its own says.
    apart = TrialResult(cells[1])
    measure_in_new_process(apart)
    assert large["device_peak_gib"] == pytest.approx(apart.memory["device_peak_gib"], rel=0.05)
    assert found[1].flops == apart.flops
