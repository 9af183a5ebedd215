"""Jobs in their order; what was killed from outside is started again."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.sweeps.cells import Outcome, Planned
from harness.sweeps.job import POLL, Job, Launcher, make_jobs
from harness.system.console import say
from harness.system.files import write_atomic
from harness.system.signals import STOPPED

ATTEMPTS = 4  # of a job that is killed from outside; what fails by itself is not tried again


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
            again, problem = outcome_of(job, status, launcher.log(job))
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


def outcome_of(job: Job, status: int | None, log: Path) -> tuple[Job | None, str]:
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
