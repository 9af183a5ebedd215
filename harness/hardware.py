"""What the machine is and what it is good at."""

import ctypes
import os
import platform
import resource
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness.errors import UserError


def computes_in_bf16(device: torch.device) -> bool:
    """Whether bf16 is native and right there.

    Emulated (AVX2), it is tens of times slower than fp32. With AVX-512 bf16 but without AMX, the weight gradient of a
    convolution over two voxels along an axis, the deepest features of small crops, reads memory that was never written:
    wrong by any amount and different each time (torch 2.14.1, seen on an EPYC). `harness.layers.Conv3d` computes those in
    fp32, so that bf16 can be asked for; by itself it is chosen with AMX only.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # No public query exists yet.
        return bool(torch.cpu._is_amx_tile_supported())
    return False


def precision(wanted: str, device: torch.device) -> str:
    """`auto`, `fp32` or `bf16` -> what is used on this device. Raises UserError for a launcher's other precision."""
    if wanted != "auto":
        return wanted
    # `accelerate launch --mixed_precision`; "no" is what it says where nobody asked.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise UserError(f"--mixed_precision {launched}: launch with bf16 or no, or --set pretrain.precision=fp32")
    if launched == "bf16":
        return "bf16"
    return "bf16" if computes_in_bf16(device) else "fp32"


KEEP_MEMORY = "HARNESS_KEEP_MEMORY"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


@cache
def keep_memory() -> bool:
    """Have freed memory kept by the process for the next step, instead of being given back and cleared again.

    glibc hands every tensor above 32 MiB back to the system when it is freed, and a step spends up to half of its time
    on having the next ones cleared (docs/speed.md). HARNESS_KEEP_MEMORY=0 leaves the allocator as it is; elsewhere than on
    glibc nothing is done. Returns whether memory is kept.
    """
    if os.environ.get(KEEP_MEMORY) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    done = [mallopt(*each) for each in settings]
    return all(done)


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and hardware of a run, for its record."""
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


def memory(device: torch.device) -> dict[str, float | None]:
    """Peak memory so far in GiB: of this process, and of the device where it has memory of its own."""
    peak = _host_peak_gib()
    on_device = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"host_peak_gib": round(peak, 3), "device_peak_gib": on_device}


def _host_peak_gib() -> float:
    """Of this process alone: what getrusage says begins, on Linux, with the memory of the process that started this one."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)


def git_state() -> dict[str, Any]:
    """Revision of the source tree and whether it has uncommitted changes; both None outside a checkout."""
    root = Path(__file__).resolve().parent.parent

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", root, *words], capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # A package that lies in site-packages below some other repository is not that repository.
    if not (root / "pyproject.toml").exists():
        return {"revision": None, "dirty": None}
    status = git("status", "--porcelain")
    return {"revision": git("rev-parse", "HEAD"), "dirty": None if status is None else bool(status)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
