"""Untrained: other initial values than scratch, all of them transferred, and nothing else."""

import json

import pytest
import torch
from safetensors.torch import load_file

from harness.cli.main import main
from methods.untrained import Untrained
from tests.conftest import TINY, TINY_BUDGET
from tests.methods.parts import unet


def test_it_passes_on_encoder_and_decoder_as_they_are():
    backbone = unet()
    weights = Untrained(Untrained.Config(), backbone).weights()
    state = backbone.state_dict()
    assert set(weights) == {key for key in state if backbone.part_of(key) in ("encoder", "decoder")}
    assert all(torch.equal(value, state[key]) for key, value in weights.items())


def weights_after(folder, phantom, method, seed, steps):
    """The weights and the record of a run of so many fine-tuning steps with a learning rate that changes nothing."""
    settings = [*TINY["unet"], *TINY_BUDGET, f"finetune.steps={steps}", "finetune.lr=1e-30", "finetune.weight_decay=0"]
    words = ["run", "--method", method, "--task", "msd_hippocampus", "--data", str(phantom), "--seed", str(seed)]
    words += [word for pair in settings for word in ("--set", pair)]
    assert main([*words, "--runs", str(folder)]) == 0
    (path,) = folder.glob(f"*-{method}-*-s{seed}-*/record.json")
    return load_file(path.parent / "weights.safetensors"), json.loads(path.read_text())


@pytest.fixture(scope="module")
def networks(hippocampus_phantom, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    pairs = [("scratch", 0), ("untrained", 0), ("untrained", 1)]
    return {pair: weights_after(folder, hippocampus_phantom, *pair, 2) for pair in pairs}


def test_its_values_are_not_those_of_scratch_and_differ_between_seeds(networks):
    (scratch, _), (untrained, record), (other, _) = networks.values()
    convolutions = [key for key, value in scratch.items() if value.ndim == 5 and not key.startswith("final_conv")]
    assert len(convolutions) > 10
    for key in convolutions:
        assert not torch.equal(scratch[key], untrained[key])
        assert not torch.equal(other[key], untrained[key])
        # The same distribution: the spread of the values of a layer depends on its size only.
        assert float(untrained[key].std()) == pytest.approx(float(scratch[key].std()), rel=0.3)
    assert record["transfer"]["encoder_fraction"] == 1
    assert (record["transfer"]["skipped"], record["uses_labels"]) == ([], False)
    assert "pretrain" not in record["timing"]["seconds"]


def test_a_seed_fixes_it(networks, hippocampus_phantom, tmp_path):
    again, _ = weights_after(tmp_path, hippocampus_phantom, "untrained", 0, 2)
    before, _ = networks["untrained", 0]
    assert all(torch.equal(value, before[key]) for key, value in again.items())
