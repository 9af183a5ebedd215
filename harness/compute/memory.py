"""Peak memory, the errors of too little memory, and the size of a model before it is built."""

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from harness.system.console import say_once
from harness.system.errors import UserError

if sys.platform != "win32":
    import resource


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether the error means too little memory. Torch's CPU allocator has no class of its own for it, only a message."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_too_large(error: Exception) -> bool:
    """Whether torch refused a size: one that exceeds the memory, the largest tensor, or a number of 64 bits."""
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return True
    # A product of sizes that overflows may become negative.
    refused = any(word in str(error) for word in ("verflow", "non-negative", "negative dimension"))
    return (refused and isinstance(error, RuntimeError | TypeError)) or isinstance(error, OverflowError | MemoryError)


class _Linspace(TorchFunctionMode):
    """Mode in which `torch.linspace` makes tensors with values, even on the device "meta", whose tensors have none.

    MONAI's Swin transformer reads its drop rates from such a tensor.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call `func`, on the CPU if it is `torch.linspace`."""
        return func(*args, **({"device": "cpu"} if func is torch.linspace else {}), **(kwargs or {}))


def weights_bytes(build: Callable[[], nn.Module]) -> int:
    """Size of a module's parameters and buffers in bytes, computed without allocating them.

    It is 0 for a module that cannot be built without values.

    Args:
        build: returns the module.

    Raises:
        RuntimeError, TypeError, OverflowError, MemoryError: torch refuses a size, see `is_too_large`.
    """
    try:
        with torch.device("meta"), _Linspace():
            module = build()
    # A plugin may need values to build its module. An error that it raises here therefore says nothing about its size.
    except Exception as error:
        if is_too_large(error):
            raise
        return 0
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


SHARED = Path("/dev/shm")
LONGEST_SOCKET = 107  # bytes of the path of a Unix socket
LISTENER = len("/pymp-12345678/listener-12345678")  # what Python adds to the folder for temporary files
PREFETCHED = 2
"""Number of batches that each loader process makes in advance; the default of PyTorch."""


def workers_that_fit(sample: Mapping[str, Any], rows: int, wanted: int) -> int:
    """The number of loader processes whose batches fit the memory that processes share; says so if it is fewer than wanted.

    Docker gives 64 MB of it unless told otherwise, and a loader process that finds it full dies without a reason.

    Args:
        sample: arrays by name.
        rows: number of samples in a batch.

    Raises:
        UserError: the folder for temporary files has too long a name for their sockets.
    """
    if not wanted or not SHARED.is_dir():
        return wanted
    folder, most = tempfile.gettempdir(), LONGEST_SOCKET - LISTENER
    if (length := len(os.fsencode(folder))) > most:
        # A loader process that cannot make its socket says nothing, and the run would wait for it without end.
        raise UserError(
            f"TMPDIR={folder[:60]}... has {length} bytes, {most} is the most for the sockets of loader processes: set a "
            "shorter one, or give --set pretrain.workers=0 --set finetune.workers=0"
        )
    batch = rows * sum(np.asarray(value).nbytes for value in sample.values())
    free = shutil.disk_usage(SHARED).free
    fitting = min(wanted, int(0.9 * free / (PREFETCHED + 1) / max(1, batch)))
    if fitting < wanted:
        say_once(
            f"{SHARED} has {free / 2**20:.0f} MiB free: {fitting} instead of {wanted} loader processes, with batches of "
            f"{batch / 2**20:.0f} MiB; more with `docker run --shm-size=8g`"
        )
    return fitting


def peak_memory(device: torch.device) -> dict[str, float | None]:
    """Peak memory so far, in GiB, of this process and of the device.

    The second one is None for a device that has no memory of its own.
    """
    peak = _host_peak_gib()
    on_device = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"host_peak_gib": round(peak, 3), "device_peak_gib": on_device}


def _host_peak_gib() -> float:
    """Peak memory of this process in GiB.

    On Linux it is read from /proc, because `ru_maxrss` of getrusage starts from the peak of the parent process there.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20
    except (OSError, StopIteration):
        if sys.platform == "win32":
            return float(psutil.Process().memory_info().peak_wset / 2**30)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2**30 if sys.platform == "darwin" else 2**20)
