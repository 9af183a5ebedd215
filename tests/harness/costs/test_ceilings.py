"""Ceilings: the work that is counted is the work that is done, by torch's own count and a clock that is set by hand."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.costs import ceilings
from harness.costs.ceilings import make_ceilings


@pytest.fixture
def half_seconds(monkeypatch):
    """A clock that says half a second later each time it is read."""
    now = [0.0]

    def tick():
        now[0] += 0.5
        return now[0]

    monkeypatch.setattr(ceilings.time, "perf_counter", tick)


@pytest.mark.parametrize("name", ["gemm fp32", "gemm bf16", "convolution fp32", "convolution bf16"])
def test_rates_are_the_operations_that_torch_counts_per_second(name, half_seconds):
    # On the device that has no memory and computes nothing.
    work = make_ceilings(torch.device("meta"), {"fp32", "bf16"})[name]
    with FlopCounterMode(display=False) as counted:
        rates = work()
    calls = len(rates) + 1  # the first one is not measured
    assert rates == [pytest.approx(counted.get_total_flops() / calls / 0.5)] * len(rates)


def test_a_copy_reads_and_writes_every_byte(half_seconds):
    rates = make_ceilings(torch.device("cpu"), set())["copy"]()
    assert rates == [2 * 2**24 * 4 / 0.5] * 5


def test_only_the_precisions_that_are_asked_for_are_measured():
    meta = torch.device("meta")
    assert set(make_ceilings(meta, {"bf16"})) == {"gemm bf16", "convolution bf16", "copy"}
    assert set(make_ceilings(meta, set())) == {"copy"}


def test_a_measured_copy_is_within_what_machines_do():
    rates = make_ceilings(torch.device("cpu"), set())["copy"]()
    assert all(1e7 < rate < 1e13 for rate in rates)
