"""Cells of a sweep as jobs, each in processes of its own, and where they run: here, or on a Slurm cluster."""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import UserError
from harness.execution import STOPPED
from harness.files import read_json, write_atomic
from harness.planning import command
from harness.progress import say
from harness.sweep import Outcome, Planned

ATTEMPTS = 4  # of a job that is killed from outside; what fails by itself is not tried again
POLL = 0.2


@dataclass(frozen=True)
class Job:
    """One process, or several of one run: a cell, or the pre-training that several cells share.

    Attributes:
        needs: the job that has to come to its end before.
        attempt: how often it was started before.
    """

    planned: Planned
    until: str = ""
    needs: "Job | None" = None
    attempt: int = 0

    @property
    def name(self) -> str:
        """For files and queues."""
        return f"{self.planned.cell.name}{'-' if self.until else ''}{self.until}"

    def words(self, processes: int) -> list[str]:
        """What is started."""
        start = [sys.executable, "-m", "harness"]
        if processes > 1:
            several = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            start = [sys.executable, "-m", *several, "-m", "harness"]
        until = ["--until", self.until] if self.until else []
        return [*start, *command(self.planned.cell.request)[1:], *until]


def make_jobs(todo: Sequence[Planned]) -> list[Job]:
    """Jobs of the cells; where cells share a pre-training that is still to come, it is a job of its own before them."""
    sharing: dict[Path, list[Planned]] = {}
    for each in todo:
        if each.pretrain is not None and not (each.pretrain / "stage.json").exists():
            sharing.setdefault(each.pretrain, []).append(each)
    first = {path: Job(cells[0], until="pretrain") for path, cells in sharing.items() if len(cells) > 1}
    return [*first.values(), *(Job(each, needs=first.get(each.pretrain) if each.pretrain else None) for each in todo)]


class Launcher(ABC):
    """Where jobs run. Messages of a job go to `NAME.log` in `notes`."""

    waits_itself = False
    """Whether it holds jobs back until what they need has ended."""

    def __init__(self, notes: Path, processes: int) -> None:
        self.notes, self.processes = notes, processes
        notes.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def room(self) -> int:
        """How many jobs may be submitted now."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Start these jobs, all of which need the same one."""

    @abstractmethod
    def poll(self) -> list[tuple[Job, int | None]]:
        """Jobs that ended, with their exit status; None where nobody knows."""

    @abstractmethod
    def stop(self) -> str:
        """The sweep ends before its jobs; says what becomes of them."""

    def log(self, job: Job) -> Path:
        """Where its messages go."""
        return self.notes / f"{job.name}.log"


