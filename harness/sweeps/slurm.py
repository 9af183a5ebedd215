"""A launcher that submits jobs to a Slurm cluster, through submitit."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.sweeps.job import POLL, Job, Launcher, job_environment
from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import read_json, write_atomic

# Parameters that have the same name for every executor of submitit; other parameters get the prefix `slurm_`.
SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout")


class Slurm(Launcher):
    """Submits jobs as Slurm arrays. Slurm starts a cell after the pre-training that the cell needs.

    `squeue` tells whether a job is in the queue; the job's status file, which it writes last, tells how it ended. So Slurm's
    accounting is not needed. A job that left the queue without a status file was killed.

    Args:
        jobs: how many jobs of an array run at a time.
        parameters: of submitit, as texts.
    """

    handles_dependencies = True

    def __init__(self, notes: Path, processes: int, jobs: int, parameters: Mapping[str, str]) -> None:
        super().__init__(notes, processes)
        try:
            import submitit
        except ImportError:
            raise UserError("--launcher slurm needs submitit: pip install 'ssl-seg-harness[slurm]'") from None
        if shutil.which("sbatch") is None:
            raise UserError("--launcher slurm: there is no sbatch here: start the sweep on a node that submits jobs")
        self.executor = submitit.AutoExecutor(folder=notes / "slurm", cluster="slurm")
        converted = {
            key if key in SHARED else f"slurm_{key}": _number_or_text(text) for key, text in parameters.items()
        }
        try:
            self.executor.update_parameters(**{"timeout_min": 24 * 60, "slurm_array_parallelism": jobs, **converted})
        # The message of submitit names the allowed parameters.
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
        self.jobs: dict[str, Job] = {}
        self.missing: dict[str, int] = {}

    def room(self) -> int:
        """No limit: Slurm queues the jobs that it cannot run yet."""
        return sys.maxsize

    def submit(self, jobs: Sequence[Job]) -> None:
        """Submit the jobs as one array. Jobs that are in the queue already are only watched."""
        jobs = [job for job in jobs if not self._attach(job)]
        if not jobs:
            return
        ids = {job.name: number for number, job in self.jobs.items()}
        needed_id = ids.get(jobs[0].needs.name) if jobs[0].needs else None
        # Start after the needed job, however it ended: if it was killed, the first of these jobs goes on with it, under its lock.
        extra = {"dependency": f"afterany:{needed_id}"} if needed_id else {}
        self.executor.update_parameters(
            name=f"harness-{self.notes.name}"[:60], slurm_additional_parameters={**extra, "requeue": True}
        )
        for job in jobs:
            self.status_file(job).unlink(missing_ok=True)
        with self.executor.batch():
            submitted = [
                self.executor.submit(Work(job.words(self.processes), self.log(job), self.status_file(job)))
                for job in jobs
            ]
        for job, handle in zip(jobs, submitted, strict=True):
            self.jobs[handle.job_id] = job
            write_atomic(
                self.notes / f"{job.name}.job.json", json.dumps({"job": handle.job_id, "attempt": job.attempt})
            )
            say(f"job {handle.job_id}: {job.name}{f' after {needed_id}' if needed_id else ''}")

    def poll(self) -> list[tuple[Job, int | None]]:
        """The jobs that left the queue, with None: their exit status is in their status file, or not known."""
        queued = queue()
        if queued is None:
            return []
        ended: list[tuple[Job, int | None]] = []
        for number, job in list(self.jobs.items()):
            if number in queued:
                self.missing.pop(number, None)
                continue
            # On a network file system the status file of a job that has just ended may appear a moment later.
            self.missing[number] = self.missing.get(number, 0) + 1
            if self.ending(job) is None and self.missing[number] < 3:
                continue
            del self.jobs[number]
            (self.notes / f"{job.name}.job.json").unlink(missing_ok=True)
            ended.append((job, None))
        return ended

    def stop(self) -> str:
        """Leave the jobs in the queue, and say so."""
        return f"its {len(self.jobs)} jobs stay in the queue; the same command watches them again"

    def _attach(self, job: Job) -> bool:
        """Watch the job if an earlier sweep submitted it and it is still in the queue. Returns whether that is so."""
        note = read_json(self.notes / f"{job.name}.job.json")
        number = str(note.get("job")) if isinstance(note, dict) else ""
        if job.attempt or not number or number not in (queue() or {}):
            return False
        self.jobs[number] = job
        say(f"job {number}: {job.name} is in the queue already")
        return True


class Work:
    """Runs the command of a job in its own process. submitit pickles this object and calls it on the node."""

    def __init__(self, words: list[str], log: Path, status_file: Path) -> None:
        self.words, self.log, self.status_file = words, str(log.resolve()), str(status_file.resolve())
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run the command. Returns its exit status."""
        environment = job_environment(os.environ, Path(self.status_file))
        environment.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        with Path(self.log).open("ab") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log, env=environment)
            return self._wait()

    def checkpoint(self) -> Any:
        """Called when Slurm takes the node away: the run saves its state, and the job goes back into the queue."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            self._wait()
        # The stopped process wrote an ending, but the job has not ended.
        Path(self.status_file).unlink(missing_ok=True)
        return submitit.helpers.DelayedSubmission(Work(self.words, Path(self.log), Path(self.status_file)))

    def _wait(self) -> int:
        """Wait for the process. `Popen.wait` would not do: a signal handler that interrupts it cannot call it again."""
        assert self.process is not None
        while (status := self.process.poll()) is None:
            time.sleep(POLL)
        return status

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process": None}


def queue() -> dict[str, str] | None:
    """The jobs of this user that have not ended, id -> state; None where Slurm does not answer."""
    words = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T"]
    answer = subprocess.run(words, capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    pairs = (line.strip().partition("|") for line in answer.stdout.splitlines())
    ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
    return {number: state for number, _, state in pairs if state not in ended}


def _number_or_text(text: str) -> int | str:
    """A decimal text as a number, any other text unchanged."""
    return int(text) if text.isdecimal() else text
