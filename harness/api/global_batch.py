"""A global batch is divided into parts: among processes, which compute at the same time, and micro-batches, one after another.

The result of a run must not depend on how its batches are divided. All code that uses more than one crop at a time therefore
goes through this module: `gather` and `total` see the crops of all parts, and `rand` draws the random numbers of the global
batch and returns the rows of this part. Row i of micro-batch m on process r is crop (m * processes + r) * rows + i of the
global batch, where rows is the number of crops in a part.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed
from torch import Tensor, nn


@dataclass
class BatchParts:
    """How the batch of the current step is divided into parts, and which part is being computed.

    With several micro-batches, the training loop first runs the forward pass of each of them without gradients and records
    the arguments of `gather`. It then runs each micro-batch with gradients, and `gather` returns the recorded rows of the
    other micro-batches.

    Attributes:
        processes: number of parts that are computed at the same time, one per process.
        rank: index of this process.
        micro_batches: number of parts that each process computes one after another.
        micro_batch: index of the micro-batch that is being computed.
        recording: whether `gather` records its arguments, for the other micro-batches.
        recorded: the tensors recorded in the current pass: per micro-batch, one per call of `gather`, in the order of the
            calls.
        previous_records: the tensors recorded in the previous pass, in the same form; `gather` returns them for the other
            micro-batches.
        calls: number of calls of `gather` in the current forward pass.
        streams: purpose ("dropout" or "method") -> a generator that has the same state in all parts.
    """

    processes: int = 1
    rank: int = 0
    micro_batches: int = 1
    micro_batch: int = 0
    recording: bool = False
    recorded: list[list[Tensor]] = field(default_factory=list)
    previous_records: list[list[Tensor]] = field(default_factory=list)
    calls: int = 0
    streams: dict[str, torch.Generator] = field(default_factory=dict)

    @property
    def num_parts(self) -> int:
        """Number of parts of a global batch."""
        return self.processes * self.micro_batches

    @property
    def index(self) -> int:
        """Index of the part that this process is computing."""
        return self.micro_batch * self.processes + self.rank

    def begin(self, micro_batch: int, recording: bool = False) -> None:
        """Begin the forward pass of one micro-batch: the calls of `gather` are counted from 0 again."""
        self.micro_batch, self.recording, self.calls = micro_batch, recording, 0
        if recording:
            self.recorded.append([])


# This is no context variable, because backward passes on a GPU, which recompute checkpointed blocks, run in other threads.
_current = BatchParts()


@contextmanager
def batch_parts(parts: BatchParts) -> Iterator[None]:
    """Context manager: inside it, `gather`, `total`, `rand` and the others work on batches that are divided as `parts` says."""
    global _current
    previous_parts, _current = _current, parts
    try:
        yield
    finally:
        _current = previous_parts


def gather(values: Tensor) -> Tensor:
    """Rows (N, ...) of this part -> rows (parts * N, ...) of the global batch, in its order.

    Gradients flow to every part. A loss that is computed from the result must be the loss of the global batch, not that of
    this part's rows, because the harness averages the losses of the parts. The number and the order of the calls must be
    the same in every part, whatever the rows contain.
    """
    parts = _current
    if parts.num_parts == 1:
        return values
    rows = values
    if parts.processes > 1:
        rows = _Gather.apply(values, parts.rank)
    if parts.micro_batches == 1:
        return rows
    call, parts.calls = parts.calls, parts.calls + 1
    if parts.recording:
        parts.recorded[-1].append(rows.detach())
    if not parts.previous_records:
        # Nothing is known of the other micro-batches in the first recording pass: rows of the right shape replace theirs.
        return rows.repeat(parts.micro_batches, *(1,) * (rows.ndim - 1))
    batch = [rows_of_calls[call] for rows_of_calls in parts.previous_records]
    # The gradients of the micro-batches are averaged, but each of them is the gradient of the loss of the global batch for its
    # own rows only. It is therefore multiplied by their number.
    batch[parts.micro_batch] = _ScaleGradient.apply(rows, parts.micro_batches)
    return torch.cat(batch)


def total(value: Tensor) -> Tensor:
    """Sum of `value` over the parts, the same in all of them, with the shape of `value`.

    As with `gather`, a loss that is computed from the sum must be the loss of the global batch, and the number and the
    order of the calls must be the same in every part.
    """
    return value if _current.num_parts == 1 else gather(value[None]).sum(dim=0)


def previous(values: Tensor) -> Tensor:
    """Rows (N, ...) -> for each row, the previous row of the global batch (N, ...), without gradients.

    The row before the first one is the last one.
    """
    parts = _current
    last = gather(values[-1:].detach())
    return torch.cat([last[(parts.index - 1) % parts.num_parts][None], values[:-1].detach()])


def rand(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Random numbers, uniform in [0, 1): for each row, those that a process with the whole global batch would draw.

    Args:
        shape: (N, ...), where N is the number of crops in this part.
        device: the device of the result.
        generator: `Method.generator`; None draws from torch's default generator, as dropout does.
    """
    return _draw(torch.rand, shape, device, generator)


