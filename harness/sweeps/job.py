"""Jobs of a sweep, and the interface of the launchers that run them."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.request import command
from harness.sweeps.cells import PlannedCell
from harness.system.status_file import VARIABLE, Ending, read_ending

POLL = 0.2  # seconds between two checks of the running jobs


@dataclass(frozen=True)
class Job:
    """A cell, or a pre-training that several cells share, as a command in one process or in several.

    Attributes:
        planned: the cell; of several cells that share a pre-training, the first.
        until: the stage after which the job ends; empty: it is a whole run.
        needs: the job that has to end before this one starts.
        attempt: how often the job was started before.
    """

    planned: PlannedCell
    until: str = ""
    needs: "Job | None" = None
    attempt: int = 0

    @property
    def name(self) -> str:
        """The job's name in the names of files and in queues."""
        return f"{self.planned.cell.name}{'-' if self.until else ''}{self.until}"

    def words(self, processes: int) -> list[str]:
        """The command line, with torchrun where several processes share the job."""
        start = [sys.executable, "-m", "harness"]
        if processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            start = [sys.executable, "-m", *torchrun, "-m", "harness"]
        until = ["--until", self.until] if self.until else []
        return [*start, *command(self.planned.cell.request)[1:], *until]


def make_jobs(todo: Sequence[PlannedCell]) -> list[Job]:
    """The jobs of the cells, in their order. An unfinished pre-training that several cells share is a job before the first one.

    So results come while later cells are still pre-trained.
    """
    sharing: dict[Path, list[PlannedCell]] = {}
    for planned in todo:
        if planned.pretrain is not None and not (planned.pretrain / "stage.json").exists():
            sharing.setdefault(planned.pretrain, []).append(planned)
    shared_jobs = {path: Job(cells[0], until="pretrain") for path, cells in sharing.items() if len(cells) > 1}
    jobs: list[Job] = []
    for planned in todo:
        shared = shared_jobs.get(planned.pretrain) if planned.pretrain else None
        if shared is not None and shared not in jobs:
            jobs.append(shared)
        jobs.append(Job(planned, needs=shared))
    return jobs


class Launcher(ABC):
    """Runs jobs somewhere.

    A job writes what it prints to `NAME.log`, and how it ended to `NAME.status.json`, in the folder `notes`.

    Args:
        processes: number of processes that share a job.
    """

    handles_dependencies = False
    """Whether the launcher itself holds a job back until the job that it needs has ended."""

    def __init__(self, notes: Path, processes: int) -> None:
        self.notes, self.processes = notes, processes
        notes.mkdir(parents=True, exist_ok=True)

    @abstractmethod
    def room(self) -> int:
        """How many jobs may be submitted now."""

    @abstractmethod
    def submit(self, jobs: Sequence[Job]) -> None:
        """Start these jobs; all of them need the same other job, or none."""

    @abstractmethod
    def poll(self) -> list[tuple[Job, int | None]]:
        """The jobs that ended since the last call, with the exit status of their process; None where it is not known."""

    @abstractmethod
    def stop(self) -> str:
        """Called when the sweep ends before its jobs. Returns in words what becomes of them."""

    def log(self, job: Job) -> Path:
        """The file that a job prints to."""
        return self.notes / f"{job.name}.log"

    def status_file(self, job: Job) -> Path:
        """The file in which a job says how it ended."""
        return self.notes / f"{job.name}.status.json"

    def ending(self, job: Job) -> Ending | None:
        """How a job ended, as the job itself wrote it; None where it was killed before it could write that."""
        return read_ending(self.status_file(job))


def job_environment(environment: Mapping[str, str], status_file: Path) -> dict[str, str]:
    """The environment variables of a job: those of the sweep, and the name of the job's status file.

    The variables that set data, runs folder or processes of the sweep are dropped: the job's command line sets these.
    """
    dropped = ("HARNESS_DATA", "HARNESS_RUNS", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in environment.items() if key not in dropped} | {
        VARIABLE: str(status_file.resolve())
    }
