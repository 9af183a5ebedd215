"""What holds a training step back on a GPU: its arithmetic, its memory, or the host that launches it.

The rule, from three numbers of a step, each of which can be had from the profile's columns:

* `device_busy`: the share of the step in which the device computes. Busy time is the union of the intervals of kernels, fills and
  copies on the device that torch's profiler sees over a few steps; the step's own time is the unwatched median, since watching
  slows the host down.
* FLOPs of the step over its time, as a share of the measured convolution's rate in its precision.
* `of_bandwidth`: bytes of the step over its time, as a share of the measured copy's rate. Bytes are counted operator by
  operator: each tensor that it takes is read once, each that it gives or changes is written once, views move nothing. Kernels
  that read again, and operators that are fused, are not told: it is what torch's operators would move if each were perfect.

A step whose device idles for more than `IDLE` of it is bound by `launch`: the host does not hand work over fast enough.
Otherwise the larger of the two shares names it, `compute` or `memory`. Where both are small, the step is nearer to that ceiling
than to the other and yet far below it: its kernels are slow, and a table of them (`torch.profiler`) says which. Where no GPU is
there, nothing is said.
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

IDLE = 0.25


WATCHED = 2  # steps


@dataclass(frozen=True)
class WatchedStep:
    """A step, watched: seconds that the device computes, and bytes that its operators take and give."""

    busy_seconds: float
    moved_bytes: int


class ByteCounter(TorchDispatchMode):
    """Counts the bytes that operators read and write; backward passes are counted as well."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """One operator."""
        named = kwargs or {}
        found = func(*args, **named)
        if "empty" in func._schema.name:
            return found
        given, made = _storages((args, named)), _storages(found)
        written = {key: size for key, size in made.items() if key not in given}
        for argument, value in [*zip(func._schema.arguments, args, strict=False), *_by_name(func._schema, named)]:
            if argument.alias_info is not None and argument.alias_info.is_write:
                written |= _storages(value)
        # A view gives what it was given, and moves nothing.
        if written or not made:
            self.total += sum(given.values()) + sum(written.values())
        return found


def _by_name(schema: Any, named: dict[str, Any]) -> list[tuple[Any, Any]]:
    """Arguments that an operator is given by name."""
    return [(argument, named[argument.name]) for argument in schema.arguments if argument.name in named]


def _storages(values: Any) -> dict[int, int]:
    """Bytes of each tensor, by the storage that it lies in; what is expanded lies there once."""
    found = {}
    for value in tree_leaves(values):
        if isinstance(value, Tensor):
            storage = value.untyped_storage()
            found[storage._cdata] = min(value.numel() * value.element_size(), storage.nbytes())
    return found


def watch(step: Callable[[], None]) -> WatchedStep | None:
    """A step of the training, several times; None where no GPU is there or its profiler says nothing."""
    if not torch.cuda.is_available():
        return None
    counter = ByteCounter()
    with counter:
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for _ in range(WATCHED):
            step()
        torch.cuda.synchronize()
    spans = [
        (event.time_range.start, event.time_range.end)
        for event in seen.events() or ()
        # A step is forward, backward and update; its batch is there already.
        if event.device_type == DeviceType.CUDA and not event.name.startswith("Memcpy HtoD")
    ]
    if not spans:
        return None
    return WatchedStep(union(spans) * 1e-6 / WATCHED, counter.total)


def union(spans: Iterable[tuple[float, float]]) -> float:
    """Length of what intervals cover together."""
    covered, last = 0.0, float("-inf")
    for start, end in sorted(spans):
        covered += max(0.0, end - max(start, last))
        last = max(last, end)
    return covered


def judge(
    watched: WatchedStep | None, step_seconds: float, flops: float, convolution: float, copy: float
) -> dict[str, Any]:
    """`device_busy`, `of_bandwidth` and `bound` of a step; None, None and empty where nothing was watched.

    Args:
        step_seconds: median of the step, unwatched.
        flops: of the step.
        convolution, copy: measured ceilings, FLOP/s and bytes/s.
    """
    if watched is None:
        return {"device_busy": None, "of_bandwidth": None, "bound": ""}
    # WatchedStep, the host is slower and kernels are not: they cannot take longer than the whole step.
    busy = min(1.0, watched.busy_seconds / step_seconds)
    of_bandwidth = watched.moved_bytes / step_seconds / copy
    arithmetic = flops / step_seconds / convolution
    bound = "launch" if 1 - busy > IDLE else "compute" if arithmetic >= of_bandwidth else "memory"
    return {"device_busy": busy, "of_bandwidth": of_bandwidth, "bound": bound}