def randn(shape: Sequence[int], device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """Random numbers, normal with mean 0 and standard deviation 1; otherwise as `rand`."""
    return _draw(torch.randn, shape, device, generator)


def _draw(
    draw: Callable[..., Tensor], shape: Sequence[int], device: torch.device, generator: torch.Generator | None
) -> Tensor:
    parts = _current
    if parts.num_parts == 1:
        return draw(*shape, device=device, generator=generator)
    # Every part draws the numbers of the global batch, from a generator that has the same state in all of them.
    stream = parts.streams["dropout" if generator is None else "method"]
    drawn = draw(parts.num_parts * shape[0], *shape[1:], device=device, generator=stream)
    return drawn[parts.index * shape[0] : (parts.index + 1) * shape[0]]


class Dropout(nn.Module):
    """`torch.nn.Dropout` with draws from `rand`, so that the result does not depend on how a batch is divided.

    Args:
        p: probability that a value becomes 0.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, features: Tensor) -> Tensor:
        """(N, ...) -> the same shape; in evaluation mode the features are returned unchanged."""
        if not self.training or self.p == 0:
            return features
        mask = rand(features.shape, features.device) >= self.p
        return features * mask.to(features.dtype) / (1 - self.p)


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied by `times`."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, times: int) -> Tensor:
        """The same values."""
        ctx.times = times
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """The gradient, multiplied by `times`."""
        return slope * ctx.times, None


class _Gather(torch.autograd.Function):
    """Rows of all processes. The gradient of a process's rows is the sum of their gradients in all processes."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, rank: int) -> Tensor:
        """Rows (N, ...) of this process -> rows (processes * N, ...)."""
        ctx.rows = slice(rank * len(values), (rank + 1) * len(values))
        values = values.contiguous()
        gathered = [torch.empty_like(values) for _ in range(torch.distributed.get_world_size())]
        torch.distributed.all_gather(gathered, values)
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        """The gradient of all rows, summed over processes -> that of this process's rows."""
        slope = slope.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(slope)
        return slope[ctx.rows], None


class _Sum(torch.autograd.Function):
    """The sum over processes, of values in the forward pass and of gradients in the backward pass."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """The sum of the values of all processes."""
        summed = value.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        """The sum of the gradients of all processes."""
        slope = slope.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(slope)
        return slope


def all_reduce(value: Tensor) -> Tensor:
    """Sum of `value` over processes; its gradients are summed over processes, too.

    It is for values that every part goes on to compute with, such as the moments of batch norm.
    """
    if _current.processes == 1:
        return value
    summed: Tensor = _Sum.apply(value)
    return summed


def num_processes() -> int:
    """Number of parts of a batch that are computed at the same time, one per process."""
    return _current.processes
