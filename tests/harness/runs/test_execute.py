"""Killed, out of disk, or with damaged caches at any moment: the same command goes on, to the same bytes."""

import errno
import json
import random
import re
import shutil
import signal
import subprocess
import time

import pytest

from harness.evaluation import evaluate
from harness.runs import execute
from harness.system import files
from harness.training import finetune, loop, pretrain, stage_files
from tests.harness.commands import harness, short_run, status_of
from tests.harness.interrupted import STEPS, assert_same, seen, words
from tests.harness.processes import finish, only_run, start

KILLS = 5
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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kills_in_every_stage_change_nothing(sixteen_cases, whole_run, tmp_path):
    done, went_on = kill_and_go_on(sixteen_cases, tmp_path, whole_run, KILLS, random.Random(0))
    assert set(done) >= {"prepare", "pretrain", "finetune"}
    assert went_on, "no stage went on from a checkpoint"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_twenty_kills(sixteen_cases, whole_run, tmp_path):
    done, went_on = kill_and_go_on(sixteen_cases, tmp_path, whole_run, 20, random.Random(time.time_ns()))
    assert set(done) == set(LENGTH)
    print(f"killed {len(done)} times: {', '.join(done)}; went on from a checkpoint {went_on} times")


def after_steps(monkeypatch, number, do):
    """`do(stage)` once, when a stage has done so many steps."""
    keep = loop.TrainingLoop._checkpoint_or_stop

    def hook(stage, lines):
        keep(stage, lines)
        if stage.step == number and do:
            actions, do[:] = list(do), []
            for action in actions:
                action(stage)

    do = [do]
    monkeypatch.setattr(loop.TrainingLoop, "_checkpoint_or_stop", hook)


def one_error(capsys) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harness: error")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_cache_that_is_removed_in_mid_run(workers, sixteen_cases, whole_run, tmp_path, monkeypatch, capsys):
    after_steps(monkeypatch, 4, lambda stage: shutil.rmtree(tmp_path / "cache" / "prepared"))
    more = ["--set", f"pretrain.workers={workers}"] if workers else []
    assert status_of(*words(sixteen_cases, tmp_path, "--checkpoint-minutes", 0, *more)) == 2
    assert "is gone: was the cache removed? Ask again" in one_error(capsys)
    assert status_of(*words(sixteen_cases, tmp_path, *more)) == 0
    assert "pretrain goes on after step" in capsys.readouterr().err
    if not workers:
        assert_same(only_run(tmp_path), whole_run)


@pytest.mark.usefixtures("one_thread")
def test_a_cache_that_is_corrupted_in_mid_run(sixteen_cases, whole_run, tmp_path, monkeypatch, capsys):
    def corrupt(stage):
        for path in (tmp_path / "cache" / "prepared").glob("*/*.image.npy"):
            content = bytearray(path.read_bytes())
            content[-100] ^= 1
            path.write_bytes(content)

    after_steps(monkeypatch, 4, corrupt)
    assert status_of(*words(sixteen_cases, tmp_path, "--checkpoint-minutes", 0)) == 2
    assert "changed or removed during training" in one_error(capsys)
    assert status_of(*words(sixteen_cases, tmp_path)) == 0
    assert "goes on after" not in capsys.readouterr().err
    assert_same(only_run(tmp_path), whole_run)


@pytest.mark.usefixtures("one_thread")
def test_a_file_of_the_data_that_vanishes(sixteen_cases, whole_run, tmp_path, monkeypatch, capsys):
    mine = tmp_path / "Task04_Hippocampus"
    shutil.copytree(sixteen_cases, mine)
    kept = tmp_path / "kept"
    after_steps(monkeypatch, 4, lambda stage: (mine / "labelsTr").rename(kept))
    runs = tmp_path / "runs"
    assert status_of(*words(mine, runs)) == 2
    assert "is missing: restore it" in one_error(capsys)
    kept.rename(mine / "labelsTr")
    assert status_of(*words(mine, runs)) == 0
    assert "fine-tuning found in" in capsys.readouterr().err
    assert_same(only_run(runs), whole_run)


@pytest.mark.usefixtures("one_thread")
def test_a_label_that_is_edited_before_it_is_scored(sixteen_cases, whole_run, tmp_path, monkeypatch, capsys):
    """Nothing is scored with it; asked again, it is another run. Put back, the first run goes on."""
    mine, runs = tmp_path / "Task04_Hippocampus", tmp_path / "runs"
    shutil.copytree(sixteen_cases, mine)
    tested = json.loads((whole_run / "record.json").read_text())["data"]["test"]
    label = mine / "labelsTr" / f"{tested[0]}.nii.gz"
    before = label.read_bytes()
    after_steps(
        monkeypatch, 4, lambda stage: label.write_bytes((mine / "labelsTr" / f"{tested[1]}.nii.gz").read_bytes())
    )
    assert status_of(*words(mine, runs)) == 2
    assert f"a file of case '{tested[0]}' was changed while it was worked on" in one_error(capsys)
    assert not list(runs.glob("*/record.json"))
    label.write_bytes(before)
    assert status_of(*words(mine, runs)) == 0
    assert "fine-tuning found in" in capsys.readouterr().err
    assert_same(only_run(runs), whole_run)


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


