"""Evaluation reads, predicts and scores at the same time: in order, in bounded memory, each case once, and loudly where one of
them fails."""

import shutil
import threading
import weakref
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from harness.api.registry import Registry
from harness.config.schema import Evaluate
from harness.data.pictures import Panel
from harness.evaluation import evaluate as stage
from harness.evaluation import metrics
from harness.evaluation.evaluate import Scored
from tests.harness.commands import BUDGET, SMALL, harness, record_of

CASES = 6


class Probabilities(np.ndarray):
    """An array that can be watched."""


@pytest.fixture
def evaluation(monkeypatch, tmp_path):
    """`evaluate` over six cases whose reading, prediction and scoring are made up; what happened is kept."""
    seen = SimpleNamespace(read=[], scored=[], alive=0, most=0, threads=set(), fail=None)

    class Volume:
        def __init__(self, number):
            self.number = number
            self.case = SimpleNamespace(id=str(number))

        @property
        def image(self):
            seen.read.append(self.number)
            if seen.fail == ("read", self.number):
                raise OSError("the disk is gone")
            return np.full((1, 2, 2, 2), self.number, np.float32)

    def gone():
        seen.alive -= 1

    def predict(task, network, image, trained, settings):
        found = np.zeros((1, 2, 2, 2), np.float32).view(Probabilities)
        found[:] = image
        seen.alive += 1
        weakref.finalize(found, gone)
        seen.most = max(seen.most, seen.alive)
        # Never more than one ahead of what is predicted.
        assert len(seen.read) <= int(image.max()) + 2
        return found

    def score(task, scoring, volume, probabilities, scores, seconds):
        seen.threads.add(threading.current_thread().name)
        assert probabilities.max() == volume.number
        if seen.fail == ("score", volume.number):
            raise ValueError("no such metric")
        seen.scored.append(volume.number)
        rows = [{"case": volume.case.id, "target": "t", "dice": 1.0}]
        small = np.zeros((2, 2), np.uint8)
        panel = Panel(volume.case.id, 1.0, np.full((2, 2), volume.number, np.float32), small, small, 1.0)
        scores.write(volume.case.id, Scored(rows, panel, seconds))

    monkeypatch.setattr(stage, "predict", predict)
    monkeypatch.setattr(stage, "_score", score)
    monkeypatch.setattr(
        stage.pictures, "segmentation", lambda task, panels, path, title: seen.__setattr__("panels", panels)
    )
    monkeypatch.setattr(stage, "summarise", lambda task, rows: rows)
    config = SimpleNamespace(finetune=None, evaluate=Evaluate())
    volumes = [Volume(number) for number in range(CASES)]

    def evaluate(rank=0, size=1, weights="digest"):
        team = SimpleNamespace(
            rank=rank, size=size, main=rank == 0, wait=lambda: None, decide=lambda compute: compute()
        )
        return stage.evaluate(config, None, None, weights, volumes, tmp_path, "", team)[0]

    return seen, evaluate


def test_cases_stay_in_order_and_in_bounded_memory(evaluation, tmp_path):
    seen, evaluate = evaluation
    rows = evaluate()
    assert [row["case"] for row in rows] == [str(number) for number in range(CASES)]
    assert [panel.image[0, 0] for panel in seen.panels] == seen.scored == list(range(CASES))
    assert seen.most <= 2
    assert threading.main_thread().name not in seen.threads
    assert len((tmp_path / "cases.csv").read_text().splitlines()) == CASES + 1


@pytest.mark.parametrize(("where", "error"), [("read", OSError), ("score", ValueError)])
@pytest.mark.parametrize("number", [0, 3, CASES - 1])
def test_what_fails_beside_the_prediction_fails_the_evaluation(evaluation, tmp_path, where, error, number):
    seen, evaluate = evaluation
    seen.fail = (where, number)
    with pytest.raises(error):
        evaluate()
    assert not (tmp_path / "cases.csv").exists()


