"""What would fit the memory: weights before they are made, and once a step did not fit, what was tried and did."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset, default_collate

from harness.layers import BatchNorm
from harness.parts import Parts, dealt
from harness.training import Trainer


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


def explain_out_of_memory(stage: str, trainer: Trainer, data: Dataset[Any]) -> str:
    """What did not fit, and the first settings that do: in smaller parts, in bf16, or with smaller crops."""
    settings, parts = trainer.settings, trainer.parts
    has = f"crops of {'x'.join(map(str, settings.crop))}, {settings.batch_size} a step, in {trainer.precision}"
    told = f"{stage} does not fit the memory of {trainer.device} with {has}"
    if parts.processes > 1:
        return f"{told} on {parts.processes} processes: give --micro-batches 2, or more processes"
    for advice, options in _candidates(trainer):
        if _fits(trainer, data, *options):
            return f"{told}; tried and found to fit: {advice.format(stage=stage)}"
    return f"{told}, nor with a single crop of half the edges: choose a smaller network"


def _candidates(trainer: Trainer) -> Iterator[tuple[str, tuple[int, int, str, tuple[int, ...]]]]:
    """Advice, and what it means: crops a step, micro-batches, precision, crop. What leaves the result as it is comes first."""
    settings, precision = trainer.settings, trainer.precision
    number, whole = settings.batch_size, settings.crop
    # Not for batch norm, see `harness.training.refuse_batch_norm`.
    whole_only = any(isinstance(layer, BatchNorm) for layer in trainer.inner.modules())
    for in_turn in (n for n in (2, 4, 8, 16) if number % n == 0 and not whole_only):
        yield f"--micro-batches {in_turn} (the same result)", (number, in_turn, precision, whole)
    if precision == "fp32":
        yield "--set {stage}.precision=bf16", (number, 1, "bf16", whole)
    for fewer in sorted({number // 2, 1} - {0, number}, reverse=True):
        yield f"--set {{stage}}.batch_size={fewer}", (fewer, 1, precision, whole)
    half = tuple(edge // 2 for edge in whole)
    for fewer in (number, 1):
        crop = ",".join(map(str, half))
        yield f"--set {{stage}}.crop={crop} --set {{stage}}.batch_size={fewer}", (fewer, 1, precision, half)


def _fits(trainer: Trainer, data: Any, number: int, in_turn: int, precision: str, crop: tuple[int, ...]) -> bool:
    """One forward and backward pass of the first micro-batch, of which nothing is kept."""
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    streams = {name: torch.Generator(trainer.device) for name in ("dropout", "method")}
    try:
        batch = default_collate([data[place] for place in range(number // in_turn)])
        moved = {name: _cut(value, crop).to(trainer.device) for name, value in batch.items()}
        with (
            dealt(Parts(micro_batches=in_turn, streams=streams)),
            torch.autocast(trainer.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            terms = trainer.inner(moved)
            sum(term.float() for term in terms.values()).backward()
    # Too little memory; or half a crop is no multiple of what the network needs, one crop too few to compare.
    except (RuntimeError, ValueError):
        return False
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
    return True


def _cut(value: torch.Tensor, crop: tuple[int, ...]) -> torch.Tensor:
    if value.ndim != 5:
        return value
    x, y, z = crop
    return value[..., :x, :y, :z]
