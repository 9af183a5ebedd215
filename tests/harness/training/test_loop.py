"""The loop: it minimises, writes every step, and stops or goes on where a step is not finite."""

import json

import pytest
import torch
from torch import nn

from harness import UserError
from harness.compute.devices import new_accelerator
from harness.config.request import Execution
from harness.training.checkpoints import read
from harness.training.loop import StageContext, train
from tests.harness.short_stage import stage_plan


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"fit": (self.weight - batch["image"].mean()).square().sum()}


def test_loop_minimises_and_writes_every_step(tmp_path):
    module, history = Slope(), tmp_path / "history.jsonl"
    data = [{"image": torch.ones(1, 2, 2, 2)}] * 40
    seen = []
    done = train(stage_plan(), module, data, history, new_accelerator(), after_step=seen.append)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21)) == seen
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(0.05)
    assert max(line["lr"] for line in lines) <= 0.1
    assert 0 < lines[-1]["lr"] < 0.01
    assert done.steps == 20
    assert done.clock["step"]["p50_ms"] > 0


class Crops:
    """Samples from named cases; the ninth is not a number."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2, 2), float("nan") if index == 8 else 1.0)}

    def name(self, index):
        return f"case{index}"


def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path):
    module = Slope()
    with pytest.raises(
        UserError, match=r"at step 5 \(fit nan; cases case8, case9\); the state before it is kept: lower pre"
    ):
        train(stage_plan(), module, Crops(), tmp_path / "history.jsonl", new_accelerator())
    assert torch.isfinite(module.weight).all()
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert kept.name == "step-000000004.ckpt"
    state = read(kept)
    assert state["step"] == 4
    assert torch.equal(state["module"]["weight"], module.weight)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys):
    module, history = Slope(), tmp_path / "history.jsonl"
    with pytest.raises(UserError, match="go on with --on-nonfinite skip"):
        train(stage_plan(), module, Crops(), history, new_accelerator())
    again, skip = Slope(), StageContext(execution=Execution(on_nonfinite="skip"))
    done = train(stage_plan(), again, Crops(), history, new_accelerator(), skip)
    assert (done.skipped, done.resumed) == ([5], 1)
    assert "left out, 1 so far" in capsys.readouterr().err
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if line.get("skipped")] == [5]
    # As if nothing of that step had been: one finite step fewer.
    whole = Slope()
    data = [{"image": torch.ones(1, 2, 2, 2)}] * 40
    train(stage_plan(), whole, data, tmp_path / "whole.jsonl", new_accelerator())
    assert 0 < abs(float((again.weight - whole.weight).detach())) < 0.1
