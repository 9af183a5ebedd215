"""Start the jobs of a sweep in their order; start a job again that was killed from outside."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.sweeps.cells import Outcome, PlannedCell
from harness.sweeps.job import POLL, Job, Launcher, make_jobs
from harness.system.console import say
from harness.system.files import write_atomic
from harness.system.signals import STOPPED
from harness.system.status_file import Ending

ATTEMPTS = 4  # starts of a job that is killed from outside; a job that fails by itself is started once


def execute(todo: Sequence[PlannedCell], launcher: Launcher) -> Iterator[Outcome | None]:
    """Run the cells. Yields each outcome when it is there, and None after every check of the running jobs.

    A job that was killed from outside is started again and goes on from its checkpoint. For a cell that failed by itself,
    the reason is written to a file.
    """
    waiting, ended, running = make_jobs(todo), set[str](), dict[str, tuple[Job, float]]()
    failed_pretraining: dict[str, str] = {}
    while waiting or running:
        for group in _ready(waiting, running, ended, launcher):
            launcher.submit(group)
            running |= {job.name: (job, time.monotonic()) for job in group}
            waiting = [job for job in waiting if job not in group]
        for job, status in launcher.poll():
            _, began = running.pop(job.name)
            again, problem = outcome_of(job, status, launcher.ending(job), launcher.log(job))
            if again is not None:
                say(f"{job.name}: {problem}; it goes on from there (attempt {again.attempt + 1} of {ATTEMPTS})")
                waiting = [again, *(_needing(other, job, again) for other in waiting)]
                continue
            ended.add(job.name)
            if problem and job.until:
                failed_pretraining[job.name] = problem
            if not job.until:
                yield _conclude(job, problem, launcher.notes, time.monotonic() - began)
        for job in list(waiting):
            if job.needs is not None and job.needs.name in failed_pretraining:
                waiting.remove(job)
                yield _conclude(job, f"its pre-training: {failed_pretraining[job.needs.name]}", launcher.notes, 0.0)
        yield None
        time.sleep(POLL)


def _ready(
    waiting: Sequence[Job], running: Mapping[str, Any], ended: set[str], launcher: Launcher
) -> Iterator[list[Job]]:
    """The jobs that may be submitted now, in groups that need the same job; at most as many as there is room for."""
    room = launcher.room()
    groups: dict[str, list[Job]] = {}
    for job in waiting:
        ready = job.needs is None or job.needs.name in ended
        if launcher.handles_dependencies and job.needs is not None and job.needs.name in running:
            ready = True
        if ready:
            groups.setdefault(job.needs.name if job.needs else "", []).append(job)
    for group in groups.values():
        if room > 0:
            yield group[:room]
            room -= len(group[:room])


def _needing(job: Job, before: Job, again: Job) -> Job:
    """The same job; where it needed the job `before`, it needs `again` instead."""
    return replace(job, needs=again) if job.needs == before else job


def outcome_of(job: Job, status: int | None, ending: Ending | None, log: Path) -> tuple[Job | None, str]:
    """The job to start again, and the problem.

    Args:
        status: exit status of the job's process, negative for a signal; None where it is not known.
        ending: how the job ended, as it wrote it itself; None where it wrote nothing.
        log: the file that the job prints to.

    Returns:
        the job for its next attempt where it was killed from outside, else None; and what went wrong, empty for nothing.
    """
    if ending is None and status in (0, 2):
        # It ended by itself and wrote no ending: for instance a plugin called sys.exit. It would do the same again.
        return None, f"it ended with status {status} before its end; see {log}"
    if ending is None:
        problem = "its process died" + (f" by signal {-status}" if status is not None and status < 0 else "")
        problem += f" (out of memory?); see {log}"
    elif ending.status == STOPPED:
        problem = ending.message
    elif ending.status == 0:
        return None, ""
    else:
        return None, ending.message if ending.status == 2 else f"{ending.message}; see {log}"
    if job.attempt + 1 >= ATTEMPTS:
        return None, f"{problem}; {ATTEMPTS} attempts"
    return replace(job, attempt=job.attempt + 1), problem


def _conclude(job: Job, problem: str, notes: Path, seconds: float) -> Outcome:
    """The outcome of a cell. A failure is written to a file, so that the next sweep of this file does not repeat the cell."""
    note, cell = notes / f"{job.planned.cell.name}.failed.json", job.planned.cell
    if not problem and not (job.planned.folder / "record.json").exists():
        problem = f"it left no record in {job.planned.folder}"
    if problem:
        write_atomic(note, json.dumps({"problem": problem, "cell": str(cell)}))
        return Outcome(cell, None, problem, seconds)
    note.unlink(missing_ok=True)
    return Outcome(cell, job.planned.folder, "", seconds)
