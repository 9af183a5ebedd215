"""A cell of a sweep as a job, and what a launcher does with jobs."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harness.config.request import command
from harness.sweeps.cells import Planned

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


def own_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """For a job: it is told its data and its runs folder, and is not one of the processes of what started it."""
    dropped = ("HARNESS_DATA", "HARNESS_RUNS", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in environment.items() if key not in dropped}
