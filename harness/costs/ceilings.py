"""Ceilings of a machine: its rates of matrix products, convolutions and copies."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn


def make_ceilings(device: torch.device, precisions: set[str]) -> dict[str, Callable[[], list[float]]]:
    """Functions that measure the ceilings, by name; each returns a few rates.

    The ceilings are a matrix product (`gemm`) and a convolution per precision, in FLOP/s, and a copy, in bytes/s; on a GPU
    also a copy from the host to the device.
    """
    on_gpu = device.type == "cuda"
    edge, side = (8192, 128) if on_gpu else (2048, 48)
    ceilings: dict[str, Callable[[], list[float]]] = {}
    for precision in sorted(precisions):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # Values are random, because a GPU runs at a higher clock on constants than on data.
        matrix = torch.randn(edge, edge, dtype=dtype, device=device)
        layer = nn.Conv3d(64, 64, 3, padding=1, dtype=dtype, device=device).to(memory_format=torch.channels_last_3d)
        image = torch.randn(1, 64, side, side, side, dtype=dtype, device=device)
        image = image.to(memory_format=torch.channels_last_3d)
        ceilings[f"gemm {precision}"] = _rate(partial(torch.matmul, matrix, matrix), 2 * edge**3, device)
        ceilings[f"convolution {precision}"] = _rate(partial(layer, image), 2 * 27 * 64 * 64 * side**3, device)
    source = torch.randn(2**26 if on_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    ceilings["copy"] = _rate(lambda: target.copy_(source), 2 * source.nbytes, device)
    if on_gpu:
        host = torch.ones(2**26).pin_memory()
        ceilings["host-to-device"] = _rate(lambda: source.copy_(host, non_blocking=True), host.nbytes, device)
    return ceilings


def _rate(work: Callable[[], Any], amount: float, device: torch.device, times: int = 5) -> Callable[[], list[float]]:
    """A function that does the work `times` times and returns the amounts per second; `amount` is FLOPs or bytes."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext

    @torch.no_grad()
    def run() -> list[float]:
        """The rates; the first execution warms up and is not counted."""
        rates = []
        for _ in range(times + 1):
            wait()
            began = time.perf_counter()
            work()
            wait()
            rates.append(amount / (time.perf_counter() - began))
        return rates[1:]

    return run
