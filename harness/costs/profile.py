"""What a training step costs, beside what the machine can do: `harness profile`. How it is timed: docs/speed.md."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.compute import environment
from harness.compute.devices import new_accelerator
from harness.costs.bounds import judge, watch
from harness.costs.ceilings import make_ceilings
from harness.costs.trial import Trial, TrialResult, TrialSpec, made_up_volumes, measure_apart, out_of_memory
from harness.system.console import progress
from harness.training.clock import PHASES, UPDATE
from harness.training.trainer import compiled

NOISY = 0.15  # spread of a round's medians above which nothing is to be believed
ROUND_SECONDS = 1.0  # that a cell is timed for per round, at least one step
LOOP_SECONDS = 5.0  # that a cell's loader is watched for


def measure(
    specs: Sequence[TrialSpec], rounds: int, short: bool = False
) -> tuple[list[TrialResult], dict[str, list[list[float]]]]:
    """Profile trials side by side: every round times each trial and each ceiling once, in a new order.

    Args:
        short: on a GPU, measure memory and FLOPs in this process, since its allocator counts for each trial; measure no
            peak of the host's memory, and do not watch the loaders.

    Returns:
        the results in the order of `specs`, and per ceiling (`gemm fp32`, `convolution fp32`, `copy`, ...) and round its
        rates, in FLOP/s or bytes/s.
    """
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as place:
        folder = Path(place)
        results = [TrialResult(spec) for spec in specs]
        device = new_accelerator().device
        short = short and device.type == "cuda"
        for result in progress([] if short else results, "memory", shown=not short):
            measure_apart(result)
        trials = _build(results, folder, device if short else None)
        ceilings = make_ceilings(device, {trial.trainer.precision for trial in trials.values()})
        rates: dict[str, list[list[float]]] = {name: [] for name in ceilings}
        rng = np.random.default_rng(0)
        with progress(None, "rounds", total=rounds * (len(trials) + len(ceilings))) as bar:
            for _ in range(rounds):
                turns: list[Any] = [*trials, *ceilings]
                for turn in (turns[index] for index in rng.permutation(len(turns))):
                    if isinstance(turn, str):
                        rates[turn].append(ceilings[turn]())
                    else:
                        _one_round(results[turn], trials[turn])
                    bar.update()
        for number, trial in progress({} if short else trials.items(), "loaders", shown=not short):
            _watch_loader(results[number], trial)
        return results, rates


def _build(results: Sequence[TrialResult], folder: Path, gpu: torch.device | None = None) -> dict[int, Trial]:
    """The trials that can run, by their index, warmed up; on a GPU that is given, their memory is measured here."""
    trials = {}
    for number, result in enumerate(progress(results, "warm-up")):
        if result.problem:
            continue
        with out_of_memory(result):
            before = 0 if gpu is None else torch.cuda.memory_allocated(gpu)
            trial = Trial(result.spec, made_up_volumes(result.spec, folder), folder / str(number))
            if gpu is not None:
                result.flops, result.parameters, peak = trial.weigh()
                result.memory = {"device_peak_gib": (peak["device_peak_gib"] or 0.0) - before / 2**30}
            with compiled(trial.trainer.module, result.spec.settings.compile):
                trial.timed(1)
                trial.step_seconds = _seconds(trial.timed(1))
                result.watched = watch(trial.step)
            result.prepare_seconds, result.used = trial.prepare_seconds, trial.trainer.used()
            result.batch_bytes = sum(value.nbytes for value in trial.batch.values())
            trials[number] = trial
    return trials


def _one_round(result: TrialResult, trial: Trial) -> None:
    """As many steps as fit the time, at least one; before short ones one that does not count, since caches are others'."""
    with out_of_memory(result), compiled(trial.trainer.module, result.spec.settings.compile):
        if trial.step_seconds < ROUND_SECONDS:
            trial.timed(1)
        result.rounds.append(trial.timed(int(np.clip(ROUND_SECONDS / trial.step_seconds, 1, 50))))


def _seconds(phases: dict[str, list[float]]) -> float:
    """Of the last step."""
    return sum(phases[phase][-1] for phase in UPDATE)


def _watch_loader(result: TrialResult, trial: Trial) -> None:
    """The training loop with its loader: what the step waits for, once the batches made in advance are used up."""
    if result.problem:
        return
    result.sample_seconds = trial.sample_seconds()
    result.waits = trial.loop(int(np.clip(LOOP_SECONDS / trial.step_seconds, 1, 100)))


