"""Killed, stopped, or out of disk at any moment: the same command goes on, to the same bytes."""

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from harness.cli.main import main
from harness.evaluation import evaluate
from harness.runs import execute
from harness.system import files
from harness.system.files import find_below
from harness.training import finetune, loop, pretrain, stage_files
from tests.harness.processes import finish, only_run, run_words, start

STEPS = {"pretrain": 12, "finetune": 8}
BUDGET = [
    *("pretrain.steps=12", "pretrain.warmup_steps=2", "pretrain.crop=32,32,32", "backbone.features=4,4,8,8,8"),
    *("finetune.steps=8", "finetune.warmup_steps=2", "finetune.crop=32,32,32", "method.sub_volume=32"),
]
KILLS = 5


@pytest.fixture(scope="module")
def data(sixteen_cases):
    return sixteen_cases


def words(data, runs, *more):
    return run_words("hybridmim", BUDGET, data, runs, *more)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The run that nothing disturbs."""
    runs = tmp_path_factory.mktemp("whole")
    assert finish(start(words(data, runs), runs / "log")) == 0, (runs / "log").read_text()
    return only_run(runs)


def assert_same(run, whole):
    """Weights, scores and metrics to the last byte; every step once."""
    for name in ("weights.safetensors", "cases.csv"):
        assert (run / name).read_bytes() == (whole / name).read_bytes(), name
    assert (run / "history.jsonl").read_bytes() == (whole / "history.jsonl").read_bytes()
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    due = [(stage, step) for stage, steps in STEPS.items() for step in range(1, steps + 1)]
    assert [(line["stage"], line["step"]) for line in lines] == due
    here, there = (json.loads((each / "record.json").read_text()) for each in (run, whole))
    assert here["metrics"] == there["metrics"]
    assert here["digests"] == there["digests"]


def lines_in(pattern, runs) -> int:
    return sum(path.read_bytes().count(b"\n") for path in runs.glob(pattern) if path.exists())


def seen(stage, runs) -> float:
    """How far a stage is."""
    if stage == "prepare":
        return len(find_below(runs / "cache" / "prepared", "*.json"))
    if stage == "pretrain":
        return lines_in("cache/pretrain/*/history.jsonl", runs)
    if stage == "finetune":
        return max(0, lines_in("*/history.jsonl", runs) - STEPS["pretrain"])
    return sum(len(find_below(folder / "evaluation", "*.npz")) for folder in runs.iterdir())


LENGTH = {"prepare": 16, **STEPS, "evaluate": 4}


def kill_and_go_on(data, folder, whole, kills, rng):
    """`kills` times SIGKILL, at a random place of each stage in turn; finished runs are compared and begun anew."""
    done, number, went_on = [], 0, 0
    while len(done) < kills:
        runs, number = folder / str(number), number + 1
        runs.mkdir()
        for stage in LENGTH:
            at, process = (
                rng.randrange(LENGTH[stage]),
                start(words(data, runs, "--checkpoint-minutes", 0.001), runs / "log"),
            )
            while process.is_alive() and seen(stage, runs) <= at:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.05))
            process.kill()
            if finish(process) == -signal.SIGKILL:
                done.append(stage)
        assert finish(start(words(data, runs), runs / "log")) == 0, (runs / "log").read_text()
        assert_same(only_run(runs), whole)
        record = json.loads((only_run(runs) / "record.json").read_text())
        went_on += sum(record["resumed"].values())
    return done, went_on


@pytest.mark.timeout(600)
def test_kills_in_every_stage_change_nothing(data, whole, tmp_path):
    done, went_on = kill_and_go_on(data, tmp_path, whole, KILLS, random.Random(0))
    assert set(done) >= {"prepare", "pretrain", "finetune"}
    assert went_on, "no stage went on from a checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(data, whole, tmp_path):
    done, went_on = kill_and_go_on(data, tmp_path, whole, 20, random.Random(time.time_ns()))
    assert set(done) == set(LENGTH)
    print(f"killed {len(done)} times: {', '.join(done)}; went on from a checkpoint {went_on} times")


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_leaves_a_checkpoint_and_status_75(name, data, whole, tmp_path):
    process = start(words(data, tmp_path), tmp_path / "log")
    while process.is_alive() and seen("pretrain", tmp_path) < 3:
        time.sleep(0.002)
    os.kill(process.pid, getattr(signal, name))
    assert finish(process) == 75
    assert f"stopped by {name}, pretrain step" in (tmp_path / "log").read_text()
    (checkpoint,) = tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt")
    assert not list(tmp_path.rglob("*.lock"))
    assert finish(start(words(data, tmp_path), tmp_path / "log")) == 0
    assert f"pretrain goes on after step {int(checkpoint.stem[5:])} of 12" in (tmp_path / "log").read_text()
    assert_same(only_run(tmp_path), whole)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("stage", "step"), [("pretrain", 1), ("pretrain", 12), ("finetune", 8)])
def test_a_signal_in_any_step_loses_none(stage, step, data, whole, tmp_path, monkeypatch, capsys):
    """The last step of a stage too, after which there is nothing to go on with but to finish it."""
    keep = loop.TrainingLoop._keep_or_stop

    def hook(self, lines):
        if (self.name, self.step) == (stage, step):
            os.kill(os.getpid(), signal.SIGTERM)
        keep(self, lines)

    monkeypatch.setattr(loop.TrainingLoop, "_keep_or_stop", hook)
    assert run(*words(data, tmp_path)) == 75
    assert f"stopped by SIGTERM, {stage} step {step} of {STEPS[stage]}" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(*words(data, tmp_path)) == 0
    assert f"{stage} goes on after step {step} of {STEPS[stage]}" in capsys.readouterr().err
    assert_same(only_run(tmp_path), whole)


def test_a_damaged_checkpoint_is_left_out(data, whole, tmp_path):
    process = start(words(data, tmp_path, "--checkpoint-minutes", 0), tmp_path / "log")
    while process.is_alive() and len(list(tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt"))) < 2:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    assert finish(process) == 75
    older, newer = sorted(tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt"))
    content = bytearray(newer.read_bytes())
    content[-100] ^= 1
    newer.write_bytes(content)
    assert finish(start(words(data, tmp_path), tmp_path / "log")) == 0
    said = (tmp_path / "log").read_text()
    assert f"{newer} is damaged" in said
    assert f"goes on after step {int(older.stem[5:])} " in said
    assert_same(only_run(tmp_path), whole)


def run(*words) -> int:
    return main([str(word) for word in words])


def after_steps(monkeypatch, number, do):
    """`do(stage)` once, when a stage has done so many steps."""
    keep = loop.TrainingLoop._keep_or_stop

    def hook(stage, lines):
        keep(stage, lines)
        if stage.step == number and do:
            actions, do[:] = list(do), []
            for action in actions:
                action(stage)

    do = [do]
    monkeypatch.setattr(loop.TrainingLoop, "_keep_or_stop", hook)


@pytest.fixture
def one_thread():
    """As in the processes that the others are compared with: sums depend on how many threads share them."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def one_error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harness: error")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_is_removed_in_mid_run(workers, data, whole, tmp_path, monkeypatch, capsys):
    after_steps(monkeypatch, 4, lambda stage: shutil.rmtree(tmp_path / "cache" / "prepared"))
    more = ["--set", f"pretrain.workers={workers}"] if workers else []
    assert run(*words(data, tmp_path, "--checkpoint-minutes", 0, *more)) == 2
    assert "is gone: was the cache removed? Ask again" in one_error(capsys)
    assert run(*words(data, tmp_path, *more)) == 0
    assert "pretrain goes on after step" in capsys.readouterr().err
    if not workers:
        assert_same(only_run(tmp_path), whole)


