"""Jobs in their order; what was killed from outside is started again."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from harness.sweeps.cells import Outcome, Planned
from harness.sweeps.job import POLL, Job, Launcher, make_jobs
from harness.system.console import say
from harness.system.files import write_atomic
from harness.system.signals import STOPPED
from harness.system.status_file import Ending

ATTEMPTS = 4  # of a job that is killed from outside; one that fails by itself is not started again


def execute(todo: Sequence[Planned], launcher: Launcher) -> Iterator[Outcome | None]:
    """Run the cells; outcomes as they come, and None now and then in between.

    A job that is killed from outside goes on from its checkpoint; one that fails by itself is noted, with its reason.
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
            again, problem = outcome_of(job, status, launcher.ending(job), launcher.log(job))
            if again is not None:
                say(f"{job.name}: {problem}; it goes on from there (attempt {again.attempt + 1} of {ATTEMPTS})")
                waiting = [again, *(_needing(other, job, again) for other in waiting)]
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
        ready = job.needs is None or job.needs.name in ended
        if launcher.waits_itself and job.needs is not None and job.needs.name in running:
            ready = True
        if ready:
            groups.setdefault(job.needs.name if job.needs else "", []).append(job)
    for group in groups.values():
        if room > 0:
            yield group[:room]
            room -= len(group[:room])


def _needing(job: Job, before: Job, again: Job) -> Job:
    """The job, needing `again` where it needed `before`."""
    return replace(job, needs=again) if job.needs == before else job


def outcome_of(job: Job, status: int | None, ending: Ending | None, log: Path) -> tuple[Job | None, str]:
    """The job once more where it was killed from outside, and what went wrong; empty where nothing did.

    Args:
        status: of its process, negative for a signal; None where nobody knows it.
        ending: as the command itself wrote it at its end.
    """
    if ending is None and status in (0, 2):
        # It left by itself without a word: a plugin that calls sys.exit, say. Once more it would do the same.
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
    """The outcome of a cell; a failure is noted, so that the next sweep of this file does not repeat it."""
    note, cell = notes / f"{job.planned.cell.name}.failed.json", job.planned.cell
    if not problem and not (job.planned.folder / "record.json").exists():
        problem = f"it left no record in {job.planned.folder}"
    if problem:
        write_atomic(note, json.dumps({"problem": problem, "cell": str(cell)}))
        return Outcome(cell, None, problem, seconds)
    note.unlink(missing_ok=True)
    return Outcome(cell, job.planned.folder, "", seconds)
