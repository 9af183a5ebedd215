"""Trackers get every step; one that fails never stops a run."""

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from harness.compute.processes import Processes
from harness.training.trackers import tracked
from tests.harness.commands import FOUR_STEPS, status_of
from tests.harness.processes import finish, run_words, start


def test_tensorboard_gets_every_step(sixteen_cases, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    words = run_words("simmim", FOUR_STEPS, sixteen_cases, tmp_path, "--tracker", "tensorboard")
    assert finish(start(words, tmp_path / "log")) == 0
    (events,) = {
        path.parent
        for path in (tmp_path / "trackers").rglob("events.out.tfevents.*")
        if path.parent.name.startswith("msd")
    }
    read = EventAccumulator(str(events))
    read.Reload()
    assert [each.step for each in read.Scalars("pretrain/loss")] == [1, 2, 3, 4]
    assert [each.step for each in read.Scalars("finetune/loss")] == [1, 2, 3, 4]


class Failing:
    """A tracker whose service goes away."""

    def __init__(self, *given, **named):
        self.logged = 0

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        self.logged += 1
        if self.logged == 2:
            raise ConnectionError("the service is gone")
        assert self.logged < 2, "it is left alone from then on"

    def finish(self):
        raise ConnectionError("still gone")


def test_a_tracker_that_fails_never_stops_a_run(sixteen_cases, tmp_path, monkeypatch, capsys):
    import accelerate.tracking

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)
    assert status_of(*run_words("simmim", FOUR_STEPS, sixteen_cases, tmp_path, "--tracker", "tensorboard")) == 0
    said = capsys.readouterr().err
    assert said.count("tracker tensorboard: ConnectionError: the service is gone; going on without it") == 1


def test_a_tracker_that_is_not_installed_is_known_before_the_run(sixteen_cases, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("harness.training.trackers.find_spec", lambda name: None)
    assert status_of(*run_words("simmim", FOUR_STEPS, sixteen_cases, tmp_path, "--tracker", "mlflow")) == 2
    assert "pip install 'ssl-seg-harness[mlflow]'" in capsys.readouterr().err
    assert not tmp_path.joinpath("cache").exists()


class Monotonic:
    """W&B as far as it matters here: values of a step below the last one are dropped."""

    def __init__(self, *given, **named):
        self.run, self.axes, self.values, self.last = self, {}, [], 0

    def define_metric(self, name, step_metric):
        self.axes[name] = step_metric

    def store_init_configuration(self, values):
        pass

    def log(self, values, step):
        self.last = self.last + 1 if step is None else max(step, self.last)
        if step is None or step == self.last:
            self.values.append(values)

    def finish(self):
        pass


def test_wandb_gets_the_steps_of_every_stage(tmp_path, monkeypatch):
    made = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", lambda *a, **n: made.append(Monotonic()) or made[0])
    with tracked(["wandb"], "run", {}, tmp_path, Processes()) as log:
        for stage in ("pretrain", "finetune"):
            for step in (1, 2, 3):
                log({f"{stage}/loss": 1.0 / step}, step)
    (tracker,) = made
    assert tracker.axes == {"pretrain/*": "pretrain/step", "finetune/*": "finetune/step"}
    assert [values["finetune/step"] for values in tracker.values if "finetune/loss" in values] == [1, 2, 3]
