"""The loop: it minimises, writes every step, and stops or goes on where a step is not finite."""

import json
import os
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness import UserError
from harness.compute.devices import new_accelerator
from harness.config.request import Execution
from harness.system.locks import LostLockError
from harness.system.signals import Interrupted
from harness.training.checkpoints import read
from harness.training.loop import StageContext, TrainingLoop, train
from tests.harness.short_stage import stage_plan, training_settings


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


class LostAt:
    """A lock that another process has taken over after some calls of `check`."""

    def __init__(self, calls):
        self.left = calls

    def check(self):
        self.left -= 1
        if self.left < 0:
            raise LostLockError("taken over")


@pytest.mark.parametrize("watched", [False, True])
def test_who_lost_its_lock_in_the_midst_of_a_step_does_not_write_that_step(watched, tmp_path):
    """As after SIGSTOP and SIGCONT: the other process has this line already, and the history must not have it twice."""
    seen, history = [], tmp_path / "history.jsonl"
    context = StageContext(locks=(LostAt(6),), watch=(lambda _, step: seen.append(step)) if watched else None)
    with pytest.raises(LostLockError):
        train(stage_plan(), Slope(), [{"image": torch.ones(1, 2, 2, 2)}] * 40, history, new_accelerator(), context)
    lines = [json.loads(line)["step"] for line in history.read_text().splitlines()]
    assert lines == (list(range(1, 4)) if watched else list(range(1, 7)))
    assert seen == lines * watched
    assert not list(tmp_path.glob("checkpoints/*"))


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


@pytest.mark.parametrize("every", [1, 5])
def test_a_step_that_is_not_finite_is_skipped_and_counted(every, tmp_path, capsys, monkeypatch):
    """On a GPU the losses of several steps are read at once, and the history is written then."""
    init = TrainingLoop.__init__

    def reading(self, *arguments):
        init(self, *arguments)
        self.read_every = every

    monkeypatch.setattr(TrainingLoop, "__init__", reading)
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


