"""Evaluation reads, predicts and scores at the same time: in order, in bounded memory, and loudly where one of them fails."""

import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

from harness import stages
from harness.config import Evaluate

CASES = 6


class Probabilities(np.ndarray):
    """An array that can be watched."""


@pytest.fixture
def evaluation(monkeypatch, tmp_path):
    """`stages.evaluate` over six cases whose reading, prediction and scoring are made up; what happened is kept."""
    seen = SimpleNamespace(read=[], scored=[], alive=0, most=0, threads=set(), fail=None)

    class Volume:
        def __init__(self, number):
            self.number = number

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

    def score(config, task, predictions, volume, probabilities):
        seen.threads.add(threading.current_thread().name)
        assert probabilities.max() == volume.number
        if seen.fail == ("score", volume.number):
            raise ValueError("no such metric")
        seen.scored.append(volume.number)
        return [{"case": str(volume.number), "target": "t", "dice": 1.0}], volume.number

    monkeypatch.setattr(stages, "predict", predict)
    monkeypatch.setattr(stages, "_score", score)
    monkeypatch.setattr(
        stages.picture, "segmentation", lambda task, panels, path, title: seen.__setattr__("panels", panels)
    )
    monkeypatch.setattr(stages, "summarise", lambda task, rows: rows)
    config = SimpleNamespace(finetune=None, evaluate=Evaluate())
    volumes = [Volume(number) for number in range(CASES)]
    return seen, lambda: stages.evaluate(config, None, None, volumes, tmp_path, "")


def test_cases_stay_in_order_and_in_bounded_memory(evaluation, tmp_path):
    seen, evaluate = evaluation
    rows = evaluate()
    assert [row["case"] for row in rows] == [str(number) for number in range(CASES)]
    assert seen.panels == seen.scored == list(range(CASES))
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