def test_a_case_is_scored_once(evaluation):
    seen, evaluate = evaluation
    seen.fail = ("score", 4)
    with pytest.raises(ValueError, match="no such metric"):
        evaluate()
    assert seen.scored == [0, 1, 2, 3]
    seen.fail, seen.read = None, []
    assert [row["case"] for row in evaluate()] == [str(number) for number in range(CASES)]
    assert seen.scored == list(range(CASES))


def test_scores_of_another_network_do_not_count(evaluation):
    seen, evaluate = evaluation
    evaluate()
    seen.read = []
    evaluate(weights="other")
    assert seen.scored == [*range(CASES), *range(CASES)]


@pytest.mark.parametrize("size", [2, 4, 8])
def test_processes_share_the_cases_without_overlap(evaluation, size):
    seen, evaluate = evaluation
    for rank in reversed(range(1, size)):
        seen.read = []
        with pytest.raises(RuntimeError, match="were not scored"):
            evaluate(rank, size)
    seen.read = []
    assert [row["case"] for row in evaluate(0, size)] == [str(number) for number in range(CASES)]
    assert sorted(seen.scored) == list(range(CASES))


def test_absent_organs_are_counted_not_averaged(data_folders, tmp_path, capsys, monkeypatch):
    """A network that predicts nothing, or everything right where it is: an absent organ has no Dice and is counted."""
    root = tmp_path / "data"
    shutil.copytree(data_folders / "btcv", root)
    task = Registry().task("btcv")
    for case in task.cases(root):
        image = nib.load(case.label)
        label = np.asarray(image.dataobj).copy()
        label[label == 5] = 0
        nib.save(nib.Nifti1Image(label, image.affine), case.label)
    harness("data", "check", "btcv", "--data", root, "--runs", tmp_path / "runs")
    assert "no esophagus" in capsys.readouterr().out

    def nothing(task, backbone, image, trained, settings):
        found = np.zeros((task.num_outputs, *image.shape[1:]), np.float32)
        found[0] = 1
        return found

    monkeypatch.setattr("harness.evaluation.evaluate.predict", nothing)
    harness(
        "run",
        "--method",
        "scratch",
        "--task",
        "btcv",
        "--data",
        root,
        *BUDGET,
        *SMALL["unet"],
        "--runs",
        tmp_path / "runs",
    )
    metrics = record_of(tmp_path / "runs", "scratch")["metrics"]
    assert metrics["esophagus"] == {
        "dice": None,
        "hd95": None,
        "surface_dice": None,
        "n_cases": 0,
        "n_missed": 0,
        "n_spurious": 0,
        "n_empty": 1,
    }
    assert metrics["liver"]["n_missed"] == 1
    assert metrics["average"]["dice"] == 0


def test_saved_predictions_are_what_was_scored(corpus_runs, data_folders):

    (folder,) = corpus_runs.glob("*-scratch-*")
    task = Registry().task("msd_hippocampus")
    cases = {case.id: case for case in task.cases(data_folders / "msd_hippocampus")}
    rows = pd.read_csv(folder / "cases.csv")
    written = sorted((folder / "predictions").iterdir())
    assert {path.name.removesuffix(".nii.gz") for path in written} == set(rows["case"])
    for path in written:
        case = cases[path.name.removesuffix(".nii.gz")]
        predicted, reference = nib.load(path), nib.load(case.label)
        assert predicted.shape == reference.shape
        assert np.allclose(predicted.affine, reference.affine)
        mine, theirs = (task.masks(np.asarray(image.dataobj)) for image in (predicted, reference))
        for target, scored in zip(task.targets, metrics.score(mine, theirs, (1, 1, 1)), strict=True):
            row = rows[(rows["case"] == case.id) & (rows["target"] == target)].iloc[0]
            assert scored.dice == pytest.approx(row["dice"], abs=1e-6)
