"""The cost of a training step beside the ceilings of the machine: `harness profile`. docs/speed.md says how it is timed."""

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
from harness.costs.trial import Trial, TrialResult, TrialSpec, made_up_volumes, measure_in_new_process, out_of_memory
from harness.system.console import progress
from harness.training.clock import PHASES, UPDATE
from harness.training.trainer import compiled

NOISY = 0.15  # spread of the rounds' medians above which a row is marked as noisy
ROUND_SECONDS = 1.0  # for which a trial is timed per round; at least one step
LOOP_SECONDS = 5.0  # for which the loader of a trial is timed


def measure(
    specs: Sequence[TrialSpec], rounds: int, short: bool = False
) -> tuple[list[TrialResult], dict[str, list[list[float]]]]:
    """Profile trials side by side: every round times each trial and each ceiling once, in a new order.

    Args:
        short: on a GPU, measure memory and FLOPs in this process, since its allocator counts for each trial; do not measure
            the peak of the host's memory, and do not time the loaders.

    Returns:
        the results in the order of `specs`; and for each ceiling (`gemm fp32`, `convolution fp32`, `copy`, ...) its rates,
        round by round, in FLOP/s or bytes/s.
    """
    with tempfile.TemporaryDirectory(prefix="harness-profile-") as temporary:
        folder = Path(temporary)
        results = [TrialResult(spec) for spec in specs]
        device = new_accelerator().device
        short = short and device.type == "cuda"
        for result in progress([] if short else results, "memory", visible=not short):
            measure_in_new_process(result)
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
        for number, trial in progress({} if short else trials.items(), "loaders", visible=not short):
            _watch_loader(results[number], trial)
        return results, rates


def _build(results: Sequence[TrialResult], folder: Path, gpu: torch.device | None = None) -> dict[int, Trial]:
    """The trials that can run, by their index, after a warm-up. `gpu`: measure their memory on it, in this process."""
    trials = {}
    for number, result in enumerate(progress(results, "warm-up")):
        if result.problem:
            continue
        with out_of_memory(result):
            before = 0 if gpu is None else torch.cuda.memory_allocated(gpu)
            trial = Trial(result.spec, made_up_volumes(result.spec, folder), folder / str(number))
            if gpu is not None:
                result.flops, result.parameters, peak = trial.measure_memory_and_flops()
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
    """Time the steps that fit into `ROUND_SECONDS`, at least one.

    Before short steps one more step is done and not counted, since the other trials have used the caches meanwhile.
    """
    with out_of_memory(result), compiled(trial.trainer.module, result.spec.settings.compile):
        if trial.step_seconds < ROUND_SECONDS:
            trial.timed(1)
        result.rounds.append(trial.timed(int(np.clip(ROUND_SECONDS / trial.step_seconds, 1, 50))))


def _seconds(phases: dict[str, list[float]]) -> float:
    """Seconds of the last step."""
    return sum(phases[phase][-1] for phase in UPDATE)


def _watch_loader(result: TrialResult, trial: Trial) -> None:
    """Time the training loop with its loader, after the batches that the workers make in advance are used up."""
    if result.problem:
        return
    result.sample_seconds = trial.sample_seconds()
    result.waits = trial.loop(int(np.clip(LOOP_SECONDS / trial.step_seconds, 1, 100)))


def summarise(results: Sequence[TrialResult], rates: dict[str, list[list[float]]]) -> list[dict[str, Any]]:
    """One row per trial in the columns of `leaderboards.profiles`; a value that was not measured is None."""
    device = new_accelerator().device
    description = environment.describe_environment(device)
    machine = {
        "machine": description["gpu"] or description["cpu"],
        "device": device.type,
        "threads": description["threads"],
        "torch": description["torch"],
        "harness": description["harness"],
        "revision": description["git"]["revision"],
    }
    noise = {name: _spread(rounds) for name, rounds in rates.items()}
    first = next((result for result in results if not result.problem), None)
    return [machine | _row(result, first, rates, noise) for result in results]


def _row(
    result: TrialResult, first: TrialResult | None, rates: dict[str, list[list[float]]], noise: dict[str, float]
) -> dict[str, Any]:
    """One row. `first`: the first trial that ran; `noise`: spread of each ceiling."""
    row = _describe(result)
    if result.problem or first is None:
        return row
    return row | _times(result, first, rates, noise, row["precision"])


def _describe(result: TrialResult) -> dict[str, Any]:
    """The columns that say what was timed."""
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


def _times(
    result: TrialResult,
    first: TrialResult,
    rates: dict[str, list[list[float]]],
    noise: dict[str, float],
    precision: str,
) -> dict[str, Any]:
    """The columns with times, rates and memory; ratios are steps of `first` over steps of this trial."""
    settings, steps = result.spec.settings, result.steps()
    medians = [float(np.median(values)) for values in steps]
    step = float(np.median(np.concatenate(steps)))
    seconds_of_phase = {phase: np.concatenate([phases[phase] for phases in result.rounds]) for phase in PHASES}
    row = _milliseconds("step", np.concatenate(steps))
    for phase in (*UPDATE, "transfer"):
        row |= _milliseconds(phase, seconds_of_phase[phase])
    row |= _data_wait(result, step)
    ceilings = {name: float(np.median(np.concatenate(rounds))) for name, rounds in rates.items()}
    achieved = result.flops / float(np.median(seconds_of_phase["forward"] + seconds_of_phase["backward"]))
    copied = float(np.median(seconds_of_phase["transfer"]))
    ratios = [float(np.median(seconds)) / median for seconds, median in zip(first.steps(), medians, strict=True)]
    own_noise = {name: value for name, value in noise.items() if name.endswith(precision)}
    return row | {
        "samples_per_s": settings.batch_size / step,
        "first_over_this": float(np.median(ratios)),
        "first_over_this_low": min(ratios),
        "first_over_this_high": max(ratios),
        "workers": settings.workers,
        **judge(result.watched, step, result.flops, ceilings[f"convolution {precision}"], ceilings["copy"]),
        "gflop": result.flops / 1e9,
        "tflop_per_s": achieved / 1e12,
        "of_gemm": achieved / ceilings[f"gemm {precision}"],
        "of_convolution": achieved / ceilings[f"convolution {precision}"],
        "of_copy": result.batch_bytes / copied / ceilings["host-to-device"] if "host-to-device" in ceilings else None,
        "gemm_tflop_per_s": ceilings[f"gemm {precision}"] / 1e12,
        "convolution_tflop_per_s": ceilings[f"convolution {precision}"] / 1e12,
        "copy_gb_per_s": ceilings["copy"] / 1e9,
        "host_peak_gib": result.memory.get("host_peak_gib"),
        "device_peak_gib": result.memory.get("device_peak_gib"),
        "parameters": result.parameters,
        "rounds": len(steps),
        "steps": sum(map(len, steps)),
        "spread": _spread(steps),
        "ceiling_spread": max(own_noise.values()),
        "noisy": max(_spread(steps), *own_noise.values()) > NOISY,
    }


def _data_wait(result: TrialResult, step: float) -> dict[str, Any]:
    """How long the loop waits for its loader, and how many workers it needs; None where the loader was not timed."""
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
    """Median and 95th percentile of the seconds, in milliseconds."""
    return {f"{name}_ms_p{percent}": float(np.percentile(seconds, percent)) * 1000 for percent in (50, 95)}


def _spread(rounds: Sequence[Sequence[float]]) -> float:
    """Range of the rounds' medians as a share of their median. A large one shows that something else used the machine."""
    medians = [float(np.median(values)) for values in rounds]
    return (max(medians) - min(medians)) / float(np.median(medians))