class Local(Launcher):
    """So many jobs at a time on this machine; GPUs are handed out in turn."""

    def __init__(self, notes: Path, processes: int, jobs: int) -> None:
        super().__init__(notes, processes)
        self.jobs, self.gpus = jobs, visible_gpus()
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

    def room(self) -> int:
        return self.jobs - len(self.running)

    def submit(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            slot = next(number for number in range(self.jobs) if number not in self.running)
            with self.log(job).open("ab") as log:
                words, own = job.words(self.processes), own_environment(os.environ)
                cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
                own.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.jobs * self.processes))))
                if self.gpus:
                    places = range(slot * self.processes, (slot + 1) * self.processes)
                    own["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[place % len(self.gpus)] for place in places)
                # A group of its own: Ctrl-C reaches it through `stop`, once.
                process = subprocess.Popen(words, stdout=log, stderr=log, env=own, start_new_session=True)
            self.running[slot] = job, process

    def poll(self) -> list[tuple[Job, int | None]]:
        ended = {slot: (job, process.poll()) for slot, (job, process) in self.running.items()}
        ended = {slot: each for slot, each in ended.items() if each[1] is not None}
        for slot in ended:
            del self.running[slot]
        return list(ended.values())

    def stop(self) -> str:
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.wait()
        return "its jobs have written checkpoints"


class Slurm(Launcher):
    """Arrays of a Slurm cluster, through submitit; cells depend on the pre-training that they share.

    What became of a job is read from the file that its last act is to write, and from `squeue`: accounting is not needed.
    A job that is gone without such a file was killed.
    """

    waits_itself = True

    def __init__(self, notes: Path, processes: int, jobs: int, parameters: Mapping[str, str]) -> None:
        super().__init__(notes, processes)
        try:
            import submitit
        except ImportError:
            raise UserError("--launcher slurm needs submitit: pip install 'ssl-seg-harness[slurm]'") from None
        if shutil.which("sbatch") is None:
            raise UserError("--launcher slurm: there is no sbatch here: start the sweep on a node that submits jobs")
        self.executor = submitit.AutoExecutor(folder=notes / "slurm", cluster="slurm")
        given = {key if key in _SHARED else f"slurm_{key}": _number_or_text(text) for key, text in parameters.items()}
        try:
            self.executor.update_parameters(**{"timeout_min": 24 * 60, "slurm_array_parallelism": jobs, **given})
        # Its own words name what is allowed.
        except (NameError, ValueError, TypeError, AssertionError) as error:
            raise UserError(f"--slurm: {' '.join(str(error).split())}") from None
        self.jobs: dict[str, Job] = {}
        self.missing: dict[str, int] = {}

    def room(self) -> int:
        return sys.maxsize

    def submit(self, jobs: Sequence[Job]) -> None:
        jobs = [job for job in jobs if not self._attach(job)]
        if not jobs:
            return
        ids = {job.name: number for number, job in self.jobs.items()}
        needed = ids.get(jobs[0].needs.name) if jobs[0].needs else None
        # After any end of it: if it was killed, the first of these goes on with it, under its lock.
        extra = {"dependency": f"afterany:{needed}"} if needed else {}
        self.executor.update_parameters(
            name=f"harness-{self.notes.name}"[:60], slurm_additional_parameters={**extra, "requeue": True}
        )
        for job in jobs:
            self._status(job).unlink(missing_ok=True)
        with self.executor.batch():
            submitted = [
                self.executor.submit(Work(job.words(self.processes), self.log(job), self._status(job))) for job in jobs
            ]
        for job, each in zip(jobs, submitted, strict=True):
            self.jobs[each.job_id] = job
            write_atomic(self.notes / f"{job.name}.job.json", json.dumps({"job": each.job_id, "attempt": job.attempt}))
            say(f"job {each.job_id}: {job.name}{f' after {needed}' if needed else ''}")

    def poll(self) -> list[tuple[Job, int | None]]:
        queued = queue()
        if queued is None:
            return []
        ended: list[tuple[Job, int | None]] = []
        for number, job in list(self.jobs.items()):
            if number in queued:
                self.missing.pop(number, None)
                continue
            status = read_json(self._status(job))
            found = status.get("status") if isinstance(status, dict) else None
            # The file of a job that has just ended may take a moment on a network file system.
            self.missing[number] = self.missing.get(number, 0) + 1
            if found is None and self.missing[number] < 3:
                continue
            del self.jobs[number]
            (self.notes / f"{job.name}.job.json").unlink(missing_ok=True)
            ended.append((job, found))
        return ended

    def stop(self) -> str:
        return f"its {len(self.jobs)} jobs stay in the queue; the same command watches them again"

    def _attach(self, job: Job) -> bool:
        """Whether an earlier sweep has submitted it, and it still is in the queue."""
        noted = read_json(self.notes / f"{job.name}.job.json")
        number = str(noted.get("job")) if isinstance(noted, dict) else ""
        if job.attempt or not number or number not in (queue() or {}):
            return False
        self.jobs[number] = job
        say(f"job {number}: {job.name} is in the queue already")
        return True

    def _status(self, job: Job) -> Path:
        return self.notes / f"{job.name}.status.json"


_SHARED = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node", "tasks_per_node", "stderr_to_stdout")


class Work:
    """What submitit calls on the node: the command in a process of its own, and its exit status into a file."""

    def __init__(self, words: list[str], log: Path, status: Path) -> None:
        self.words, self.log, self.status = words, str(log.resolve()), str(status.resolve())
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        own = own_environment(os.environ)
        own.setdefault("OMP_NUM_THREADS", os.environ.get("SLURM_CPUS_PER_TASK", "1"))
        with Path(self.log).open("ab") as log:
            self.process = subprocess.Popen(self.words, stdout=log, stderr=log, env=own)
            status = self._wait()
        write_atomic(Path(self.status), json.dumps({"status": status}))
        return status

    def checkpoint(self) -> Any:
        """Slurm takes the node away: the run saves its state, and the job goes back into the queue."""
        import submitit

        if self.process is not None:
            self.process.terminate()
            self._wait()
        return submitit.helpers.DelayedSubmission(Work(self.words, Path(self.log), Path(self.status)))

    def _wait(self) -> int:
        """As `Popen.wait`, which cannot be called once more from the handler of a signal that interrupts it."""
        assert self.process is not None
        while (status := self.process.poll()) is None:
            time.sleep(POLL)
        return status

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"process": None}


def queue() -> dict[str, str] | None:
    """Jobs of this user and their states; None where Slurm does not answer."""
    asked = ["squeue", "--noheader", "--array", "--me", "--format=%i|%T"]
    answer = subprocess.run(asked, capture_output=True, text=True, check=False)
    if answer.returncode:
        return None
    pairs = (line.strip().partition("|") for line in answer.stdout.splitlines())
    ended = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")
    return {number: state for number, _, state in pairs if state not in ended}


