"""The software versions, the hardware and the source revision that the record of a run states."""

import os
import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from harness.system.console import say
from harness.system.files import ENGINE


def describe_environment(device: torch.device) -> dict[str, Any]:
    """Software versions, hardware and source revision of this process, for the record of a run."""
    cuda = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "packages": {name: _version(name) for name in ("monai", "accelerate", "timm", "nibabel", "numpy", "scipy")},
        "harness": _version("ssl-seg-harness"),
        "git": git_state(),
    }


def git_state() -> dict[str, Any]:
    """`revision` of the source tree, and whether it is `dirty` (has uncommitted changes). Both are None outside a checkout."""
    root = ENGINE.parent

    def git(*words: str) -> str | None:
        """Output of a git command; None if it fails or takes more than 10 seconds."""
        try:
            done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package in site-packages may lie inside the checkout of another repository, whose state is not the package's.
    if not (root / "pyproject.toml").exists():
        return {"revision": None, "dirty": None}
    status = git("status", "--porcelain")
    return {"revision": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _version(package: str) -> str | None:
    """Version of an installed package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    """Model name of the CPU, or the best replacement that the platform offers."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


BUSY = 0.5
"""Load per core from which on a training that begins is told of other work."""


@cache
def advise_on_other_work() -> None:
    """Say what to do if other work uses the cores on which a first training begins. Nothing is said twice.

    The threads of one operation wait for each other. Where cores are shared, they wait for a core at every operation. The number
    of threads is not changed here: sums would be rounded in another order, and a seed would no longer fix a run.
    """
    threads, cores = torch.get_num_threads(), os.cpu_count() or 1
    if torch.cuda.is_available() or threads < 2 or "OMP_NUM_THREADS" in os.environ:
        return
    load = psutil.getloadavg()[0]  # of the last minute, in which this process has only been loading
    if load > BUSY * cores:
        free = max(1, int(cores - load))
        say(
            f"other work keeps this machine's {cores} cores busy (load {load:.1f}); trainings whose threads wait for each other "
            f"are several times slower: OMP_NUM_THREADS={free} before the command makes all of them faster"
        )
