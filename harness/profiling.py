"""What a training step costs, beside what the machine can do: `harness profile`. How it is timed: docs/speed.md."""

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from harness import hardware
from harness.bounds import judge, watch
from harness.progress import progress
from harness.subject import Cell, Measured, Subject, made_up_volumes, measure_apart, out_of_memory, weigh
from harness.training import PHASES, UPDATE, compiled, new_accelerator

NOISY = 0.15  # spread of a round's medians above which nothing is to be believed
ROUND_SECONDS = 1.0  # that a cell is timed for per round, at least one step
LOOP_SECONDS = 5.0  # that a cell's loader is watched for


def measure(
    cells: Sequence[Cell], rounds: int, short: bool = False
) -> tuple[list[Measured], dict[str, list[list[float]]]]:
    """Profile cells side by side: every round times each cell and each ceiling once, in a new order.

    `short`, on a GPU: its memory and FLOPs are measured in this process, since an allocator's own count needs no other one;
    no peak of the host's memory, and loaders are not watched.

    Returns:
        the cells, in their order, and per ceiling (`gemm fp32`, `convolution fp32`, `copy`, ...) and round its rates, in
        FLOP/s or bytes/s.
    """
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as place:
        folder = Path(place)
        found = [Measured(cell) for cell in cells]
        device = new_accelerator().device
        short = short and device.type == "cuda"
        for each in progress([] if short else found, "memory", shown=not short):
            measure_apart(each)
        subjects = _build(found, folder, device if short else None)
        ceilings = make_ceilings(device, {subject.trainer.precision for subject in subjects.values()})
        rates: dict[str, list[list[float]]] = {name: [] for name in ceilings}
        rng = np.random.default_rng(0)
        with progress(None, "rounds", total=rounds * (len(subjects) + len(ceilings))) as bar:
            for _ in range(rounds):
                turns: list[Any] = [*subjects, *ceilings]
                for turn in (turns[place] for place in rng.permutation(len(turns))):
                    if isinstance(turn, str):
                        rates[turn].append(ceilings[turn]())
                    else:
                        _one_round(found[turn], subjects[turn])
                    bar.update()
        for number, subject in progress({} if short else subjects.items(), "loaders", shown=not short):
            _watch_loader(found[number], subject)
        return found, rates


def _build(found: Sequence[Measured], folder: Path, weighed: torch.device | None = None) -> dict[int, Subject]:
    """The cells that can run, by their place, warmed up; with their memory on the device where one is given."""
    subjects = {}
    for number, each in enumerate(progress(found, "warm-up")):
        if each.problem:
            continue
        with out_of_memory(each):
            before = 0 if weighed is None else torch.cuda.memory_allocated(weighed)
            subject = Subject(each.cell, made_up_volumes(each.cell, folder), folder / str(number))
            if weighed is not None:
                each.flops, each.parameters, memory = weigh(subject)
                peak = memory["device_peak_gib"] or 0.0
                each.memory = {"device_peak_gib": peak - before / 2**30}
            with compiled(subject.trainer.module, each.cell.settings.compile):
                subject.timed(1)
                subject.step_seconds = _seconds(subject.timed(1))
                each.watched = watch(subject.step)
            each.prepare_seconds, each.used = subject.prepare_seconds, subject.trainer.used()
            each.batch_bytes = sum(value.nbytes for value in subject.batch.values())
            subjects[number] = subject
    return subjects


def _one_round(each: Measured, subject: Subject) -> None:
    """As many steps as fit the time, at least one; before short ones one that does not count, since caches are others'."""
    with out_of_memory(each), compiled(subject.trainer.module, each.cell.settings.compile):
        if subject.step_seconds < ROUND_SECONDS:
            subject.timed(1)
        each.rounds.append(subject.timed(int(np.clip(ROUND_SECONDS / subject.step_seconds, 1, 50))))


def _seconds(phases: dict[str, list[float]]) -> float:
    """Of the last step."""
    return sum(phases[phase][-1] for phase in UPDATE)


def _watch_loader(each: Measured, subject: Subject) -> None:
    """The training loop with its loader: what the step waits for, once the batches made in advance are used up."""
    if each.problem:
        return
    each.sample_seconds = subject.sample_seconds()
    each.waits = subject.loop(int(np.clip(LOOP_SECONDS / subject.step_seconds, 1, 100)))


def make_ceilings(device: torch.device, precisions: set[str]) -> dict[str, Callable[[], list[float]]]:
    """What the machine can do: a matrix product and a convolution per precision (FLOP/s), and copies (bytes/s)."""
    on_gpu = device.type == "cuda"
    edge, side = (8192, 128) if on_gpu else (2048, 48)
    found: dict[str, Callable[[], list[float]]] = {}
    for precision in sorted(precisions):
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        # At random: a GPU computes with constants at a higher clock than with data.
        matrix = torch.randn(edge, edge, dtype=dtype, device=device)
        layer = nn.Conv3d(64, 64, 3, padding=1, dtype=dtype, device=device).to(memory_format=torch.channels_last_3d)
        image = torch.randn(1, 64, side, side, side, dtype=dtype, device=device)
        image = image.to(memory_format=torch.channels_last_3d)
        found[f"gemm {precision}"] = _rate(partial(torch.matmul, matrix, matrix), 2 * edge**3, device)
        found[f"convolution {precision}"] = _rate(partial(layer, image), 2 * 27 * 64 * 64 * side**3, device)
    source = torch.randn(2**26 if on_gpu else 2**24, device=device)
    target = torch.empty_like(source)
    found["copy"] = _rate(lambda: target.copy_(source), 2 * source.nbytes, device)
    if on_gpu:
        host = torch.ones(2**26).pin_memory()
        found["host-to-device"] = _rate(lambda: source.copy_(host, non_blocking=True), host.nbytes, device)
    return found