@pytest.mark.slow
def test_a_disk_that_becomes_read_only(sixteen_cases, whole_run, full_disk, tmp_path):
    runs, _ = full_disk
    log = tmp_path / "log"
    process = start(words(sixteen_cases, runs, "--checkpoint-minutes", 0), log)
    while process.is_alive() and seen("pretrain", runs) < 3:
        time.sleep(0.002)
    # Files that are open for writing forbid it, so that it may take a few attempts.
    while process.is_alive() and subprocess.run(["mount", "-o", "remount,ro", runs], check=False).returncode:
        time.sleep(0.002)
    status = finish(process)
    subprocess.run(["mount", "-o", "remount,rw", runs], check=True)
    assert (status, "Read-only file system" in log.read_text()) == (2, True)
    assert finish(start(words(sixteen_cases, runs), log)) == 0, log.read_text()
    assert_same(only_run(runs), whole_run)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "at",
    [
        "cases.csv",
        "record.json",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("pretrain", "finetune", "stage.json")),
    ],
)
def test_a_full_disk(at, sixteen_cases, whole_run, full_disk, monkeypatch, capsys):
    runs, fill = full_disk
    if at in STEPS:
        keep = loop.TrainingLoop._checkpoint_or_stop

        def hook(stage, lines):
            if stage.name == at and stage.step == 4:
                fill()
            keep(stage, lines)

        monkeypatch.setattr(loop.TrainingLoop, "_checkpoint_or_stop", hook)
    else:

        def write(path, *content):
            if path.name == at:
                fill()
            files.write_atomic(path, *content)

        for module in (evaluate, execute, finetune, pretrain, stage_files):
            monkeypatch.setattr(module, "write_atomic", write)
    assert status_of(*words(sixteen_cases, runs, "--checkpoint-minutes", 0)) == 2
    assert "No space left on device" in one_error(capsys)
    assert not list(runs.rglob("*.partial"))
    (runs / "filler").unlink()
    monkeypatch.undo()
    assert status_of(*words(sixteen_cases, runs)) == 0
    assert_same(only_run(runs), whole_run)


def test_a_run_that_broke_off_after_its_predictions_can_be_asked_again(hippocampus_phantom, tmp_path, capsys):
    harness(*short_run("scratch", hippocampus_phantom), "--runs", tmp_path, "--save-predictions")
    assert re.search(r"/predictions: \d+ label maps?\n", capsys.readouterr().out)
    (record,) = tmp_path.glob("*/record.json")
    before = {path.name: path.read_bytes() for path in (record.parent / "predictions").iterdir()}
    record.unlink()
    harness(*short_run("scratch", hippocampus_phantom), "--runs", tmp_path, "--save-predictions")
    assert {path.name: path.read_bytes() for path in (record.parent / "predictions").iterdir()} == before
    assert not list(record.parent.glob(".predictions*"))


DAMAGED = {
    "digests are a list": ("cache/digests.json", b"[]"),
    "digests are null": ("cache/digests.json", b"null"),
    "digests nest without end": ("cache/digests.json", b"[" * 200_000),
    "signature cut": ("cache/signatures/*.npy", lambda content: content[:100]),
    "signature empty": ("cache/signatures/*.npy", b""),
    "stage cut": ("cache/pretrain/*/stage.json", lambda content: content[:20]),
    "stage is a list": ("cache/pretrain/*/stage.json", b"[]"),
    "pre-trained weights cut": ("cache/pretrain/*/weights.safetensors", lambda content: content[:500]),
    "pre-trained weights gone": ("cache/pretrain/*/weights.safetensors", None),
    "history gone": ("cache/pretrain/*/history.jsonl", None),
    "geometry gone": ("cache/prepared/*/*.json", b'{"files": {}}'),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_caches_are_made_again(kind, hippocampus_phantom, finished_simmim, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(finished_simmim, runs)
    (record,) = runs.glob("*/record.json")
    metrics = json.loads(record.read_text())["metrics"]
    record.unlink()
    pattern, change = DAMAGED[kind]
    found = list(runs.glob(pattern))
    assert found
    for path in found:
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    harness(*short_run("simmim", hippocampus_phantom), "--runs", runs)
    assert json.loads(record.read_text())["metrics"] == metrics


def test_predictions_can_be_asked_for_later(corpus_runs, data_folders, capsys):
    generic = ["--mode", "generic", "--corpus", data_folders / "scans"]
    words = [*short_run("simmim", data_folders / "msd_hippocampus"), *generic, "--runs", corpus_runs]
    (folder,) = corpus_runs.glob("*-simmim-*")
    before = (folder / "cases.csv").read_bytes()
    assert not (folder / "predictions").exists()
    harness(*words, "--save-predictions")
    assert list((folder / "predictions").iterdir())
    assert (folder / "cases.csv").read_bytes() == before
