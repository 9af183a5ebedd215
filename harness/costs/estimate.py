"""Time, memory and disk space of runs before they start, from a few measured steps: `harness estimate`."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from harness.api.task import Case
from harness.compute import environment
from harness.compute.devices import new_accelerator
from harness.config.request import Request
from harness.costs.trial import Trial, TrialResult, TrialSpec, made_up_volumes, measure_in_new_process
from harness.data.cases import num_workers
from harness.data.image_files import read_header
from harness.data.volumes import Volume, preprocess_cases, space_needed, volumes_of
from harness.evaluation import metrics
from harness.evaluation.evaluate import new_scoring, read_reference
from harness.evaluation.sliding_window import predict
from harness.runs.locate import locate
from harness.runs.plan import RunPlan, plan
from harness.system.console import say
from harness.system.files import digest
from harness.training.models import new_network
from harness.training.trainer import compiled
from leaderboards.text import align

STEPS_SECONDS = 4.0  # for which the steps of a stage are timed
PER_STEP_BYTES = 300  # a step's line in history.jsonl
RECORD_BYTES = 2**18  # record, table of cases and figures of a run


@dataclass
class Estimate:
    """What one run will take.

    Attributes:
        name: the run id.
        seconds: stage -> seconds.
        host_gib, device_gib: peaks of memory in GiB; `device_gib` is None without a GPU.
        disk: bytes.
        shared: whether its pre-training is finished, or counted for another run.
        finished: whether the run is finished, so that it takes nothing.
        problem: why there is no estimate; empty where there is one.
    """

    name: str
    seconds: dict[str, float] = field(default_factory=dict)
    host_gib: float = 0.0
    device_gib: float | None = None
    disk: int = 0
    shared: bool = False
    finished: bool = False
    problem: str = ""

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())


class Estimator:
    """Estimates runs. What several runs have in common is measured once and counted once.

    Attributes:
        measurements: results of measurements, by the digest of what they depend on.
        counted: pre-trainings and preprocessed volumes that are counted in an earlier estimate.
    """

    def __init__(self) -> None:
        self.measurements: dict[str, Any] = {}
        self.counted: set[Any] = set()

    def estimate(self, request: Request) -> Estimate:
        """Estimate one run as it would go now: stages and volumes that are there already cost nothing.

        Raises:
            UserError: as `harness.runs.plan.plan`.
        """
        run_plan = plan(request, *locate(request))
        estimate = Estimate(run_plan.run_id)
        if (request.runs / run_plan.run_id / "record.json").exists():
            estimate.finished = True
            return estimate
        self._preprocessing(run_plan, request.runs / "cache", estimate)
        if run_plan.plugins.method.trains:
            stage_file = run_plan.pretrain_folder(request.runs) / "stage.json"
            estimate.shared = stage_file.exists() or run_plan.pretrain_key in self.counted
            if not estimate.shared:
                self._stage(run_plan, request, "pretrain", estimate)
        self.counted.add(run_plan.pretrain_key)
        self._stage(run_plan, request, "finetune", estimate)
        self._evaluation(run_plan, request.runs / "cache", estimate)
        estimate.disk += RECORD_BYTES
        return estimate

    def _once(self, identity: list[Any], measure: Callable[[], Any]) -> Any:
        """The result of `measure`, which is measured once for each `identity`."""
        key = digest(identity)
        if key not in self.measurements:
            self.measurements[key] = measure()
        return self.measurements[key]

    def _preprocessing(self, run_plan: RunPlan, cache: Path, estimate: Estimate) -> None:
        """Add the preprocessing. The first missing case is timed, and stays in the cache; each other case takes as long."""
        image_sets: list[tuple[Any, Sequence[Case], Any]] = [
            (run_plan.task, (*run_plan.train, *run_plan.validation, *run_plan.test), run_plan.data.inventory.digests),
            *((corpus.corpus, corpus.cases, corpus.inventory.digests) for corpus in run_plan.corpora),
        ]
        seconds = 0.0
        for images, cases, digests in image_sets:
            missing = [volume for volume in volumes_of(images, cases, digests, cache) if not volume.is_complete(False)]
            missing = [volume for volume in missing if volume.description not in self.counted]
            if not missing:
                continue
            began = time.perf_counter()
            preprocess_cases(images, [missing[0].case], digests, cache)
            seconds_per_case = time.perf_counter() - began
            disk, largest = space_needed(images, missing[1:])
            seconds += seconds_per_case + seconds_per_case * len(missing[1:]) / num_workers(largest, len(missing))
            estimate.disk += disk
            self.counted |= {volume.description for volume in missing}
        estimate.seconds["prepare"] = seconds

    def _stage(self, run_plan: RunPlan, request: Request, stage: str, estimate: Estimate) -> None:
        """Add a training stage: its measured seconds per step times its steps, its memory, weights and history."""
        config, task = run_plan.config, run_plan.task
        spec = TrialSpec(request, config, task, run_plan.plugins, stage)
        settings = spec.settings
        num_cases = run_plan.num_pretrain if stage == "pretrain" else len(run_plan.label_cases)
        steps, _ = settings.schedule(num_cases)
        steps *= max(1, len(run_plan.trials)) if stage == "finetune" else 1
        identity: list[Any] = [
            stage,
            config.method if stage == "pretrain" else "",
            config.backbone,
            task.name,
            config.protocol,
        ]
        settings_groups = [
            settings,
            config.backbone_settings,
            config.method_settings if stage == "pretrain" else config.finetune,
        ]
        identity += [values.model_dump(mode="json", exclude={"steps", "epochs", "lr"}) for values in settings_groups]
        result, seconds, prepare_seconds = self._once(identity, partial(_measure_stage, spec))
        if result.problem:
            estimate.problem = f"{stage}: {result.problem}"
            return
        estimate.seconds[stage] = steps * seconds
        if stage == "pretrain":
            estimate.seconds["method_prepare"] = prepare_seconds
        estimate.host_gib = max(estimate.host_gib, result.memory.get("host_peak_gib") or 0.0)
        on_device = result.memory.get("device_peak_gib")
        estimate.device_gib = on_device if estimate.device_gib is None else max(estimate.device_gib, on_device or 0.0)
        estimate.disk += 4 * result.parameters + PER_STEP_BYTES * steps

    def _evaluation(self, run_plan: RunPlan, cache: Path, estimate: Estimate) -> None:
        """Add the evaluation: one test case is timed with random weights, the others are extrapolated by voxel count."""
        task, config = run_plan.task, run_plan.config
        case = run_plan.test[0]
        (volume,) = preprocess_cases(task, [case], run_plan.data.inventory.digests, cache)
        settings = [config.backbone_settings, config.finetune, config.evaluate]
        identity = [
            "evaluate",
            config.backbone,
            config.protocol,
            task.name,
            run_plan.data.inventory.digests[case.id],
            {name: repr(value) for name, value in config.prepared.items()},
            *(values.model_dump(mode="json") for values in settings),
        ]
        seconds = self._once(identity, partial(_evaluate_one, run_plan, volume))
        voxels = [prod(read_header(case.images[0]).shape[:3]) for case in run_plan.test]
        estimate.seconds["evaluate"] = seconds * sum(voxels) / voxels[0]
        arrays = 4 * prod(volume.shape) * (2 * len(task.channels) + 4 * task.num_outputs)
        estimate.host_gib = max(estimate.host_gib, arrays / 2**30)


def _measure_stage(spec: TrialSpec) -> tuple[TrialResult, float, float]:
    """Measure a stage: memory and parameters; seconds per step with the wait for data; seconds of `Method.prepare`."""
    result, settings = TrialResult(spec), spec.settings
    say(f"measuring a few steps: {spec}, {spec.stage}")
    measure_in_new_process(result)
    if result.problem:
        return result, 0.0, 0.0
    with TemporaryDirectory(prefix="harness-estimate-") as name:
        folder = Path(name)
        trial = Trial(spec, made_up_volumes(spec, folder), folder)
        with compiled(trial.trainer.module, settings.compile):
            trial.timed(1)
            step_seconds = sum(values[-1] for values in trial.timed(1).values())
            phases = trial.timed(int(np.clip(STEPS_SECONDS / step_seconds, 1, 100)))
        step = float(np.median(np.sum(list(phases.values()), axis=0)))
        data = settings.batch_size * trial.sample_seconds()
        # Workers make the next batches while a step runs; without workers each step waits for its batch.
        seconds = max(step, data / settings.workers) if settings.workers else step + data
        return result, seconds, trial.prepare_seconds


def _evaluate_one(run_plan: RunPlan, volume: Volume) -> float:
    """Seconds to predict and score one case, the minimum of two measurements."""
    task, config = run_plan.task, run_plan.config
    network = new_network(run_plan.plugins.new_backbone(config, len(task.channels)), task, config.protocol)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        probabilities = predict(task, network, volume.image, config.finetune, config.evaluate)
        predicted = volume.geometry.decide(task, probabilities)
        reference, spacing = read_reference(task, volume.case)
        # The reference is scored against its mirror image: scoring an empty prediction of random weights would cost nothing.
        metrics.score(reference[:, ::-1] | predicted[:, :1], reference, spacing, new_scoring(config.evaluate))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def render(estimates: Sequence[Estimate], jobs: int = 1) -> str:
    """A table for the terminal, with the sum over all runs. `jobs`: runs at a time."""
    stages = ("prepare", "method_prepare", "pretrain", "finetune", "evaluate")
    lines = [["run", *(stage.replace("_", " ") for stage in stages), "total", "host GiB", "device GiB", "disk"]]
    for estimate in estimates:
        if estimate.finished:
            lines.append([estimate.name, *["-"] * len(stages), "finished", "-", "-", "-"])
            continue
        if estimate.problem:
            lines.append([estimate.name, *["-"] * len(stages), estimate.problem, "-", "-", "-"])
            continue
        spans = [duration(estimate.seconds[stage]) if stage in estimate.seconds else "-" for stage in stages]
        if estimate.shared:
            spans[2] = "shared"
        on_device = f"{estimate.device_gib:.2f}" if estimate.device_gib is not None else "-"
        lines.append(
            [
                estimate.name,
                *spans,
                duration(estimate.total),
                f"{estimate.host_gib:.2f}",
                on_device,
                size(estimate.disk),
            ]
        )
    table = align(lines)
    seconds, disk = sum(estimate.total for estimate in estimates), sum(estimate.disk for estimate in estimates)
    if len(estimates) > 1:
        with_jobs = f", {duration(seconds / jobs)} with {jobs} jobs if they do not slow each other" if jobs > 1 else ""
        table += ["", f"{len(estimates)} runs: {duration(seconds)}{with_jobs}; {size(disk)} on disk"]
    return "\n".join(table)


def duration(seconds: float) -> str:
    """A time in seconds, minutes or hours, whichever is easiest to read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """A number of bytes in MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def machine() -> str:
    """The machine that the estimate is for, in words."""
    description = environment.describe_environment(new_accelerator().device)
    return f"{description['gpu'] or description['cpu']}, {description['threads']} threads, torch {description['torch']}"
