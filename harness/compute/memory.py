"""Peak memory, and what is too large, known before it is allocated."""

import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch found too little memory; its CPU allocator has no class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_too_large(error: Exception) -> bool:
    """Whether torch refused a size: more than the memory, than a tensor or than a number of 64 bits can be."""
    if isinstance(error, RuntimeError) and is_out_of_memory(error):
        return True
    # A product of sizes that overflows may come out as a negative one.
    refused = any(word in str(error) for word in ("verflow", "non-negative", "negative dimension"))
    return (refused and isinstance(error, RuntimeError | TypeError)) or isinstance(error, OverflowError | MemoryError)


class _Linspace(TorchFunctionMode):
    """With values even where tensors have none: MONAI's Swin reads its drop rates off one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **({"device": "cpu"} if func is torch.linspace else {}), **(kwargs or {}))


def weights_bytes(build: Callable[[], nn.Module]) -> int:
    """Bytes of the weights that a module will have, without making them; 0 where it cannot be built so.

    Raises:
        RuntimeError, TypeError, OverflowError: torch refuses a size, see `is_too_large`.
    """
    try:
        with torch.device("meta"), _Linspace():
            module = build()
    # A plugin may need values to be built: whatever it raises then says nothing.
    except Exception as error:
        if is_too_large(error):
            raise
        return 0
    return sum(value.numel() * value.element_size() for value in (*module.parameters(), *module.buffers()))


def peak_memory(device: torch.device) -> dict[str, float | None]:
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
