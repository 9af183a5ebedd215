"""A launcher that runs jobs as processes of this machine."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from harness.sweeps.job import Job, Launcher, job_environment


class Local(Launcher):
    """Runs at most `jobs` jobs at a time on this machine, and assigns the GPUs to them in turn."""

    def __init__(self, notes: Path, processes: int, jobs: int) -> None:
        super().__init__(notes, processes)
        self.jobs, self.gpus = jobs, visible_gpus()
        self.running: dict[int, tuple[Job, subprocess.Popen[bytes]]] = {}

    def room(self) -> int:
        """The number of free slots."""
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
                # The process gets its own session, so that Ctrl-C reaches it only once, through `stop`.
                process = subprocess.Popen(
                    job.words(self.processes), stdout=log, stderr=log, env=environment, start_new_session=True
                )
            self.running[slot] = job, process

    def poll(self) -> list[tuple[Job, int | None]]:
        """The jobs whose processes ended, with their exit statuses."""
        statuses = {slot: (job, process.poll()) for slot, (job, process) in self.running.items()}
        ended = {slot: (job, status) for slot, (job, status) in statuses.items() if status is not None}
        for slot in ended:
            del self.running[slot]
        return list(ended.values())

    def stop(self) -> str:
        """Send SIGTERM to all jobs, and wait until they have ended."""
        for _, process in self.running.values():
            process.terminate()
        for _, process in self.running.values():
            process.wait()
        return "its jobs have written checkpoints"


def visible_gpus() -> list[str]:
    """Names of the GPUs that jobs may use. Read without importing torch, which takes seconds."""
    variable = os.environ.get("CUDA_VISIBLE_DEVICES")
    if variable is not None:
        return [name for name in variable.split(",") if name.strip()]
    if shutil.which("nvidia-smi") is None:
        return []
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
    return [str(number) for number, line in enumerate(listing.splitlines()) if line.startswith("GPU")]
