"""Validation while fine-tuning runs: what is scored when, and that the training does not depend on it."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness import UserError
from harness.cli.main import main
from harness.config.request import Request
from harness.data.volumes import preprocess_cases
from harness.evaluation import validation
from harness.evaluation.validation import Validation, mean_dice
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.system.signals import Interrupted
from harness.training.finetune import finetune
from harness.training.loop import StageContext
from harness.training.models import new_network
from harness.training.segmenter import Segmenter
from tests.conftest import TINY, TINY_BUDGET

SETTINGS = (*TINY["unet"], *TINY_BUDGET)


@pytest.fixture
def planned(thirty_cases, tmp_path):
    request = Request(
        method="scratch", task="msd_hippocampus", data=thirty_cases, runs=tmp_path / "runs", settings=SETTINGS
    )
    return plan(request, *locate(request))


@pytest.fixture
def volumes(planned, tmp_path):
    """Two volumes with their labels."""
    return preprocess_cases(planned.task, planned.test[:2], planned.data.inventory.digests, tmp_path / "cache")


def watching(planned, volumes, tmp_path, steps=8) -> Validation:
    return Validation(planned.config, planned.task, volumes, steps, tmp_path / "validation.json")


@pytest.mark.parametrize(
    ("steps", "due"), [(1000, [31, 62, 125, 250, 500, 1000]), (8, [1, 2, 4, 8]), (3, [1, 3]), (1, [1])]
)
def test_it_scores_at_the_last_step_half_of_it_a_quarter_and_so_on(planned, volumes, tmp_path, steps, due):
    assert watching(planned, volumes, tmp_path, steps).schedule == due
    assert watching(planned, [], tmp_path, steps).schedule == []


def answer(share):
    """A prediction that is right in the first `share` of the planes, and background in the others."""

    def predict(task, network, image, trained, settings):
        (volume,) = [each for each in predict.volumes if np.array_equal(each.image, image)]
        label = volume.label.copy()
        label[round(share * label.shape[0]) :] = 0
        return np.stack([label == value for value in (0, 1, 2)]).astype(np.float32)

    return predict


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
def test_the_score_is_the_mean_dice_of_cases_and_targets(planned, volumes, tmp_path, monkeypatch, share):
    fake = answer(share)
    fake.volumes = volumes
    monkeypatch.setattr(validation, "predict", fake)
    expected = []
    for volume in volumes:
        for value in (1, 2):
            truth = volume.label == value
            right = truth[: round(share * len(truth))].sum()
            expected.append(2 * right / (right + truth.sum()))
    assert mean_dice(None, planned.config, planned.task, volumes) == pytest.approx(np.mean(expected))


def test_points_are_kept_in_order_and_a_repeated_one_counts_once(planned, volumes, tmp_path, monkeypatch):
    watch = watching(planned, volumes, tmp_path)
    values = iter([0.5, 0.1, 0.2])
    monkeypatch.setattr(validation, "mean_dice", lambda *_: next(values))
    module = torch.nn.ModuleDict({"network": torch.nn.Linear(1, 1)})
    for step in (4, 3, 1, 4):
        watch(module, step)
    record = watch.record()
    assert record["curve"] == [[1, 0.1], [4, 0.2]]
    assert record["cases"] == [volume.case.id for volume in volumes]
    assert record["seconds"] >= 0


def test_every_module_keeps_its_mode(planned, volumes, tmp_path):
    """Frozen modules stay in evaluation mode in the steps that follow."""
    network = new_network(planned.plugins.new_backbone(planned.config, 1), planned.task, "finetune").train()
    children = list(network.children())
    children[0].eval()
    before = [module.training for module in network.modules()]
    watching(planned, volumes, tmp_path)(Segmenter(network, overlapping=False), 8)
    assert [module.training for module in network.modules()] == before
    assert len(set(before)) == 2


def test_training_does_not_depend_on_it(planned, volumes, tmp_path):
    finals = []
    for name in ("watched", "alone"):
        folder = tmp_path / name
        folder.mkdir()
        watch = watching(planned, volumes, folder, 2) if name == "watched" else None
        finetune(planned.config, planned.plugins, planned.task, volumes, {}, folder, StageContext(watch=watch))
        finals.append(load_file(folder / "weights.safetensors"))
    assert all(torch.equal(value, finals[1][key]) for key, value in finals[0].items())
    assert set(json.loads((tmp_path / "watched" / "validation.json").read_text())) == {"1", "2"}
    assert not (tmp_path / "alone" / "validation.json").exists()


def words(data, runs, *more):
    settings = [word for pair in (*SETTINGS, "finetune.steps=4") for word in ("--set", pair)]
    return [
        "run",
        "--method",
        "scratch",
        "--task",
        "msd_hippocampus",
        "--data",
        str(data),
        *settings,
        "--runs",
        str(runs),
        *more,
    ]


def record_of(runs):
    (path,) = runs.glob("*/record.json")
    return json.loads(path.read_text())


def test_a_run_holds_the_cases_out_and_records_the_curve(thirty_cases, tmp_path):
    assert main(words(thirty_cases, tmp_path / "runs")) == 0
    record = record_of(tmp_path / "runs")
    data, curve = record["data"], record["validation"]["curve"]
    assert len(data["validation"]) == 1
    assert record["validation"]["cases"] == data["validation"]
    assert not {*data["validation"]} & {*data["train"], *data["pretrain"], *data["test"]}
    assert [step for step, _ in curve] == [1, 2, 4]
    assert all(0 <= dice <= 1 for _, dice in curve)
    assert record["validation"]["seconds"] > 0


def test_without_validation_cases_all_are_trained_on(thirty_cases, tmp_path):
    assert main(words(thirty_cases, tmp_path / "runs", "--set", "finetune.validation=0")) == 0
    record = record_of(tmp_path / "runs")
    assert (len(record["data"]["train"]), record["data"]["validation"]) == (24, [])
    assert record["validation"] == {"cases": [], "curve": [], "seconds": 0}


def test_an_interrupted_run_has_the_same_curve(thirty_cases, tmp_path, monkeypatch):
    """It stops after the third step, and goes on from the checkpoint there."""
    assert main(words(thirty_cases, tmp_path / "whole")) == 0
    score, calls = Validation.__call__, []

    def stop_once(self, module, step):
        calls.append(step)
        score(self, module, step)
        if step == 3 and calls.count(3) == 1:
            monkeypatch.setattr("harness.training.loop.requested", lambda: "stopped here")

    monkeypatch.setattr(Validation, "__call__", stop_once)
    with pytest.raises((Interrupted, SystemExit, UserError)):
        run_until_stopped(words(thirty_cases, tmp_path / "parts"))
    monkeypatch.setattr("harness.training.loop.requested", lambda: "")
    assert main(words(thirty_cases, tmp_path / "parts")) == 0
    assert all(later > earlier for earlier, later in pairwise(calls))
    first, second = record_of(tmp_path / "whole"), record_of(tmp_path / "parts")
    assert second["validation"]["curve"] == first["validation"]["curve"]
    assert second["resumed"]["finetune"] == 1


def run_until_stopped(arguments):
    """Run, and raise for every exit status but 0."""
    status = main(arguments)
    if status:
        raise SystemExit(status)
