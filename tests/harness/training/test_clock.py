"""Times per phase, by a clock that is set by hand."""

import pytest
import torch

from harness.training import clock as module
from harness.training.clock import PHASES, StepClock


@pytest.fixture
def set_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def tick(clock, now, **spans):
    """One step whose phases take so many milliseconds."""
    clock.start()
    for phase, span in spans.items():
        now[0] += span / 1000
        clock.lap(phase.rstrip("_"))


def test_phases_add_up_and_a_step_is_forward_backward_and_update(set_clock):
    clock = StepClock(torch.device("cpu"))
    tick(clock, set_clock, data=7, transfer=1, forward=10, backward=20, forward_=5, backward_=2, optimizer=3)
    set_clock[0] += 5  # between steps: nobody's
    tick(clock, set_clock, data=1, forward=1)
    clock.read()
    assert {phase: pytest.approx(values) for phase, values in clock.seconds.items()} == {
        "data": [0.007, 0.001],
        "transfer": [0.001, 0],
        "forward": [0.015, 0.001],
        "backward": [0.022, 0],
        "optimizer": [0.003, 0],
    }
    assert clock.summary()["step"] == {"p50_ms": pytest.approx((40 + 1) / 2), "p95_ms": pytest.approx(1 + 0.95 * 39)}
    assert set(clock.summary()) == {"step", *PHASES}


def test_the_first_steps_are_left_out_where_there_are_more(set_clock):
    clock = StepClock(torch.device("cpu"))
    for number in range(8):
        tick(clock, set_clock, forward=1000 if number < 5 else 10 + number)
        clock.read()  # as often as one likes
    assert clock.summary()["forward"]["p50_ms"] == 16
    assert clock.summary(skip=7)["forward"] == {"p50_ms": 17, "p95_ms": 17}
    assert clock.summary(skip=8)["forward"]["p95_ms"] == 1000


@pytest.mark.gpu
def test_the_clock_of_a_gpu_measures_what_the_gpu_does():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    clock, device = StepClock(torch.device("cuda")), torch.device("cuda")
    matrix = torch.randn(4096, 4096, device=device)
    matrix @ matrix
    clock.start()
    clock.lap("data")
    for _ in range(20):
        matrix @ matrix
    clock.lap("forward")
    clock.read()
    assert clock.seconds["forward"][0] > 10 * clock.seconds["data"][0]