@pytest.mark.usefixtures("one_thread")
def test_a_cache_that_is_corrupted_in_mid_run(data, whole, tmp_path, monkeypatch, capsys):
    def corrupt(stage):
        for path in (tmp_path / "cache" / "prepared").glob("*/*.image.npy"):
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)

    after_steps(monkeypatch, 4, corrupt)
    assert run(*words(data, tmp_path, "--checkpoint-minutes", 0)) == 2
    assert "changed or removed during training" in one_error(capsys)
    assert run(*words(data, tmp_path)) == 0
    assert "goes on after" not in capsys.readouterr().err
    assert_same(only_run(tmp_path), whole)


@pytest.mark.usefixtures("one_thread")
def test_a_file_of_the_data_that_vanishes(data, whole, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "Task04_Hippocampus"
    shutil.copytree(data, mine)
    kept = tmp_path / "kept"
    after_steps(monkeypatch, 4, lambda stage: (mine / "labelsTr").rename(kept))
    runs = tmp_path / "runs"
    assert run(*words(mine, runs)) == 2
    assert "is missing: restore it" in one_error(capsys)
    kept.rename(mine / "labelsTr")
    assert run(*words(mine, runs)) == 0
    assert "fine-tuning found in" in capsys.readouterr().err
    assert_same(only_run(runs), whole)


@pytest.fixture
def full_disk(tmp_path):
    """A folder on a small disk of its own, and what fills it; where mounting is not permitted, the test is skipped."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.decode().strip()}")

    def fill():
        with (place / "filler").open("wb", buffering=0) as filler:
            try:
                while True:
                    filler.write(bytes(4096))
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise

    yield place, fill
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_becomes_read_only(data, whole, full_disk, tmp_path):
    runs, _ = full_disk
    log = tmp_path / "log"
    process = start(words(data, runs, "--checkpoint-minutes", 0), log)
    while process.is_alive() and seen("pretrain", runs) < 3:
        time.sleep(0.002)
    # Files that are open for writing forbid it, so that it may take a few attempts.
    while process.is_alive() and subprocess.run(["mount", "-o", "remount,ro", runs], check=False).returncode:
        time.sleep(0.002)
    status = finish(process)
    subprocess.run(["mount", "-o", "remount,rw", runs], check=True)
    assert (status, "Read-only file system" in log.read_text()) == (2, True)
    assert finish(start(words(data, runs), log)) == 0, log.read_text()
    assert_same(only_run(runs), whole)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("at", ["pretrain", "finetune", "stage.json", "cases.csv", "record.json"])
def test_a_full_disk(at, data, whole, full_disk, monkeypatch, capsys):
    runs, fill = full_disk
    if at in STEPS:
        keep = loop.TrainingLoop._keep_or_stop

        def hook(stage, lines):
            if stage.name == at and stage.step == 4:
                fill()
            keep(stage, lines)

        monkeypatch.setattr(loop.TrainingLoop, "_keep_or_stop", hook)
    else:

        def write(path, *content):
            if path.name == at:
                fill()
            files.write_atomic(path, *content)

        for module in (evaluate, execute, finetune, pretrain, stage_files):
            monkeypatch.setattr(module, "write_atomic", write)
    assert run(*words(data, runs, "--checkpoint-minutes", 0)) == 2
    assert "No space left on device" in one_error(capsys)
    assert not list(runs.rglob("*.partial"))
    (runs / "filler").unlink()
    monkeypatch.undo()
    assert run(*words(data, runs)) == 0
    assert_same(only_run(runs), whole)
