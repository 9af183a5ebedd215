"""Evaluation reads, predicts and scores at the same time: in order, in bounded memory, each case once, and loudly where one of
them fails."""

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from harness.config.schema import Evaluate
from harness.data.pictures import Panel
from harness.evaluation import evaluate as stage
from harness.evaluation.evaluate import Scored

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
