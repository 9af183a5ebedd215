"""How a run uses its device: precision, memory allocator, micro-batches, and the `Accelerator` of a stage."""

import ctypes
import os
import platform
from datetime import timedelta
from functools import cache

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)

from harness.system.errors import UserError


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device computes in bf16 natively and correctly.

    Emulated bf16 (AVX2) is tens of times slower than fp32. With AVX-512 bf16 but without AMX, the weight gradient of a
    convolution over features of two voxels along an axis (the deepest features of small crops) reads memory that was never
    written. The gradient is then wrong by any amount, and different each time (torch 2.14.1, seen on an EPYC).
    `harness.compute.layers.Conv3d` computes these convolutions in fp32, so that the user can choose bf16 there. The
    automatic choice takes bf16 on a CPU only if it has AMX.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # Torch has no public query for this yet.
        return bool(torch.cpu._is_amx_tile_supported())
    return False


def precision(wanted: str, device: torch.device) -> str:
    """The precision that is used on this device, "fp32" or "bf16".

    Args:
        wanted: the setting: "auto", "fp32" or "bf16". "auto" takes the launcher's precision, otherwise bf16 where
            `computes_in_bf16` is True.

    Raises:
        UserError: the setting is "auto", and the launcher asks for another precision.
    """
    if wanted != "auto":
        return wanted
    # The value of `accelerate launch --mixed_precision`, which is "no" by default.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise UserError(f"--mixed_precision {launched}: launch with bf16 or no, or --set pretrain.precision=fp32")
    if launched == "bf16":
        return "bf16"
    return "bf16" if computes_in_bf16(device) else "fp32"


KEEP_MEMORY = "HARNESS_KEEP_MEMORY"  # environment variable; 0 leaves the memory allocator as it is
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # constants of glibc's malloc.h


@cache
def keep_memory() -> bool:
    """Make the process keep freed memory for the next step, instead of returning it to the system. Returns whether it does.

    glibc returns the memory of every tensor above 32 MiB to the system when the tensor is freed. The system must clear the
    memory of the next tensors, which takes up to half of the time of a step (docs/speed.md). HARNESS_KEEP_MEMORY=0 leaves
    the allocator as it is. With another C library than glibc, nothing is changed.
    """
    if os.environ.get(KEEP_MEMORY) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    accepted = [mallopt(*option) for option in options]
    return all(accepted)


def micro_batches(asked: int) -> int:
    """Number of micro-batches: `asked`, or for 0 that of `accelerate launch --gradient_accumulation_steps`, otherwise 1."""
    return asked or int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or 1)


def new_accelerator(asked: int = 0) -> Accelerator:
    """A new `Accelerator` for the processes that the launcher started; every stage makes its own.

    It does no mixed precision, because the harness handles precision itself (`Training.precision`).

    Args:
        asked: the requested number of micro-batches, as for `micro_batches`.

    Raises:
        UserError: the launcher asks for a way of sharing the work that is not supported.
    """
    # The other processes wait for one that preprocesses data or scores cases, however long it takes.
    process_group = InitProcessGroupKwargs(timeout=timedelta(days=7))
    num_steps = micro_batches(asked)
    data_parallel = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=num_steps, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[process_group, data_parallel],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"`accelerate launch` asks for {accelerator.distributed_type.value}, this version shares work by data parallelism "
            "only: launch it with --multi_gpu; where memory is short, give --micro-batches, or --set "
            "backbone.checkpoint=true with swinunetr"
        )
    return accelerator
