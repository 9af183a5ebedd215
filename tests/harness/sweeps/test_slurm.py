"""Sweeps on a real Slurm: arrays, dependencies, and jobs that are killed on the way."""

import json
import os
import subprocess
import sys
import threading
import time

import psutil
import pytest

from harness.sweeps.slurm import queue
from harness.system.files import read_json
from tests.harness.slurm import missing, slurm

if os.geteuid() != 0 or missing():
    pytest.skip(
        f"no Slurm of its own: needs root and {', '.join(missing()) or 'nothing else'} (apt-get install slurm-wlm munge)",
        allow_module_level=True,
    )

pytestmark = pytest.mark.slurm

SWEEP = """
[defaults]
task = "msd_hippocampus"
data = "phantom"
preset = "demo"
[defaults.settings]
"pretrain.steps" = {steps}
"pretrain.warmup_steps" = 1
"pretrain.crop" = [32, 32, 32]
"finetune.steps" = 10
"finetune.warmup_steps" = 1
"finetune.crop" = [32, 32, 32]
"backbone.features" = [4, 4, 8, 8, 8]
[[matrix]]
method = {methods}
label_fraction = {fractions}
seed = {seeds}
"""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with slurm(tmp_path_factory.mktemp("slurm")) as config:
        yield config


class Sweep:
    """`harness sweep` on the cluster, in a process of its own; what is said is at hand while it runs."""

    def __init__(self, folder, text):
        self.runs, self.file = folder / "runs", folder / "mine.toml"
        self.file.write_text(text)
        self.notes, self.said = self.runs / "sweeps" / "mine", ""

    def start(self):
        words = ["sweep", self.file, "--runs", self.runs, "--launcher", "slurm", "--jobs", "8"]
        words += ["--slurm", "cpus_per_task=1", "--slurm", "mem_gb=2", "--checkpoint-minutes", "0.01"]
        command = [sys.executable, "-m", "harness", *map(str, words)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.said += line
            print(line, end="", flush=True)

    def finish(self, seconds):
        self.process.wait(seconds)
        self.reader.join()
        return self.process.returncode

    def number_of(self, pretrain):
        """A job that runs, and its name; a pre-training at work, or a cell."""
        for path in sorted(self.notes.glob("*.job.json")):
            noted = read_json(path)
            if noted is None:
                continue  # it has just ended
            name = path.name.removesuffix(".job.json")
            if name.endswith("-pretrain") == pretrain and (queue() or {}).get(noted["job"]) == "RUNNING":
                history = self.runs.glob(f"cache/pretrain/{name.split('-')[1]}-*/history.jsonl")
                if not pretrain or any(path.stat().st_size for path in history):
                    return noted["job"], name
        return None

    def wait_for(self, pretrain, seconds=600):
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.process.poll() is None:
            if (found := self.number_of(pretrain)) is not None:
                return found
            time.sleep(0.05)
        raise AssertionError("no such job came to run")

    def assert_done(self, cells, pretrainings, killed):
        records = list(self.runs.glob("*/record.json"))
        assert len(records) == cells
        folders = list((self.runs / "cache" / "pretrain").glob("*/stage.json"))
        assert len(folders) == pretrainings
        logs = "".join(path.read_text() for path in self.notes.glob("*.log"))
        # Once each, and once more where it was killed: then from its checkpoint.
        begun = [logs.count(f"pre-training into {path.parent}") for path in folders]
        assert sum(begun) == pretrainings + killed, begun
        for path in folders:
            lines = [json.loads(line) for line in (path.parent / "history.jsonl").read_text().splitlines()]
            assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
        assert not list(self.runs.rglob("*.lock"))


def kill_step(number):
    """SIGKILL to what runs a job on its node."""
    array, _, task = number.partition("_")
    deadline = time.monotonic() + 20  # a job runs a moment before its step does
    while time.monotonic() < deadline:
        for process in psutil.process_iter(["cmdline"]):
            if "submitit.core._submit" in (process.info["cmdline"] or []):
                own = process.environ()
                if (own.get("SLURM_ARRAY_JOB_ID"), own.get("SLURM_ARRAY_TASK_ID")) == (array, task):
                    process.kill()
                    return
        time.sleep(0.02)
    raise AssertionError(f"no process of job {number}")


def disturbed(folder, text, cells, pretrainings, seconds):
    sweep = Sweep(folder, text)
    sweep.start()
    try:
        number, name = sweep.wait_for(pretrain=True)
        # A job that is cancelled while it still imports has begun no pre-training.
        log = sweep.notes / f"{name}.log"
        while not log.exists() or "pre-training into" not in log.read_text():
            time.sleep(0.05)
        print(f"-- scancel {number} ({name})", flush=True)
        subprocess.run(["scancel", number], check=True)
        number, name = sweep.wait_for(pretrain=False)
        print(f"-- kill -9 of the step of {number} ({name})", flush=True)
        kill_step(number)
        assert sweep.finish(seconds) == 0, sweep.said
    finally:
        sweep.process.kill()
    sweep.assert_done(cells, pretrainings, killed=1)
    assert "goes on from there" in sweep.said
    return sweep


@pytest.mark.timeout(1500)
@pytest.mark.usefixtures("cluster")
def test_twenty_four_cells_with_jobs_killed_on_the_way(tmp_path):
    methods = '["hybridmim", "simmim", "models_genesis"]'
    text = SWEEP.format(steps=40, methods=methods, fractions="[0.25, 0.5, 0.75, 1.0]", seeds="[0, 1]")
    disturbed(tmp_path, text, cells=24, pretrainings=6, seconds=1200)


@pytest.mark.timeout(500)
@pytest.mark.usefixtures("cluster")
def test_a_sweep_with_jobs_killed_on_the_way(tmp_path):
    text = SWEEP.format(steps=60, methods='["simmim"]', fractions="[0.5, 1.0]", seeds="[0]")
    sweep = disturbed(tmp_path, text, cells=2, pretrainings=1, seconds=300)
    assert "after " in sweep.said


@pytest.mark.timeout(500)
@pytest.mark.usefixtures("cluster")
def test_a_job_that_is_warned_goes_back_into_the_queue(tmp_path):
    """What submitit has Slurm send before the time limit or a preemption; what is requeued waits for two minutes."""
    sweep = Sweep(tmp_path, SWEEP.format(steps=60, methods='["simmim"]', fractions="[1.0]", seeds="[0]"))
    sweep.start()
    try:
        number, name = sweep.wait_for(pretrain=False)
        log = sweep.notes / f"{name}.log"
        while not log.exists() or "pre-training into" not in log.read_text():
            time.sleep(0.05)
        subprocess.run(["scancel", "--signal=USR2", number], check=True)
        assert sweep.finish(400) == 0, sweep.said
    finally:
        sweep.process.kill()
    assert "attempt" not in sweep.said
    said = log.read_text()
    assert "harness: stopped by SIG" in said
    assert "pretrain goes on after step" in said


@pytest.mark.timeout(500)
@pytest.mark.usefixtures("cluster")
def test_a_sweep_that_is_left_is_taken_up_again(tmp_path):
    text = SWEEP.format(steps=400, methods='["simmim"]', fractions="[0.5, 1.0]", seeds="[0]")
    sweep = Sweep(tmp_path, text)
    sweep.start()
    sweep.wait_for(pretrain=True)
    sweep.process.terminate()
    assert sweep.finish(60) == 75
    assert "jobs stay in the queue; the same command watches them again" in sweep.said
    sweep.start()
    assert sweep.finish(300) == 0
    assert "is in the queue already" in sweep.said
    sweep.assert_done(cells=2, pretrainings=1, killed=0)
