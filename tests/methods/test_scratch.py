"""Scratch: the control starts from a random initialisation, whatever is asked for."""

import json

import pytest
import torch

from harness.cli.main import main
from harness.training.models import new_method
from harness.training.transfer import transfer
from methods.scratch import Scratch
from tests.conftest import TINY, TINY_BUDGET
from tests.methods.parts import unet


def test_it_passes_nothing_on():
    """A network that takes its weights keeps every value that it was initialised with."""
    trained = new_method(Scratch, Scratch.Config(), unet())
    assert not any(parameter.requires_grad for parameter in trained.parameters())
    with torch.no_grad():
        for parameter in trained.backbone.parameters():
            parameter.add_(1)
    fresh = unet()
    before = {key: value.clone() for key, value in fresh.state_dict().items()}
    done = transfer(fresh, trained.weights())
    assert (done.loaded, done.encoder_fraction) == ([], 0)
    assert all(torch.equal(value, before[key]) for key, value in fresh.state_dict().items())


def test_it_adds_nothing_to_the_network():
    alone, under = unet().state_dict(), Scratch(Scratch.Config(), unet()).state_dict()
    assert list(under) == [f"backbone.{key}" for key in alone]


def test_it_has_no_pretext_task():
    with pytest.raises(NotImplementedError, match="Scratch must implement forward"):
        Scratch(Scratch.Config(), unet())({"image": torch.zeros(1, 1, 16, 16, 16)})


def test_a_run_pre_trains_for_no_time_and_on_nothing(hippocampus_phantom, tmp_path):
    words = ["run", "--method", "scratch", "--task", "msd_hippocampus", "--data", str(hippocampus_phantom)]
    settings = [word for pair in (*TINY["unet"], *TINY_BUDGET) for word in ("--set", pair)]
    assert main([*words, *settings, "--runs", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    assert record["timing"]["pretrain_step"] is None
    assert "pretrain" not in record["timing"]["seconds"]
    stages = {json.loads(line)["stage"] for line in (path.parent / "history.jsonl").read_text().splitlines()}
    assert stages == {"finetune"}
