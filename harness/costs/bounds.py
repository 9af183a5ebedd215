"""What limits a training step on a GPU: its arithmetic, its memory traffic, or the host that launches the kernels.

The rule uses three numbers of a step; each of them can be computed from the columns of the profile:

* `device_busy`: the share of the step in which the device computes. The busy time is the union of the intervals of kernels,
  fills and copies on the device that torch's profiler records over a few steps. The time of the step is the median without
  the profiler, since the profiler slows the host down.
* The FLOPs of the step divided by its time, as a share of the measured rate of a convolution in the same precision.
* `of_bandwidth`: the bytes of the step divided by its time, as a share of the measured rate of a copy. Bytes are counted
  operator by operator: each input tensor is read once, each output or changed tensor is written once, and views move nothing.
  The count ignores kernels that read a tensor again and operators that are fused: it is what torch's operators would move if
  each of them were perfect.

A step whose device is idle for a share of more than `IDLE` is bound by `launch`: the host does not launch kernels fast enough.
Otherwise the larger of the other two shares names the bound, `compute` or `memory`. Where both are small, the step is far below
both ceilings: its kernels are slow, and a table of kernels (`torch.profiler`) tells which. Without a GPU there is no bound.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

IDLE = 0.25  # share of a step; a device that is idle for more is bound by `launch`
WATCHED = 2  # steps that the profiler records


@dataclass(frozen=True)
class WatchedStep:
    """A profiled step: seconds in which the device computes, and bytes that the operators read and write."""

    busy_seconds: float
    moved_bytes: int


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operators read and write, in forward and backward passes, in `total`."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operator and count its bytes."""
        named = kwargs or {}
        results = func(*args, **named)
        if "empty" in func._schema.name:
            return results
        inputs, outputs = _storages((args, named)), _storages(results)
        written = {key: size for key, size in outputs.items() if key not in inputs}
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_by_name(func._schema, named)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= _storages(value)
        # The outputs of a view are its inputs; a view moves nothing.
        if written or not outputs:
            self.total += sum(inputs.values()) + sum(written.values())
        return results


def _by_name(schema: Any, named: dict[str, Any]) -> list[tuple[Any, Any]]:
    """The arguments that are passed by name: (argument of the schema, value)."""
    return [(argument, named[argument.name]) for argument in schema.arguments if argument.name in named]


def _storages(values: Any) -> dict[int, int]:
    """Bytes of each tensor, by its storage; an expanded tensor counts only what its storage holds."""
    sizes = {}
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            sizes[storage._cdata] = min(value.numel() * value.element_size(), storage.nbytes())
    return sizes


def watch(step: Callable[[], None]) -> WatchedStep | None:
    """Profile a training step. Returns None without a GPU, or where the profiler records nothing on it."""
    if not torch.cuda.is_available():
        return None
    counter = ByteCounter()
    with counter:
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(WATCHED):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        # A step is forward, backward and update; the copy of the batch to the device is not part of it.
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Memcpy HtoD")
    ]
    if not spans:
        return None
    return WatchedStep(union(spans) * 1e-6 / WATCHED, counter.total)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """The length that the intervals cover together."""
    covered, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered


def judge(
    watched: WatchedStep | None, step_seconds: float, flops: float, convolution: float, copy: float
) -> dict[str, Any]:
    """`device_busy`, `of_bandwidth` and `bound` of a step; None, None and empty where the step was not profiled.

    Args:
        step_seconds: median time of the step without the profiler.
        flops: FLOPs of the step.
        convolution, copy: measured ceilings in FLOP/s and bytes/s.
    """
    if watched is None:
        return {"device_busy": None, "of_bandwidth": None, "bound": ""}
    # The profiler slows the host but not the kernels, so they cannot take longer than the whole step.
    busy = min(1.0, watched.busy_seconds / step_seconds)
    of_bandwidth = watched.moved_bytes / step_seconds / copy
    arithmetic = flops / step_seconds / convolution
    bound = "launch" if 1 - busy > IDLE else "compute" if arithmetic >= of_bandwidth else "memory"
    return {"device_busy": busy, "of_bandwidth": of_bandwidth, "bound": bound}