def execute(todo: Sequence[Planned], launcher: Launcher) -> Iterator[Outcome | None]:
    """Run the cells; outcomes as they come, and None now and then in between.

    What is killed from outside goes on from its checkpoint; what fails by itself is noted, with its reason.
    """
    waiting, ended, running = make_jobs(todo), set[str](), dict[str, tuple[Job, float]]()
    refused: dict[str, str] = {}
    while waiting or running:
        for group in _ready(waiting, running, ended, launcher):
            launcher.submit(group)
            running |= {job.name: (job, time.monotonic()) for job in group}
            waiting = [job for job in waiting if job not in group]
        for job, status in launcher.poll():
            _, began = running.pop(job.name)
            again, problem = _judge(job, status, launcher.log(job))
            if again is not None:
                say(f"{job.name}: {problem}; it goes on from there (attempt {again.attempt + 1} of {ATTEMPTS})")
                waiting = [again, *(_follow(other, job, again) for other in waiting)]
                continue
            ended.add(job.name)
            if problem and job.until:
                refused[job.name] = problem
            if not job.until:
                yield _conclude(job, problem, launcher.notes, time.monotonic() - began)
        for job in list(waiting):
            if job.needs is not None and job.needs.name in refused:
                waiting.remove(job)
                yield _conclude(job, f"its pre-training: {refused[job.needs.name]}", launcher.notes, 0.0)
        yield None
        time.sleep(POLL)


def _ready(
    waiting: Sequence[Job], running: Mapping[str, Any], ended: set[str], launcher: Launcher
) -> Iterator[list[Job]]:
    """Groups of jobs that may be submitted now: those that need the same job together."""
    room = launcher.room()
    groups: dict[str, list[Job]] = {}
    for job in waiting:
        open_to = job.needs is None or job.needs.name in ended
        if launcher.waits_itself and job.needs is not None and job.needs.name in running:
            open_to = True
        if open_to:
            groups.setdefault(job.needs.name if job.needs else "", []).append(job)
    for group in groups.values():
        if room > 0:
            yield group[:room]
            room -= len(group[:room])


def _follow(job: Job, before: Job, again: Job) -> Job:
    return Job(job.planned, job.until, again, job.attempt) if job.needs == before else job


def _judge(job: Job, status: int | None, log: Path) -> tuple[Job | None, str]:
    """The job once more where it was killed from outside, and what went wrong; empty where nothing did."""
    if status == 0:
        return None, ""
    said = last_words(log)
    if status == 2 or (status == 1 and said.startswith("harness: error:")):
        return None, said.removeprefix("harness: error:").strip() or f"see {log}"
    if status == 1 and not said.startswith("harness: stopped"):
        return None, f"{said or 'it failed'}; see {log}"
    if status == STOPPED or said.startswith("harness: stopped"):
        problem = said.removeprefix("harness: ").removesuffix("; the same command goes on from there")
    else:
        problem = "its process died" + (f" by signal {-status}" if status is not None and status < 0 else "")
        problem += f" (out of memory?); see {log}"
    if job.attempt + 1 >= ATTEMPTS:
        return None, f"{problem}; {ATTEMPTS} attempts"
    return Job(job.planned, job.until, job.needs, job.attempt + 1), problem


def _conclude(job: Job, problem: str, notes: Path, seconds: float) -> Outcome:
    note, cell = notes / f"{job.planned.cell.name}.failed.json", job.planned.cell
    if not problem and not (job.planned.folder / "record.json").exists():
        problem = f"it left no record in {job.planned.folder}"
    if problem:
        write_atomic(note, json.dumps({"problem": problem, "cell": str(cell)}))
        return Outcome(cell, None, problem, seconds)
    note.unlink(missing_ok=True)
    return Outcome(cell, job.planned.folder, "", seconds)


def last_words(log: Path) -> str:
    """The last line in a log that says how it ended."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            lines = re.split(r"[\r\n]+", file.read().decode(errors="replace"))
    except OSError:
        return ""
    lines = [line.strip() for line in lines if line.strip()]
    ends = [line for line in lines if line.startswith(("harness: error:", "harness: stopped"))]
    return ends[-1] if ends else (lines[-1] if lines else "")


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """For a job: it is told its data and its runs folder, and is not one of the processes of what started it."""
    dropped = ("HARNESS_DATA", "HARNESS_RUNS", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in environment.items() if key not in dropped}


def visible_gpus() -> list[str]:
    """Names of the GPUs that may be handed out, without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in named.split(",") if each.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]


def _number_or_text(text: str) -> int | str:
    return int(text) if text.isdecimal() else text
