"""A cell of a sweep as a job, and what a launcher does with jobs."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.request import command
from harness.sweeps.cells import Planned
from harness.system.status_file import VARIABLE, Ending, read_ending

POLL = 0.2  # seconds between looks at what runs


@dataclass(frozen=True)
class Job:
    """A command in a process of its own, or several that share it: a cell, or the pre-training that several cells share.

    Attributes:
        until: the stage after which it ends; empty: a whole run.
        needs: the job that has to end before this one begins.
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
        """The command line."""
        start = [sys.executable, "-m", "harness"]
        if processes > 1:
            torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
            start = [sys.executable, "-m", *torchrun, "-m", "harness"]
        until = ["--until", self.until] if self.until else []
        return [*start, *command(self.planned.cell.request)[1:], *until]


def make_jobs(todo: Sequence[Planned]) -> list[Job]:
    """Jobs of the cells. A pre-training that several cells share, and that is not finished, is a job before them."""
    sharing: dict[Path, list[Planned]] = {}
    for each in todo:
        if each.pretrain is not None and not (each.pretrain / "stage.json").exists():
            sharing.setdefault(each.pretrain, []).append(each)
    first = {path: Job(cells[0], until="pretrain") for path, cells in sharing.items() if len(cells) > 1}
    return [*first.values(), *(Job(each, needs=first.get(each.pretrain) if each.pretrain else None) for each in todo)]


class Launcher(ABC):
    """Where jobs run. What a job prints goes to `NAME.log` in `notes`, how it ended to `NAME.status.json`."""

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
        """Jobs that ended, with the exit status of the process; None where nobody knows it."""

    @abstractmethod
    def stop(self) -> str:
        """The sweep ends before its jobs; says what becomes of them."""

    def log(self, job: Job) -> Path:
        """The file with what a job prints."""
        return self.notes / f"{job.name}.log"

    def status_file(self, job: Job) -> Path:
        """The file in which a job says how it ended."""
        return self.notes / f"{job.name}.status.json"

    def ending(self, job: Job) -> Ending | None:
        """How a job ended, in its own words; None where it was killed before it could say so."""
        return read_ending(self.status_file(job))


def job_environment(environment: Mapping[str, str], status_file: Path) -> dict[str, str]:
    """The environment of a job: without what the sweep was told by it, which the command line of the job says."""
    dropped = ("HARNESS_DATA", "HARNESS_RUNS", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in environment.items() if key not in dropped} | {
        VARIABLE: str(status_file.resolve())
    }
