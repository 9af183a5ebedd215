"""One global batch, dealt out in parts: over processes at the same time, over micro-batches one after the other.

A run's result must not depend on how its batches are dealt out, so whatever looks at more than one crop goes through this
module: `gather` and `total` see the crops of all parts, `rand` draws for all of them and keeps the rows of this one. Row i of
micro-batch m on process r is crop (m * processes + r) * rows + i of the global batch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed
from torch import Tensor, nn


@dataclass
class BatchParts:
    """How the batch of the current step is dealt out, and which part is being computed.

    Attributes:
        number: parts of a global batch.
        mine: the current part.
        processes, rank: parts that are computed at the same time, and which of them this process computes.
        recording: what `gather` is given is kept, for the other micro-batches.
        recorded: per micro-batch, what its calls of `gather` were given, in their order.
        known: what was recorded before, and is given to the other micro-batches now.
        streams: generators that all parts draw from alike, by purpose.
    """

    processes: int = 1
    rank: int = 0
    micro_batches: int = 1
    micro_batch: int = 0
    recording: bool = False
    recorded: list[list[Tensor]] = field(default_factory=list)
    known: list[list[Tensor]] = field(default_factory=list)
    calls: int = 0
    streams: dict[str, torch.Generator] = field(default_factory=dict)

    @property
    def number(self) -> int:
        return self.processes * self.micro_batches

    @property
    def mine(self) -> int:
        return self.micro_batch * self.processes + self.rank

    def begin(self, micro_batch: int, recording: bool = False) -> None:
        """The forward pass of one micro-batch begins, with its draws and calls from the start."""
        self.micro_batch, self.recording, self.calls = micro_batch, recording, 0
        if recording:
            self.recorded.append([])


# Not a context variable: backward passes on a GPU, which recompute checkpointed blocks, have threads of their own.
_current = BatchParts()


@contextmanager
def batch_parts(parts: BatchParts) -> Iterator[None]:
    """Within it, `gather`, `total` and `rand` work on batches that are dealt out so."""
    global _current
    before, _current = _current, parts
    try:
        yield
    finally:
        _current = before


def gather(values: Tensor) -> Tensor:
    """Rows (N, ...) of this part -> rows (parts * N, ...) of the whole batch, in their order; gradients flow to every part.

    A loss that is computed from what this gives must be the loss of the whole batch, not of this part's rows: parts are
    averaged. It is called as often, and in the same order, whatever the rows hold.
    """
    parts = _current
    if parts.number == 1:
        return values
    together = values
    if parts.processes > 1:
        together = _Gather.apply(values, parts.rank)
    if parts.micro_batches == 1:
        return together
    call, parts.calls = parts.calls, parts.calls + 1
    if parts.recording:
        parts.recorded[-1].append(together.detach())
    if not parts.known:
        # Of the right shape, until it is known.
        return together.repeat(parts.micro_batches, *(1,) * (together.ndim - 1))
    every = [kept[call] for kept in parts.known]
    # The gradients of micro-batches are averaged, and each of them has the whole loss's: hence as many times its own.
    every[parts.micro_batch] = _ScaleGradient.apply(together, parts.micro_batches)
    return torch.cat(every)


def total(value: Tensor) -> Tensor:
    """Sum of `value` over the parts, the same on all of them; as for `gather`, for a loss of the whole batch."""
    return value if _current.number == 1 else gather(value[None]).sum(dim=0)


def previous(values: Tensor) -> Tensor:
    """Rows (N, ...) -> to each row the one before it in the whole batch, to the first the last; no gradients."""
    parts = _current
    last = gather(values[-1:].detach())
    return torch.cat([last[(parts.mine - 1) % parts.number][None], values[:-1].detach()])


def rand(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Uniform in [0, 1), (N, ...): row by row what a process that has the whole batch would draw.

    Args:
        generator: of the method; None: torch's own, as dropout.
    """
    return _draw(torch.rand, shape, device, generator)


def randn(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Normal with mean 0 and deviation 1, (N, ...), as `rand`."""
    return _draw(torch.randn, shape, device, generator)


def _draw(
    draw: Callable[..., Tensor], shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    parts = _current
    if parts.number == 1:
        return draw(*shape, device=device, generator=generator)
    # Every part draws for the whole batch, from a stream that all of them share.
    stream = parts.streams["dropout" if generator is None else "method"]
    drawn = draw(parts.number * shape[0], *shape[1:], device=device, generator=stream)
    return drawn[parts.mine * shape[0] : (parts.mine + 1) * shape[0]]


class Dropout(nn.Module):
    """`torch.nn.Dropout` that draws row by row, so that it does not depend on how a batch is dealt out."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, features: Tensor) -> Tensor:
        """(N, ...) -> the same shape; in evaluation as it came."""
        if not self.training or self.p == 0:
            return features
        kept = rand(features.shape, features.device) >= self.p
        return features * kept.to(features.dtype) / (1 - self.p)


class _ScaleGradient(torch.autograd.Function):
    """The same values, with so many times the gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, times: int) -> Tensor:
        ctx.times = times
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope * ctx.times, None


class _Gather(torch.autograd.Function):
    """Rows of all processes; the gradient of each one's rows is the sum of what all of them make of those."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rank: int) -> Tensor:
        ctx.rows = slice(rank * len(values), (rank + 1) * len(values))
        values = values.contiguous()
        together = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(together, values)
        return torch.cat(together)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        slope = slope.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(slope)
        return slope[ctx.rows], None


class _Sum(torch.autograd.Function):
    """The sum over processes, forward and backward."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        summed = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        slope = slope.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(slope)
        return slope


def all_reduce(value: Tensor) -> Tensor:
    """Sum over processes, gradients summed likewise: for what every part computes with, such as batch norm's moments."""
    if _current.processes == 1:
        return value
    summed: Tensor = _Sum.apply(value)
    return summed


def processes() -> int:
    """Parts that are computed at the same time."""
    return _current.processes