def _rate(work: Callable[[], Any], amount: float, device: torch.device, times: int = 5) -> Callable[[], list[float]]:
    """A function that does the work a few times and gives the amounts per second."""
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext

    @torch.no_grad()
    def run() -> list[float]:
        rates = []
        for _ in range(times + 1):
            wait()
            began = time.perf_counter()
            work()
            wait()
            rates.append(amount / (time.perf_counter() - began))
        return rates[1:]

    return run


def summarise(found: Sequence[Measured], rates: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row per cell, in the columns of `leaderboards.profiles`; what could not be measured is None."""
    device = new_accelerator().device
    described = hardware.environment(device)
    machine = {
        "machine": described["gpu"] or described["cpu"],
        "device": device.type,
        "threads": described["threads"],
        "torch": described["torch"],
        "harness": described["harness"],
        "revision": described["git"]["revision"],
    }
    noise = {name: _spread(rounds) for name, rounds in rates.items()}
    first = next((each for each in found if not each.problem), None)
    return [machine | _row(each, first, rates, noise) for each in found]


def _row(
    each: Measured, first: Measured | None, rates: dict[str, list[list[float]]], noise: dict[str, float]
) -> dict[str, Any]:
    row = _described(each)
    if each.problem or first is None:
        return row
    return row | _timed(each, first, rates, noise, row["precision"])


def _described(each: Measured) -> dict[str, Any]:
    """What was timed."""
    cell, settings = each.cell, each.cell.settings
    return {
        "stage": cell.stage,
        "method": cell.config.method,
        "variant": cell.variant,
        "backbone": cell.config.backbone,
        "task": cell.task.name,
        "channels": len(cell.task.channels),
        "crop": "x".join(map(str, settings.crop)),
        "batch_size": settings.batch_size,
        "precision": each.used.get("precision", settings.precision),
        "channels_last": settings.channels_last,
        "compile": settings.compile,
        "settings": ", ".join(cell.request.settings),
        "problem": each.problem,
    }


def _timed(
    each: Measured, first: Measured, rates: dict[str, list[list[float]]], noise: dict[str, float], precision: str
) -> dict[str, Any]:
    """What it took; `first` is what the ratios are of."""
    settings, steps = each.cell.settings, each.steps()
    medians = [float(np.median(values)) for values in steps]
    step = float(np.median(np.concatenate(steps)))
    every = {phase: np.concatenate([one[phase] for one in each.rounds]) for phase in PHASES}
    row = _milliseconds("step", np.concatenate(steps))
    for phase in (*UPDATE, "transfer"):
        row |= _milliseconds(phase, every[phase])
    row |= _waited(each, step)
    rate = {name: float(np.median(np.concatenate(rounds))) for name, rounds in rates.items()}
    achieved = each.flops / float(np.median(every["forward"] + every["backward"]))
    copied = float(np.median(every["transfer"]))
    ratios = [float(np.median(one)) / mine for one, mine in zip(first.steps(), medians, strict=True)]
    mine = {name: value for name, value in noise.items() if name.endswith(precision)}
    return row | {
        "samples_per_s": settings.batch_size / step,
        "first_over_this": float(np.median(ratios)),
        "first_over_this_low": min(ratios),
        "first_over_this_high": max(ratios),
        "workers": settings.workers,
        **judge(each.watched, step, each.flops, rate[f"convolution {precision}"], rate["copy"]),
        "gflop": each.flops / 1e9,
        "tflop_per_s": achieved / 1e12,
        "of_gemm": achieved / rate[f"gemm {precision}"],
        "of_convolution": achieved / rate[f"convolution {precision}"],
        "of_copy": each.batch_bytes / copied / rate["host-to-device"] if "host-to-device" in rate else None,
        "gemm_tflop_per_s": rate[f"gemm {precision}"] / 1e12,
        "convolution_tflop_per_s": rate[f"convolution {precision}"] / 1e12,
        "copy_gb_per_s": rate["copy"] / 1e9,
        "host_peak_gib": each.memory.get("host_peak_gib"),
        "device_peak_gib": each.memory.get("device_peak_gib"),
        "parameters": each.parameters,
        "rounds": len(steps),
        "steps": sum(map(len, steps)),
        "spread": _spread(steps),
        "ceiling_spread": max(mine.values()),
        "noisy": max(_spread(steps), *mine.values()) > NOISY,
    }


def _waited(each: Measured, step: float) -> dict[str, Any]:
    """What the loop waits for its loader, and the workers that it would need; nothing where it was not watched."""
    if not each.waits:
        names = ("data_wait_ms_p50", "data_wait_ms_p95", "data_wait_share", "sample_ms", "workers_needed")
        return dict.fromkeys(names)
    busy = sum(float(np.sum(each.waits[phase])) for phase in PHASES[1:])
    waited = float(np.sum(each.waits["data"]))
    return _milliseconds("data_wait", np.asarray(each.waits["data"])) | {
        "data_wait_share": waited / (waited + busy),
        "sample_ms": each.sample_seconds * 1000,
        "workers_needed": int(np.ceil(each.cell.settings.batch_size * each.sample_seconds / step)),
    }


def _milliseconds(name: str, seconds: Any) -> dict[str, float]:
    return {f"{name}_ms_p{at}": float(np.percentile(seconds, at)) * 1000 for at in (50, 95)}


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """How far the rounds' medians lie apart, of their median: what the machine did beside."""
    medians = [float(np.median(values)) for values in rounds]
    return (max(medians) - min(medians)) / float(np.median(medians))