class Twice(Slope):
    """Two terms, and the samples that it saw."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, batch):
        self.seen += batch["image"][:, 0, 0, 0, 0].tolist()
        (fit,) = super().forward(batch).values()
        return {"fit": fit, "size": 0.5 * self.weight.abs().sum() + 3}


def test_the_history_says_what_was_minimised_and_the_log_the_same(tmp_path):
    """The sum of the terms; every step takes the next samples in their order."""
    module, logged = Twice(), []
    data = [{"image": torch.full((1, 2, 2, 2), float(index))} for index in range(40)]
    context = StageContext(log=lambda values, step: logged.append((step, values)))
    train(stage_plan(), module, data, tmp_path / "history.jsonl", new_accelerator(), context)
    assert module.seen == list(range(40))
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert lines[0]["terms"] == {"fit": pytest.approx(0.25), "size": 3}
    assert lines[0]["stage"] == "pretrain"
    for line, (step, values) in zip(lines, logged, strict=True):
        assert line["loss"] == pytest.approx(sum(line["terms"].values()))
        assert step == line["step"]
        expected = {"loss": line["loss"], "lr": line["lr"], **line["terms"]}
        assert values == {f"pretrain/{name}": value for name, value in expected.items()}


def test_a_stage_that_goes_on_ends_as_one_that_was_never_interrupted(tmp_path):
    """Also where lines were written after the checkpoint, and where the history begins with those of another stage."""
    plan = replace(stage_plan(), history='{"stage": "before"}\n')
    data = [{"image": torch.full((1, 2, 2, 2), index / 40)} for index in range(40)]
    broken = [*data[:12], {"image": torch.full((1, 2, 2, 2), float("nan"))}, *data[13:]]
    whole, parts, history = Twice(), Twice(), tmp_path / "parts" / "history.jsonl"
    train(plan, whole, data, tmp_path / "whole" / "history.jsonl", new_accelerator())
    with pytest.raises(UserError, match="not finite at step 7"):
        train(plan, Twice(), broken, history, new_accelerator())
    assert len(history.read_text().splitlines()) == 1 + 6
    with history.open("a") as lines:
        lines.write('{"step": 7, "loss": 5.0}\n{"step": 8')
    done = train(plan, parts, data, history, new_accelerator())
    assert (done.steps, done.resumed, done.skipped) == (20, 1, [])
    assert parts.seen == whole.seen[12:]
    assert torch.equal(parts.weight, whole.weight)
    assert history.read_text() == (tmp_path / "whole" / "history.jsonl").read_text()


@pytest.mark.parametrize("more", [0, 1])
def test_a_stage_that_goes_on_with_other_threads_says_so(more, tmp_path, capsys):
    data, history, threads = Crops(), tmp_path / "history.jsonl", torch.get_num_threads()
    with pytest.raises(UserError, match="not finite"):
        train(stage_plan(), Slope(), data, history, new_accelerator())
    torch.set_num_threads(threads + more)
    try:
        with pytest.raises(UserError, match="not finite"):
            train(stage_plan(), Slope(), data, history, new_accelerator())
    finally:
        torch.set_num_threads(threads)
    told = f"the steps before had {threads} threads" in capsys.readouterr().err
    assert told == bool(more)


def test_a_stage_that_goes_on_remembers_what_it_skipped(tmp_path):
    def fail(step):
        if step == 9:
            raise ZeroDivisionError

    context = StageContext(execution=Execution(on_nonfinite="skip", checkpoint_minutes=0))
    with pytest.raises(ZeroDivisionError):
        train(stage_plan(), Slope(), Crops(), tmp_path / "history.jsonl", new_accelerator(), context, fail)
    done = train(stage_plan(), Slope(), Crops(), tmp_path / "history.jsonl", new_accelerator(), context)
    assert (done.skipped, done.resumed) == ([5], 1)
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert (lines[4]["loss"], lines[4]["terms"], lines[4]["gradient_norm"]) == (None, {}, None)
    # The loss is the square of a distance: its gradient is twice its root.
    assert lines[0]["gradient_norm"] == pytest.approx(2 * lines[0]["loss"] ** 0.5)


class Deadly:
    """Samples from loader processes, of which that of sample 24 kills itself once, as the system does when memory is short."""

    def __init__(self, mark):
        self.mark = mark

    def __len__(self):
        return 40

    def __getitem__(self, index):
        if index == 24 and not self.mark.exists():
            self.mark.touch()
            time.sleep(0.5)  # until the steps before it are computed
            os.kill(os.getpid(), signal.SIGKILL)
        return {"image": torch.full((1, 2, 2, 2), 1.0 + index)}


def test_a_loader_process_that_is_killed_leaves_a_checkpoint(tmp_path):
    plan = stage_plan(training_settings(workers=1))
    plans = {"whole": Deadly(tmp_path), "killed": Deadly(tmp_path / "mark")}
    modules = {name: Slope() for name in plans}
    (tmp_path / "killed").mkdir()
    history = tmp_path / "killed" / "history.jsonl"
    with pytest.raises(Interrupted, match=r"death of a loader process .* step \d+ of 20"):
        train(plan, modules["killed"], plans["killed"], history, new_accelerator())
    assert list((tmp_path / "killed" / "checkpoints").glob("*.ckpt"))
    modules["killed"] = Slope()
    done = train(plan, modules["killed"], plans["killed"], history, new_accelerator())
    assert done.resumed == 1
    (tmp_path / "whole").mkdir()
    train(plan, modules["whole"], plans["whole"], tmp_path / "whole" / "history.jsonl", new_accelerator())
    assert torch.equal(modules["whole"].weight, modules["killed"].weight)
    assert history.read_bytes() == (tmp_path / "whole" / "history.jsonl").read_bytes()
