"""What a step is bound by: the rule and the counts, which need no GPU."""

import pytest
import torch

from harness.costs.bounds import ByteCounter, WatchedStep, judge, union, watch


def test_intervals_that_overlap_count_once():
    assert union([]) == 0
    assert union([(5, 7), (0, 2), (1, 3), (6, 6.5), (7, 8)]) == pytest.approx(6)


def test_the_rule():
    # Ceilings of 10 FLOP/s and 100 bytes/s, a step of a second.
    assert judge(None, 1.0, 5, 10, 100) == {"device_busy": None, "of_bandwidth": None, "bound": ""}
    assert judge(WatchedStep(0.5, 99), 1.0, 9, 10, 100)["bound"] == "launch"
    assert judge(WatchedStep(0.9, 20), 1.0, 5, 10, 100)["bound"] == "compute"
    found = judge(WatchedStep(1.2, 60), 1.0, 5, 10, 100)
    assert found == {"device_busy": 1.0, "of_bandwidth": pytest.approx(0.6), "bound": "memory"}


def test_bytes_are_those_that_operators_take_and_give():
    wide, flat = torch.ones(64, 64), torch.ones(64)
    counted = []
    for work in (
        lambda: wide + wide,  # one read, one written
        lambda: wide.t()[:32],  # views
        lambda: wide.t().contiguous(),  # a copy
        lambda: wide.add_(1),  # read and written
        lambda: wide + flat.expand(64, 64),  # what is expanded is read once
        lambda: torch.empty(64, 64),  # nothing is written yet
    ):
        with ByteCounter() as counter:
            work()
        counted.append(counter.total)
    assert counted == [2 * 16384, 0, 2 * 16384, 2 * 16384, 2 * 16384 + 256, 0]


def test_bytes_of_a_backward_pass_and_an_update_are_counted():
    layer = torch.nn.Linear(32, 32, bias=False)
    optimizer = torch.optim.AdamW(layer.parameters(), fused=True)
    totals = []
    for _ in range(2):
        with ByteCounter() as counter:
            loss = layer(torch.ones(4, 32)).sum()
            forward = counter.total
            loss.backward()
            backward = counter.total - forward
            optimizer.step()
        totals.append((forward, backward, counter.total - forward - backward))
    forward, backward, update = totals[1]
    assert backward > 4096  # the gradient of the weight, at least
    # Weight, gradient and two moments are read; all but the gradient are written.
    assert update >= 7 * 4096


def test_nothing_is_watched_without_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert watch(lambda: pytest.fail("no step is needed")) is None
