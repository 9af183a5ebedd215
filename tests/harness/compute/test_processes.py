"""Several processes: sharing one run, or asking for the same one at once."""

import json
import os
import shutil
import signal
import socket
import time

import pytest

from tests.harness.processes import finish, only_run, run_words, start

BUDGET = [
    # A low learning rate: AdamW makes of the last bit of a gradient a step of any size up to it, other on each processor.
    *(
        "pretrain.steps=6",
        "pretrain.warmup_steps=2",
        "pretrain.crop=32,32,32",
        "pretrain.batch_size=4",
        "pretrain.lr=1e-4",
    ),
    *("finetune.steps=6", "finetune.warmup_steps=2", "finetune.crop=32,32,32", "finetune.batch_size=4"),
    *("backbone.features=4,4,8,8,8", "method.sub_volume=32"),
]


def words(data, runs, *more):
    return run_words("hybridmim", BUDGET, data, runs, *more)


def launch(number, data, runs, *more):
    """As `torchrun` does it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    # As many threads as the run that they are compared with: sums depend on how many share them.
    shared |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = [
        start(words(data, runs, *more), runs / f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(number)
    ]
    return [finish(process) for process in processes]


def history(run):
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(sixteen_cases, tmp_path_factory):
    runs = tmp_path_factory.mktemp("alone")
    assert finish(start(words(sixteen_cases, runs), runs / "log")) == 0, (runs / "log").read_text()
    return only_run(runs)


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_shared_run_is_the_same_run(number, sixteen_cases, alone, tmp_path):
    assert launch(number, sixteen_cases, tmp_path) == [0] * number, (tmp_path / "log0").read_text()
    run = only_run(tmp_path)
    assert run.name == alone.name
    here, there = history(run), history(alone)
    assert [(line["stage"], line["step"]) for line in here] == [(line["stage"], line["step"]) for line in there]
    for a, b in zip(here, there, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if a["step"] == 1 else 1e-2), (a["stage"], a["step"])
    records = [json.loads((each / "record.json").read_text()) for each in (run, alone)]
    assert records[0]["computed_with"]["finetune"]["processes"] == number
    counts = [{name: values.get("n_cases") for name, values in each["metrics"].items()} for each in records]
    assert counts[0] == counts[1]
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("number", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_same_weights_have_the_same_record(number, sixteen_cases, alone, tmp_path):
    """A run that was interrupted after fine-tuning is evaluated by several processes, each case by one of them."""
    shutil.copytree(alone.parent, tmp_path / "runs")
    run = tmp_path / "runs" / alone.name
    for name in ("record.json", "cases.csv"):
        (run / name).unlink()
    assert launch(number, sixteen_cases, tmp_path / "runs") == [0] * number
    assert (run / "cases.csv").read_bytes() == (alone / "cases.csv").read_bytes()
    records = [json.loads((each / "record.json").read_text()) for each in (run, alone)]
    assert records[0]["metrics"] == records[1]["metrics"]
    assert records[0]["digests"] == records[1]["digests"]


def test_micro_batches_are_the_same_run(sixteen_cases, alone, tmp_path):
    assert finish(start(words(sixteen_cases, tmp_path, "--micro-batches", 2), tmp_path / "log")) == 0
    run = only_run(tmp_path)
    assert run.name == alone.name
    for a, b in zip(history(run), history(alone), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5 if a["step"] == 1 else 1e-2), (a["stage"], a["step"])


def test_what_is_wrong_is_said_once(sixteen_cases, tmp_path):
    (tmp_path / "runs").mkdir()
    assert launch(2, sixteen_cases, tmp_path / "runs", "--set", "finetune.batch_size=3") == [2, 2]
    said = "".join((tmp_path / "runs" / f"log{rank}").read_text() for rank in range(2))
    assert "a batch of 3 crops cannot be dealt out evenly over 2 processes" in said
    assert "Traceback" not in said


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_eight_processes_that_ask_at_once_compute_once(sixteen_cases, alone, tmp_path):
    processes = [start(words(sixteen_cases, tmp_path), tmp_path / f"log{number}") for number in range(8)]
    assert [finish(process) for process in processes] == [0] * 8
    run = only_run(tmp_path)
    assert (run / "history.jsonl").read_bytes() == (alone / "history.jsonl").read_bytes()
    assert (run / "cases.csv").read_bytes() == (alone / "cases.csv").read_bytes()
    said = [(tmp_path / f"log{number}").read_text() for number in range(8)]
    assert sum("files of this run:" in text for text in said) == 1
    assert sum("was finished before, nothing was computed" in text for text in said) == 7
    assert sum("is at work on" in text for text in said) >= 1
    assert not list(tmp_path.rglob("*.lock"))


def test_a_signal_to_one_of_them_stops_all_with_a_checkpoint(sixteen_cases, alone, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    both = [
        start(words(sixteen_cases, tmp_path), tmp_path / f"log{rank}", RANK=str(rank), LOCAL_RANK=str(rank), **shared)
        for rank in range(2)
    ]
    while both[1].is_alive() and not any(
        path.stat().st_size for path in tmp_path.glob("cache/pretrain/*/history.jsonl")
    ):
        time.sleep(0.002)
    os.kill(both[1].pid, signal.SIGTERM)
    assert [finish(process) for process in both] == [75, 75]
    assert "stopped by a signal to another process, pretrain step" in (tmp_path / "log0").read_text()
    assert len(list(tmp_path.glob("cache/pretrain/*/checkpoints/*.ckpt"))) == 1
    # It goes on with another number of processes.
    assert finish(start(words(sixteen_cases, tmp_path), tmp_path / "log")) == 0
    assert "pretrain goes on after step" in (tmp_path / "log").read_text()
    assert [(line["stage"], line["step"]) for line in history(only_run(tmp_path))] == [
        (line["stage"], line["step"]) for line in history(alone)
    ]
