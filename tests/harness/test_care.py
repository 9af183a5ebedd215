"""`harness doctor` and `harness runs`, trackers that fail, and what the launchers' environment means."""

import json
import os
import shutil

import pytest

from harness.cli.main import main
from harness.compute import devices
from harness.runs import cleanup, doctor
from harness.system.errors import UserError
from harness.system.locks import acquire
from tests.harness.processes import CONTEXT, finish, run_words, start
from tests.harness.test_locks import elsewhere

BUDGET = [
    *("pretrain.steps=4", "pretrain.warmup_steps=1", "pretrain.crop=32,32,32", "backbone.features=4,4,8,8,8"),
    *("finetune.steps=4", "finetune.warmup_steps=1", "finetune.crop=32,32,32"),
]


@pytest.fixture(scope="module")
def data(sixteen_cases):
    return sixteen_cases


def words(data, runs, *more):
    return run_words("simmim", BUDGET, data, runs, *more)


def harness(*given) -> int:
    return main([str(word) for word in given])


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished")
    assert finish(start(words(data, runs, "--checkpoint-minutes", 0), runs / "log")) == 0, (runs / "log").read_text()
    return runs


@pytest.fixture
def runs(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "runs")
    return tmp_path / "runs"


def findings(capsys, *more, status=0):
    capsys.readouterr()
    assert harness("doctor", "--json", *more) == status
    return {each["what"]: each for each in json.loads(capsys.readouterr().out)}


def test_a_healthy_place(runs, capsys):
    found = findings(capsys, "--runs", runs)
    assert {each["status"] for each in found.values()} <= {"ok", "note"}
    assert found["prepared volumes"]["detail"] == "16, all as they were written"
    assert found["pre-trainings"]["detail"] == "1 finished, all as they were written"
    assert found["methods"]["detail"].endswith("load")
    assert found["torch"]["detail"]


def take_and_die(path):
    mine = acquire(path)
    assert mine[0] is not None
    os._exit(1)


def test_what_a_crash_left_is_found_and_removed(runs, capsys):
    (volume,) = list(runs.glob("cache/prepared/*/*.image.npy"))[:1]
    content = bytearray(volume.read_bytes())
    content[-1] ^= 1
    volume.write_bytes(content)
    (weights,) = runs.glob("cache/pretrain/*/weights.safetensors")
    weights.write_bytes(b"short")
    (run,) = (path.parent for path in runs.glob("*/record.json"))
    (run / "record.json").unlink()
    partial = run / ".record.json.gone-4194304-1.partial"
    partial.touch()
    os.utime(partial, (0, 0))
    gone = CONTEXT.Process(target=take_and_die, args=(run / "run",))
    gone.start()
    gone.join(60)
    found = findings(capsys, "--runs", runs, status=2)
    assert "1 of 16 volumes are not as they were written" in found["prepared volumes"]["detail"]
    assert "1 of 1 are damaged" in found["pre-trainings"]["detail"]
    assert "1 of processes that are gone" in found["locks"]["detail"]
    assert "1 files" in found["left by a crash"]["detail"]
    assert found["can go on"]["detail"].startswith(run.name)
    assert partial.exists()
    findings(capsys, "--runs", runs, "--fix")
    assert not partial.exists()
    assert not (run / "run.lock").exists()
    after = findings(capsys, "--runs", runs)
    assert "left by a crash" not in after
    assert "locks" not in after
    assert after["prepared volumes"]["detail"] == "15, all as they were written"


def test_what_is_at_work_is_left_alone(runs, capsys):
    (run,) = (path.parent for path in runs.glob("*/record.json"))
    (run / ".x.partial").touch()
    os.utime(run / ".x.partial", (0, 0))
    elsewhere(run / "run.lock")
    found = findings(capsys, "--runs", runs, "--fix")
    assert "process 1 on another-host" in found["at work"]["detail"]
    assert (run / ".x.partial").exists()
    assert (run / "run.lock").exists()
    assert not [each for each in cleanup.removable(runs) if each.path.parent == run]


def test_packages_that_do_not_import_are_said(monkeypatch):
    monkeypatch.setattr(doctor, "TESTED", {"no_such_package": "1", "numpy": "0.1"})

    found = {each.what: each for each in doctor.packages()}
    assert found["no_such_package"].status == "FAIL"
    assert "is not installed" in found["no_such_package"].detail
    assert (found["numpy"].status, "0.1 was tested" in found["numpy"].detail) == ("note", True)

    def broken(name):
        raise RuntimeError("operator torchvision::nms does not exist")

    monkeypatch.setattr(doctor.importlib, "import_module", broken)
    assert "operator torchvision::nms does not exist" in {e.what: e for e in doctor.packages()}["numpy"].detail


