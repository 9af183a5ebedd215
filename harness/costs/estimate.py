"""Hours, memory and disk of runs before they start, from a few measured steps: `harness estimate`."""

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
from harness.costs.trial import Trial, TrialResult, TrialSpec, made_up_volumes, measure_apart
from harness.data.cases import num_workers
from harness.data.image_files import read_header
from harness.data.volumes import Volume, needed, prepared, preprocess_cases
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

STEPS_SECONDS = 4.0  # that a stage is watched for
PER_STEP_BYTES = 300  # of history.jsonl
RECORD_BYTES = 2**18  # record, cases and figures


@dataclass
class Estimate:
    """What one run will take; seconds and bytes. `shared`: its pre-training is another cell's, or there already."""

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
    """Estimates of runs; what two of them have in common is measured once, and counted once."""

    def __init__(self) -> None:
        self.known: dict[str, Any] = {}
        self.counted: set[Any] = set()

    def estimate(self, request: Request) -> Estimate:
        """One run, as it would go now: what is there already costs nothing.

        Raises:
            UserError: as `harness.planning.plan`.
        """
        run_plan = plan(request, *locate(request))
        found = Estimate(run_plan.run_id)
        if (request.runs / run_plan.run_id / "record.json").exists():
            found.finished = True
            return found
        self._preparation(run_plan, request.runs / "cache", found)
        if run_plan.plugins.method.trains:
            kept = run_plan.pretrain_folder(request.runs) / "stage.json"
            found.shared = kept.exists() or run_plan.pretrain_key in self.counted
            if not found.shared:
                self._stage(run_plan, request, "pretrain", found)
        self.counted.add(run_plan.pretrain_key)
        self._stage(run_plan, request, "finetune", found)
        self._evaluation(run_plan, request.runs / "cache", found)
        found.disk += RECORD_BYTES
        return found

    def _once(self, what: list[Any], measure: Callable[[], Any]) -> Any:
        key = digest(what)
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def _preparation(self, run_plan: RunPlan, cache: Path, found: Estimate) -> None:
        """One case is prepared, and kept; the others take as much per byte."""
        sets: list[tuple[Any, Sequence[Case], Any]] = [
            (run_plan.task, (*run_plan.train, *run_plan.test), run_plan.data.inventory.digests),
            *((result.corpus, result.cases, result.inventory.digests) for result in run_plan.corpora),
        ]
        seconds = 0.0
        for images, cases, digests in sets:
            missing = [volume for volume in prepared(images, cases, digests, cache) if not volume.whole(False)]
            missing = [volume for volume in missing if volume.description not in self.counted]
            if not missing:
                continue
            began = time.perf_counter()
            preprocess_cases(images, [missing[0].case], digests, cache)
            one = time.perf_counter() - began
            disk, largest = needed(images, missing[1:])
            seconds += one + one * len(missing[1:]) / num_workers(largest, len(missing))
            found.disk += disk
            self.counted |= {volume.description for volume in missing}
        found.seconds["prepare"] = seconds

    def _stage(self, run_plan: RunPlan, request: Request, stage: str, found: Estimate) -> None:
        config, task = run_plan.config, run_plan.task
        spec = TrialSpec(request, config, task, run_plan.plugins, stage)
        settings = spec.settings
        number = run_plan.num_pretrain if stage == "pretrain" else len(run_plan.label_cases)
        steps, _ = settings.schedule(number)
        what: list[Any] = [
            stage,
            config.method if stage == "pretrain" else "",
            config.backbone,
            task.name,
            config.protocol,
        ]
        described = [
            settings,
            config.backbone_settings,
            config.method_settings if stage == "pretrain" else config.finetune,
        ]
        what += [result.model_dump(mode="json", exclude={"steps", "epochs", "lr"}) for result in described]
        result, seconds, preparing = self._once(what, partial(_watch, spec))
        if result.problem:
            found.problem = f"{stage}: {result.problem}"
            return
        found.seconds[stage] = steps * seconds
        if stage == "pretrain":
            found.seconds["method_prepare"] = preparing
        found.host_gib = max(found.host_gib, result.memory.get("host_peak_gib") or 0.0)
        on_device = result.memory.get("device_peak_gib")
        found.device_gib = on_device if found.device_gib is None else max(found.device_gib, on_device or 0.0)
        found.disk += 4 * result.parameters + PER_STEP_BYTES * steps

    def _evaluation(self, run_plan: RunPlan, cache: Path, found: Estimate) -> None:
        """One test case, as it is evaluated, by a network that has learnt nothing; the others by their voxels."""
        task, config = run_plan.task, run_plan.config
        case = run_plan.test[0]
        (volume,) = preprocess_cases(task, [case], run_plan.data.inventory.digests, cache)
        settings = [config.backbone_settings, config.finetune, config.evaluate]
        what = [
            "evaluate",
            config.backbone,
            config.protocol,
            task.name,
            case.id,
            *(s.model_dump(mode="json") for s in settings),
        ]
        one = self._once(what, partial(_evaluate_one, run_plan, volume))
        voxels = [prod(read_header(result.images[0]).shape[:3]) for result in run_plan.test]
        found.seconds["evaluate"] = one * sum(voxels) / voxels[0]
        arrays = 4 * prod(volume.shape) * (2 * len(task.channels) + 4 * task.num_outputs)
        found.host_gib = max(found.host_gib, arrays / 2**30)


