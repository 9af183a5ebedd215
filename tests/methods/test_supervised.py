"""Supervised: pre-trains with all labels, says so in the record, and learns to segment."""

import json

import numpy as np
import pytest
import torch

from harness import UserError
from harness.api.losses import dice_loss
from harness.api.registry import Registry
from harness.cli.main import main
from harness.config.request import Request
from harness.conformance.fixture import MethodFixture
from harness.runs.locate import locate
from harness.runs.plan import plan
from methods.supervised import Supervised
from tests.conftest import TINY, TINY_BUDGET
from tests.methods.parts import unet


@pytest.fixture
def built(tmp_path):
    return MethodFixture(Supervised, Registry().load("backbone", "unet"), tmp_path).new()


def test_its_samples_hold_the_labels_at_the_same_voxels(built):
    """In the fixture the label follows from the intensity, so a shifted label would be noticed."""
    (batch,) = built.batches(1)
    expected = np.digitize(batch["image"].numpy(), (0.6, 0.75))
    assert batch["target"].shape == batch["image"].shape
    np.testing.assert_array_equal(batch["target"].numpy(), expected)
    assert len(np.unique(expected)) == 3


def test_its_loss_is_that_of_fine_tuning(built):
    (batch,) = built.batches(1)
    terms = built.method(batch)
    logits = built.method.logits(batch["image"])
    classes = batch["target"] == torch.arange(3).view(1, 3, 1, 1, 1)
    log_probabilities = logits.log_softmax(dim=1)
    entropy = -(log_probabilities * classes).sum(dim=1).mean()
    torch.testing.assert_close(terms["cross_entropy"], entropy)
    torch.testing.assert_close(terms["dice"], dice_loss(logits.softmax(dim=1), classes))
    assert set(terms) == {"dice", "cross_entropy"}


def test_it_learns_to_segment_and_passes_on_encoder_and_decoder(built):
    losses = built.train(40, cycle=1)
    assert np.mean(losses[-2:]) < 0.9 * losses[0]
    assert {built.method.backbone.part_of(key) for key in built.method.weights()} == {"encoder", "decoder"}


def test_its_picture_shows_the_probability_of_each_output(built):
    (batch,) = built.batches(1)
    shown = built.method.show(batch)
    crop, *outputs = shown.values()
    assert list(shown) == ["crop", "output 0", "output 1", "output 2"]
    assert torch.equal(crop, batch["image"])
    torch.testing.assert_close(sum(outputs), torch.ones_like(outputs[0]))
    assert min(float(each.min()) for each in outputs) >= 0


def test_without_labels_it_cannot_be_prepared():
    with pytest.raises(RuntimeError, match="call it first"):
        Supervised(Supervised.Config(), unet())({"image": torch.zeros(1, 1, 16, 16, 16)})


def words(phantom, *more):
    settings = [word for pair in (*TINY["unet"], *TINY_BUDGET) for word in ("--set", pair)]
    return ["run", "--method", "supervised", "--task", "msd_hippocampus", "--data", str(phantom), *settings, *more]


def test_a_run_pre_trains_on_all_labels_and_fine_tunes_on_a_share(hippocampus_phantom, tmp_path, capsys):
    assert main([*words(hippocampus_phantom, "--shots", "2"), "--runs", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/record.json")
    record = json.loads(path.read_text())
    data = record["data"]
    assert record["uses_labels"] is True
    assert (len(data["train"]), data["n_test_seen"]) == (2, 0)
    assert set(data["train"]) < set(data["pretrain"])
    assert not set(data["test"]) & set(data["pretrain"])
    terms = [json.loads(line)["terms"] for line in (path.parent / "history.jsonl").read_text().splitlines()]
    assert all(set(each) == {"dice", "cross_entropy"} for each in terms)
    assert "neither ranked nor tested" in capsys.readouterr().out


def planned(phantom, runs, *settings, **changes):
    pairs = (*TINY["unet"], *TINY_BUDGET, *settings)
    request = Request(method="supervised", task="msd_hippocampus", data=phantom, runs=runs, settings=pairs, **changes)
    return plan(request, *locate(request))


def test_what_draws_its_crops_is_part_of_its_pre_training(hippocampus_phantom, tmp_path):
    """Its crops are augmented as in fine-tuning. The number of fine-tuning steps does not change it."""
    keys = [planned(hippocampus_phantom, tmp_path, *more).pretrain_key for more in ((), ("finetune.flip=0.5",))]
    assert keys[0] != keys[1]
    assert planned(hippocampus_phantom, tmp_path, "finetune.steps=9").pretrain_key == keys[0]
    assert planned(hippocampus_phantom, tmp_path, shots=1).pretrain_key == keys[0]


def test_a_corpus_has_no_labels_so_it_is_pre_trained_on_the_task(hippocampus_phantom, tmp_path):
    corpus = str(hippocampus_phantom / "imagesTr")
    generic = planned(hippocampus_phantom, tmp_path, mode="generic", corpora=(corpus,))
    assert (generic.config.mode, generic.corpora) == ("task-specific", [])
    assert generic.run_id == planned(hippocampus_phantom, tmp_path).run_id


def test_a_misspelt_setting_is_refused(hippocampus_phantom, tmp_path):
    with pytest.raises(UserError, match="method"):
        planned(hippocampus_phantom, tmp_path, "method.depth=3")