def summarise(results: Sequence[TrialResult], rates: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row per cell, in the columns of `leaderboards.profiles`; what could not be measured is None."""
    device = new_accelerator().device
    described = environment.describe_environment(device)
    machine = {
        "machine": described["gpu"] or described["cpu"],
        "device": device.type,
        "threads": described["threads"],
        "torch": described["torch"],
        "harness": described["harness"],
        "revision": described["git"]["revision"],
    }
    noise = {name: _spread(rounds) for name, rounds in rates.items()}
    first = next((result for result in results if not result.problem), None)
    return [machine | _row(result, first, rates, noise) for result in results]


def _row(
    result: TrialResult, first: TrialResult | None, rates: dict[str, list[list[float]]], noise: dict[str, float]
) -> dict[str, Any]:
    row = _described(result)
    if result.problem or first is None:
        return row
    return row | _timed(result, first, rates, noise, row["precision"])


def _described(result: TrialResult) -> dict[str, Any]:
    """What was timed."""
    spec, settings = result.spec, result.spec.settings
    return {
        "stage": spec.stage,
        "method": spec.config.method,
        "variant": spec.variant,
        "backbone": spec.config.backbone,
        "task": spec.task.name,
        "channels": len(spec.task.channels),
        "crop": "x".join(map(str, settings.crop)),
        "batch_size": settings.batch_size,
        "precision": result.used.get("precision", settings.precision),
        "channels_last": settings.channels_last,
        "compile": settings.compile,
        "settings": ", ".join(spec.request.settings),
        "problem": result.problem,
    }


def _timed(
    result: TrialResult,
    first: TrialResult,
    rates: dict[str, list[list[float]]],
    noise: dict[str, float],
    precision: str,
) -> dict[str, Any]:
    """What it took; `first` is what the ratios are of."""
    settings, steps = result.spec.settings, result.steps()
    medians = [float(np.median(values)) for values in steps]
    step = float(np.median(np.concatenate(steps)))
    every = {phase: np.concatenate([one[phase] for one in result.rounds]) for phase in PHASES}
    row = _milliseconds("step", np.concatenate(steps))
    for phase in (*UPDATE, "transfer"):
        row |= _milliseconds(phase, every[phase])
    row |= _waited(result, step)
    rate = {name: float(np.median(np.concatenate(rounds))) for name, rounds in rates.items()}
    achieved = result.flops / float(np.median(every["forward"] + every["backward"]))
    copied = float(np.median(every["transfer"]))
    ratios = [float(np.median(one)) / mine for one, mine in zip(first.steps(), medians, strict=True)]
    mine = {name: value for name, value in noise.items() if name.endswith(precision)}
    return row | {
        "samples_per_s": settings.batch_size / step,
        "first_over_this": float(np.median(ratios)),
        "first_over_this_low": min(ratios),
        "first_over_this_high": max(ratios),
        "workers": settings.workers,
        **judge(result.watched, step, result.flops, rate[f"convolution {precision}"], rate["copy"]),
        "gflop": result.flops / 1e9,
        "tflop_per_s": achieved / 1e12,
        "of_gemm": achieved / rate[f"gemm {precision}"],
        "of_convolution": achieved / rate[f"convolution {precision}"],
        "of_copy": result.batch_bytes / copied / rate["host-to-device"] if "host-to-device" in rate else None,
        "gemm_tflop_per_s": rate[f"gemm {precision}"] / 1e12,
        "convolution_tflop_per_s": rate[f"convolution {precision}"] / 1e12,
        "copy_gb_per_s": rate["copy"] / 1e9,
        "host_peak_gib": result.memory.get("host_peak_gib"),
        "device_peak_gib": result.memory.get("device_peak_gib"),
        "parameters": result.parameters,
        "rounds": len(steps),
        "steps": sum(map(len, steps)),
        "spread": _spread(steps),
        "ceiling_spread": max(mine.values()),
        "noisy": max(_spread(steps), *mine.values()) > NOISY,
    }


def _waited(result: TrialResult, step: float) -> dict[str, Any]:
    """What the loop waits for its loader, and the workers that it would need; None where it was not watched."""
    if not result.waits:
        names = ("data_wait_ms_p50", "data_wait_ms_p95", "data_wait_share", "sample_ms", "workers_needed")
        return dict.fromkeys(names)
    busy = sum(float(np.sum(result.waits[phase])) for phase in PHASES[1:])
    waited = float(np.sum(result.waits["data"]))
    return _milliseconds("data_wait", np.asarray(result.waits["data"])) | {
        "data_wait_share": waited / (waited + busy),
        "sample_ms": result.sample_seconds * 1000,
        "workers_needed": int(np.ceil(result.spec.settings.batch_size * result.sample_seconds / step)),
    }


def _milliseconds(name: str, seconds: Any) -> dict[str, float]:
    return {f"{name}_ms_p{at}": float(np.percentile(seconds, at)) * 1000 for at in (50, 95)}


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """How far the rounds' medians lie apart, of their median: what the machine did beside."""
    medians = [float(np.median(values)) for values in rounds]
    return (max(medians) - min(medians)) / float(np.median(medians))