def _watch(spec: TrialSpec) -> tuple[TrialResult, float, float]:
    """Memory and parameters, seconds per step with its data, and seconds of the method's preparation."""
    result, settings = TrialResult(spec), spec.settings
    say(f"measuring a few steps: {spec}, {spec.stage}")
    measure_apart(result)
    if result.problem:
        return result, 0.0, 0.0
    with TemporaryDirectory(prefix="harness-estimate-") as place:
        folder = Path(place)
        trial = Trial(spec, made_up_volumes(spec, folder), folder)
        with compiled(trial.trainer.module, settings.compile):
            trial.timed(1)
            first = sum(values[-1] for values in trial.timed(1).values())
            timed = trial.timed(int(np.clip(STEPS_SECONDS / first, 1, 100)))
        step = float(np.median(np.sum(list(timed.values()), axis=0)))
        data = settings.batch_size * trial.sample_seconds()
        # Workers make the next batches while a step runs; without them it waits for each.
        whole = max(step, data / settings.workers) if settings.workers else step + data
        return result, whole, trial.prepare_seconds


def _evaluate_one(run_plan: RunPlan, volume: Volume) -> float:
    """Seconds to predict and score one case, the faster of two times."""
    task, config = run_plan.task, run_plan.config
    network = new_network(run_plan.plugins.new_backbone(config, len(task.channels)), task, config.protocol)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        probabilities = predict(task, network, volume.image, config.finetune, config.evaluate)
        predicted = volume.geometry.decide(task, probabilities)
        reference, spacing = read_reference(task, volume.case)
        # Scored against itself turned round: the empty prediction of random weights would cost nothing.
        metrics.score(reference[:, ::-1] | predicted[:, :1], reference, spacing, new_scoring(config.evaluate))
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def render(found: Sequence[Estimate], jobs: int = 1) -> str:
    """A table for the terminal, with the sum of all."""
    stages = ("prepare", "method_prepare", "pretrain", "finetune", "evaluate")
    lines = [["run", *(stage.replace("_", " ") for stage in stages), "total", "host GiB", "device GiB", "disk"]]
    for result in found:
        if result.finished:
            lines.append([result.name, *["-"] * len(stages), "finished", "-", "-", "-"])
            continue
        if result.problem:
            lines.append([result.name, *["-"] * len(stages), result.problem, "-", "-", "-"])
            continue
        spans = [duration(result.seconds[stage]) if stage in result.seconds else "-" for stage in stages]
        if result.shared:
            spans[2] = "shared"
        on_device = f"{result.device_gib:.2f}" if result.device_gib is not None else "-"
        lines.append(
            [result.name, *spans, duration(result.total), f"{result.host_gib:.2f}", on_device, size(result.disk)]
        )
    table = align(lines)
    total, disk = sum(result.total for result in found), sum(result.disk for result in found)
    if len(found) > 1:
        beside = f", {duration(total / jobs)} with {jobs} jobs if they do not slow each other" if jobs > 1 else ""
        table += ["", f"{len(found)} runs: {duration(total)}{beside}; {size(disk)} on disk"]
    return "\n".join(table)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever is easily read."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def size(count: int) -> str:
    """Bytes in MiB or GiB."""
    return f"{count / 2**20:.0f} MiB" if count < 2**30 else f"{count / 2**30:.2f} GiB"


def machine() -> str:
    """The machine that the estimate is for."""
    described = environment.describe_environment(new_accelerator().device)
    return f"{described['gpu'] or described['cpu']}, {described['threads']} threads, torch {described['torch']}"
