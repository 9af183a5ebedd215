"""Where a run computes: device, precision, allocator, and Accelerate's view of them."""

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
    """Whether bf16 is native and right there.

    Emulated (AVX2), it is tens of times slower than fp32. With AVX-512 bf16 but without AMX, the weight gradient of a
    convolution over two voxels along an axis, the deepest features of small crops, reads memory that was never written:
    wrong by any amount and different each time (torch 2.14.1, seen on an EPYC). `harness.layers.Conv3d` computes those in
    fp32, so that bf16 can be asked for; by itself it is chosen with AMX only.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # No public query exists yet.
        return bool(torch.cpu._is_amx_tile_supported())
    return False


def precision(wanted: str, device: torch.device) -> str:
    """`auto`, `fp32` or `bf16` -> what is used on this device. Raises UserError for a launcher's other precision."""
    if wanted != "auto":
        return wanted
    # `accelerate launch --mixed_precision`; "no" is what it says where nobody asked.
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if launched not in ("no", "bf16"):
        raise UserError(f"--mixed_precision {launched}: launch with bf16 or no, or --set pretrain.precision=fp32")
    if launched == "bf16":
        return "bf16"
    return "bf16" if computes_in_bf16(device) else "fp32"


KEEP_MEMORY = "HARNESS_KEEP_MEMORY"
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of glibc's malloc.h


@cache
def keep_memory() -> bool:
    """Have freed memory kept by the process for the next step, instead of being given back and cleared again.

    glibc hands every tensor above 32 MiB back to the system when it is freed, and a step spends up to half of its time
    on having the next ones cleared (docs/speed.md). HARNESS_KEEP_MEMORY=0 leaves the allocator as it is; elsewhere than on
    glibc nothing is done. Returns whether memory is kept.
    """
    if os.environ.get(KEEP_MEMORY) == "0" or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 2**26))
    done = [mallopt(*each) for each in settings]
    return all(done)


def micro_batches(asked: int) -> int:
    """As asked; 0: as `accelerate launch --gradient_accumulation_steps` says, else 1."""
    return asked or int(os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") or 1)


def new_accelerator(asked: int = 0) -> Accelerator:
    """One per stage, for the processes that the launcher started; precision is ours (`Training.precision`).

    Args:
        asked: micro-batches, as `harness.execution.micro_batches` takes them.

    Raises:
        UserError: a way of sharing the work that is not supported.
    """
    # A process that prepares data or scores cases is waited for, however long it takes.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=7))
    number = micro_batches(asked)
    replicas = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    accelerator = Accelerator(
        mixed_precision="no",
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=number, sync_with_dataloader=False),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[patient, replicas],
    )
    if accelerator.distributed_type not in (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU):
        raise UserError(
            f"`accelerate launch` asks for {accelerator.distributed_type.value}, this version shares work by data parallelism "
            "only: launch it with --multi_gpu; where memory is short, give --micro-batches, or --set "
            "backbone.checkpoint=true with swinunetr"
        )
    return accelerator
