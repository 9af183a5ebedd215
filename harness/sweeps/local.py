"""Launcher: processes of this machine."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.sweeps.job import Job, Launcher, job_environment


class Local(Launcher):
    """At most `jobs` jobs at a time on this machine; GPUs are handed out in turn."""

    def __init__(self, notes: Path, processes: int, jobs: int) -> None:
        super().__init__(notes, processes)
        self.jobs, self.gpus = jobs, visible_gpus()
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

    def room(self) -> int:
        """Slots that are free."""
        return self.jobs - len(self.running)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Start each of the jobs in a free slot."""
        for job in jobs:
            slot = next(number for number in range(self.jobs) if number not in self.running)
            self.status_file(job).unlink(missing_ok=True)
            environment = job_environment(os.environ, self.status_file(job))
            cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // (self.jobs * self.processes))))
            if self.gpus:
                numbers = range(slot * self.processes, (slot + 1) * self.processes)
                environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus[n % len(self.gpus)] for n in numbers)
            with self.log(job).open("ab") as log:
                # In a session of its own, so that Ctrl-C reaches it once, through `stop`.
                process = subprocess.Popen(
                    job.words(self.processes), stdout=log, stderr=log, env=environment, start_new_session=True
                )
            self.running[slot] = job, process

    def poll(self) -> list[tuple[Job, int | None]]:
        """Jobs whose processes ended, with their exit status."""
        statuses = {slot: (job, process.poll()) for slot, (job, process) in self.running.items()}
        ended = {slot: each for slot, each in statuses.items() if each[1] is not None}
        for slot in ended:
            del self.running[slot]
        return list(ended.values())

    def stop(self) -> str:
        """Ask all jobs to stop, and wait until they have."""
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.wait()
        return "its jobs have written checkpoints"


def visible_gpus() -> list[str]:
    """Names of the GPUs that may be handed out, without importing torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [each for each in named.split(",") if each.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(listed.splitlines()) if line.startswith("GPU")]