def test_plugins_that_fail_to_load_are_named(runs, tmp_path, capsys):
    plugin = tmp_path / "broken.py"
    plugin.write_text("import no_such_module")
    found = findings(capsys, "--runs", runs, "--plugin", plugin, status=2)
    assert "broken.py" in found["plugins"]["detail"]


def test_gc_shows_before_it_removes(runs, capsys):
    kept = list(runs.rglob("*.ckpt"))
    assert len(kept) == 4
    assert harness("runs", "gc", "--runs", runs) == 0
    out = capsys.readouterr().out
    assert "checkpoints of a finished pre-training" in out
    assert "checkpoints of a finished fine-tuning" in out
    assert "nothing was removed" in out
    assert list(runs.rglob("*.ckpt")) == kept
    assert harness("runs", "gc", "--runs", runs, "--yes") == 0
    assert not list(runs.rglob("*.ckpt"))
    assert list(runs.glob("*/weights.safetensors"))
    assert harness("runs", "gc", "--runs", runs) == 0
    assert "nothing to remove" in capsys.readouterr().out


def test_runs_are_listed_with_where_they_are(runs, capsys):
    (run,) = (path.parent for path in runs.glob("*/record.json"))
    assert harness("runs", "list", "--runs", runs, "--json") == 0
    assert json.loads(capsys.readouterr().out) == [{"run": run.name, "state": "finished", "at_work": ""}]
    for name in ("record.json", "finetune.json"):
        (run / name).unlink()
    assert harness("runs", "list", "--runs", runs) == 0
    assert "finetune, 4 steps" in capsys.readouterr().out
    assert harness("runs", "list", "--runs", runs / "no") == 2


def test_tensorboard_gets_every_step(data, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert finish(start(words(data, tmp_path, "--tracker", "tensorboard"), tmp_path / "log")) == 0
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


def test_a_tracker_that_fails_never_stops_a_run(data, tmp_path, monkeypatch, capsys):
    import accelerate.tracking

    monkeypatch.setitem(accelerate.tracking.LOGGER_TYPE_TO_CLASS, "tensorboard", Failing)
    assert harness(*words(data, tmp_path, "--tracker", "tensorboard")) == 0
    said = capsys.readouterr().err
    assert said.count("tracker tensorboard: ConnectionError: the service is gone; going on without it") == 1


def test_a_tracker_that_is_not_installed_is_known_before_the_run(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("harness.training.trackers.find_spec", lambda name: None)
    assert harness(*words(data, tmp_path, "--tracker", "mlflow")) == 2
    assert "pip install 'ssl-seg-harness[mlflow]'" in capsys.readouterr().err
    assert not tmp_path.joinpath("cache").exists()


def test_the_launchers_precision_is_followed_unless_the_run_says_otherwise(monkeypatch):
    import torch

    cpu = torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert devices.precision("auto", cpu) == "bf16"
    assert devices.precision("fp32", cpu) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="launch with bf16 or no"):
        devices.precision("auto", cpu)


@pytest.mark.parametrize(
    ("method", "backbone"), [("transvw", "unet"), ("simmim", "genesis_unet3d"), ("scratch", "genesis_unet3d")]
)
def test_micro_batches_of_batch_norm_are_refused_before_data_is_read(method, backbone, data, tmp_path, capsys):
    asked = ["run", "--method", method, "--backbone", backbone, "--task", "msd_hippocampus", "--data", data]
    assert harness(*asked, "--runs", tmp_path / "runs", "--micro-batches", 2) == 2
    assert "batch norm needs the whole batch at once" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "cache").exists()


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--checkpoint-minutes", "-1"], "is not a number of minutes"),
        (["--micro-batches", "0"], "is not a whole number of 1 or more"),
        (["--on-nonfinite", "ignore"], "invalid choice: 'ignore'"),
        (["--tracker", "carrier-pigeon"], "invalid choice: 'carrier-pigeon'"),
        (["--micro-batches", "3"], "cannot be dealt out evenly over 1 processes with 3 micro-batches"),
    ],
)
def test_wrong_ways_to_carry_out_a_run(more, says, data, tmp_path, capsys):
    assert harness(*words(data, tmp_path, *more)) == 2
    assert says in capsys.readouterr().err
