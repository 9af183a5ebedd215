"""Advice after an out-of-memory error: the smaller settings that fit, found by trying them."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from harness.api.global_batch import BatchParts, batch_parts
from harness.api.settings import size_text
from harness.compute.layers import BatchNorm
from harness.training.trainer import Trainer


def explain_out_of_memory(stage: str, trainer: Trainer, data: Dataset[Any]) -> str:
    """A message with the settings that did not fit, and the first that do: micro-batches, bf16, fewer or smaller crops."""
    settings, parts = trainer.settings, trainer.parts
    tried = f"crops of {'x'.join(map(str, settings.crop))}, {settings.batch_size} a step, in {trainer.precision}"
    problem = f"{stage} does not fit the memory of {trainer.device} with {tried}"
    if parts.processes > 1:
        return f"{problem} on {parts.processes} processes: give --micro-batches 2, or more processes"
    for advice, options in _candidates(trainer):
        if _fits(trainer, data, *options):
            return f"{problem}; tried and found to fit: {advice.format(stage=stage)}"
    return f"{problem}, nor with a single crop of half the edges: choose a smaller network"


def _candidates(trainer: Trainer) -> Iterator[tuple[str, tuple[int, int, str, tuple[int, ...]]]]:
    """Advice, and the settings that it means: crops per step, micro-batches, precision, extent of the crop in voxels.

    Advice that does not change the result comes first.
    """
    settings, precision = trainer.settings, trainer.precision
    batch_size, crop = settings.batch_size, settings.crop
    # Micro-batches would change the result of batch norm, see `harness.training.trainer.refuse_batch_norm`.
    has_batch_norm = any(isinstance(layer, BatchNorm) for layer in trainer.inner.modules())
    for micro_batches in (n for n in (2, 4, 8, 16) if batch_size % n == 0 and not has_batch_norm):
        yield f"--micro-batches {micro_batches} (the same result)", (batch_size, micro_batches, precision, crop)
    if precision == "fp32":
        yield "--set {stage}.precision=bf16", (batch_size, 1, "bf16", crop)
    for fewer in sorted({batch_size // 2, 1} - {0, batch_size}, reverse=True):
        yield f"--set {{stage}}.batch_size={fewer}", (fewer, 1, precision, crop)
    half_crop = tuple(edge // 2 for edge in crop)
    for fewer in (batch_size, 1):
        half_text = size_text(half_crop)
        yield f"--set {{stage}}.crop={half_text} --set {{stage}}.batch_size={fewer}", (fewer, 1, precision, half_crop)


def _fits(
    trainer: Trainer, data: Any, batch_size: int, micro_batches: int, precision: str, crop: tuple[int, ...]
) -> bool:
    """Whether a forward and backward pass of the first micro-batch fits the memory; its gradients are dropped."""
    trainer.optimizer.zero_grad(set_to_none=True)
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    streams = {name: torch.Generator(trainer.device) for name in ("dropout", "method")}
    try:
        batch = default_collate([data[index] for index in range(batch_size // micro_batches)])
        moved = {name: _cut(value, crop).to(trainer.device) for name, value in batch.items()}
        with (
            batch_parts(BatchParts(micro_batches=micro_batches, streams=streams)),
            torch.autocast(trainer.device.type, torch.bfloat16, enabled=precision == "bf16"),
        ):
            terms = trainer.inner(moved)
            sum(term.float() for term in terms.values()).backward()
    # Besides too little memory: half a crop may be no multiple of the network's stride, and a loss that compares crops
    # needs more than one.
    except (RuntimeError, ValueError):
        return False
    finally:
        trainer.optimizer.zero_grad(set_to_none=True)
    return True


def _cut(value: torch.Tensor, crop: tuple[int, ...]) -> torch.Tensor:
    """A batch of volumes (N, C, x, y, z), cut to the extent `crop` in voxels; other tensors stay as they are."""
    if value.ndim != 5:
        return value
    x, y, z = crop
    return value[..., :x, :y, :z]
