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
from harness.api.task import Case
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


def test_a_summary_averages_cases_then_targets_and_counts_the_rest(registry):
    """By hand; a score without a value is left out, and the average is that of the targets' means."""
    task = registry.task("msd_hippocampus")
    first, second = task.targets

    def row(case, target, status, dice, hd95, surface):
        return dict(
            zip(("case", "target", "status", "dice", "hd95_mm", "surface_dice"), locals().values(), strict=True)
        )

    rows = [
        row("x", first, "scored", 0.2, 2.0, 0.4),
        row("y", first, "missed", 0.0, None, 0.0),
        row("z", first, "scored", 1.0, 4.0, 0.8),
        row("x", second, "scored", 0.9, 1.0, 1.0),
        row("y", second, "empty", None, None, None),
        row("z", second, "spurious", 0.0, 30.0, 0.0),
    ]
    found = stage.summarise(task, rows)
    counts = {"n_missed": 1, "n_spurious": 0, "n_empty": 0}
    assert (
        found[first]
        == {"dice": pytest.approx(0.4), "hd95": 3.0, "surface_dice": pytest.approx(0.4), "n_cases": 3} | counts
    )
    counts = {"n_missed": 0, "n_spurious": 1, "n_empty": 1}
    assert found[second] == {"dice": 0.45, "hd95": 15.5, "surface_dice": 0.5, "n_cases": 2} | counts
    assert found["average"] == {
        "dice": pytest.approx(0.425),
        "hd95": pytest.approx(9.25),
        "surface_dice": pytest.approx(0.45),
    }
    nothing = stage.summarise(task, [row("x", name, "empty", None, None, None) for name in task.targets])
    assert nothing["average"] == {"dice": None, "hd95": None, "surface_dice": None}


def test_the_reference_is_read_on_its_own_grid_in_mm(registry, tmp_path):
    """The spacing is that of the affine's columns, however the axes are turned."""
    task = registry.task("msd_hippocampus")
    label = np.zeros((4, 5, 6), np.uint8)
    label[1, 2, 3], label[2] = 1, 2
    affine = np.eye(4)
    affine[:3, :3] = np.array([[0, -2.0, 0], [0.7, 0, 0], [0, 0, 3.0]])
    nib.save(nib.Nifti1Image(label, affine), tmp_path / "a.nii.gz")
    case = Case("a", (tmp_path / "a.nii.gz",), tmp_path / "a.nii.gz")
    masks, spacing = stage.read_reference(task, case)
    assert spacing == pytest.approx([0.7, 2.0, 3.0])
    assert [mask.sum() for mask in masks] == [1, 30]


def test_the_definitions_are_the_settings():
    settings = Evaluate(hd95="pooled", empty="perfect", tolerance=2.5)
    assert stage.new_scoring(settings) == metrics.Scoring(hd95="pooled", empty="perfect", tolerance=2.5)
    assert stage.new_scoring(Evaluate()) == metrics.Scoring()
