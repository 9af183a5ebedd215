"""After an out-of-memory error: which smaller settings fit, found by trying them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from harness.api.global_batch import BatchParts, batch_parts
from harness.compute.layers import BatchNorm
from harness.training.trainer import Trainer


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
            batch_parts(BatchParts(micro_batches=in_turn, streams=streams)),
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
