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
from harness.data.cases import load_label, num_workers
from harness.data.image_files import read_header
from harness.data.volumes import Volume, needed, prepared, preprocess_cases
from harness.evaluation import metrics
from harness.evaluation.evaluate import new_scoring
from harness.evaluation.sliding_window import predict
from harness.runs.locate import locate
from harness.runs.plan import RunPlan, plan
from harness.system.console import say
from harness.system.files import digest
from harness.training.protocols import with_head
from harness.training.trainer import compiled
from leaderboards.table import align

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
        setting = plan(request, *locate(request))
        found = Estimate(setting.run_id)
        if (request.runs / setting.run_id / "record.json").exists():
            found.finished = True
            return found
        self._preparation(setting, request.runs / "cache", found)
        if setting.plugins.method.trains:
            kept = setting.pretrain_folder(request.runs) / "stage.json"
            found.shared = kept.exists() or setting.pretrain_key in self.counted
            if not found.shared:
                self._stage(setting, request, "pretrain", found)
        self.counted.add(setting.pretrain_key)
        self._stage(setting, request, "finetune", found)
        self._evaluation(setting, request.runs / "cache", found)
        found.disk += RECORD_BYTES
        return found

    def _once(self, what: list[Any], measure: Callable[[], Any]) -> Any:
        key = digest(what)
        if key not in self.known:
            self.known[key] = measure()
        return self.known[key]

    def _preparation(self, setting: RunPlan, cache: Path, found: Estimate) -> None:
        """One case is prepared, and kept; the others take as much per byte."""
        sets: list[tuple[Any, Sequence[Case], Any]] = [
            (setting.task, (*setting.train, *setting.test), setting.data.inventory.digests),
            *((each.corpus, each.cases, each.inventory.digests) for each in setting.corpora),
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

    def _stage(self, setting: RunPlan, request: Request, stage: str, found: Estimate) -> None:
        config, task = setting.config, setting.task
        cell = TrialSpec(request, config, task, setting.plugins, stage)
        settings = cell.settings
        number = setting.num_pretrain if stage == "pretrain" else len(setting.label_cases)
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
        what += [each.model_dump(mode="json", exclude={"steps", "epochs", "lr"}) for each in described]
        each, seconds, preparing = self._once(what, partial(_watch, cell))
        if each.problem:
            found.problem = f"{stage}: {each.problem}"
            return
        found.seconds[stage] = steps * seconds
        if stage == "pretrain":
            found.seconds["method_prepare"] = preparing
        found.host_gib = max(found.host_gib, each.memory.get("host_peak_gib") or 0.0)
        on_device = each.memory.get("device_peak_gib")
        found.device_gib = on_device if found.device_gib is None else max(found.device_gib, on_device or 0.0)
        found.disk += 4 * each.parameters + PER_STEP_BYTES * steps

    def _evaluation(self, setting: RunPlan, cache: Path, found: Estimate) -> None:
        """One test case, as it is evaluated, by a network that has learnt nothing; the others by their voxels."""
        task, config = setting.task, setting.config
        case = setting.test[0]
        (volume,) = preprocess_cases(task, [case], setting.data.inventory.digests, cache)
        settings = [config.backbone_settings, config.finetune, config.evaluate]
        what = [
            "evaluate",
            config.backbone,
            config.protocol,
            task.name,
            case.id,
            *(s.model_dump(mode="json") for s in settings),
        ]
        one = self._once(what, partial(_evaluate_one, setting, volume))
        voxels = [prod(read_header(each.images[0]).shape[:3]) for each in setting.test]
        found.seconds["evaluate"] = one * sum(voxels) / voxels[0]
        arrays = 4 * prod(volume.shape) * (2 * len(task.channels) + 4 * task.num_outputs)
        found.host_gib = max(found.host_gib, arrays / 2**30)


def _watch(cell: TrialSpec) -> tuple[TrialResult, float, float]:
    """Memory and parameters, seconds per step with its data, and seconds of the method's preparation."""
    each, settings = TrialResult(cell), cell.settings
    say(f"measuring a few steps: {cell}, {cell.stage}")
    measure_apart(each)
    if each.problem:
        return each, 0.0, 0.0
    with TemporaryDirectory(prefix="harness-estimate-") as place:
        folder = Path(place)
        subject = Trial(cell, made_up_volumes(cell, folder), folder)
        with compiled(subject.trainer.module, settings.compile):
            subject.timed(1)
            first = sum(values[-1] for values in subject.timed(1).values())
            timed = subject.timed(int(np.clip(STEPS_SECONDS / first, 1, 100)))
        step = float(np.median(np.sum(list(timed.values()), axis=0)))
        data = settings.batch_size * subject.sample_seconds()
        # Workers make the next batches while a step runs; without them it waits for each.
        whole = max(step, data / settings.workers) if settings.workers else step + data
        return each, whole, subject.prepare_seconds


def _evaluate_one(setting: RunPlan, volume: Volume) -> float:
    task, config = setting.task, setting.config
    backbone = setting.plugins.new_backbone(config, len(task.channels))
    network = with_head(backbone, task.num_outputs, config.protocol).to(new_accelerator().device)
    elapsed = []
    for _ in range(2):
        began = time.perf_counter()
        probabilities = predict(task, network, volume.image, config.finetune, config.evaluate)
        predicted = volume.geometry.decide(task, probabilities)
        label, affine, _ = load_label(task, volume.case)
        # Scored against itself turned round: an empty prediction would cost nothing.
        spacing = np.linalg.norm(affine[:3, :3], axis=0)
        reference = task.masks(label)
        metrics.score(reference[:, ::-1] | predicted[:, :1], reference, spacing, new_scoring(config.evaluate))
        elapsed.append(time.perf_counter() - began)
    return min(elapsed)


def render(found: Sequence[Estimate], jobs: int = 1) -> str:
    """A table for the terminal, with the sum of all."""
    stages = ("prepare", "method_prepare", "pretrain", "finetune", "evaluate")
    lines = [["run", *(stage.replace("_", " ") for stage in stages), "total", "host GiB", "device GiB", "disk"]]
    for each in found:
        if each.finished:
            lines.append([each.name, *["-"] * len(stages), "finished", "-", "-", "-"])
            continue
        if each.problem:
            lines.append([each.name, *["-"] * len(stages), each.problem, "-", "-", "-"])
            continue
        spans = [duration(each.seconds[stage]) if stage in each.seconds else "-" for stage in stages]
        if each.shared:
            spans[2] = "shared"
        on_device = f"{each.device_gib:.2f}" if each.device_gib is not None else "-"
        lines.append([each.name, *spans, duration(each.total), f"{each.host_gib:.2f}", on_device, size(each.disk)])
    table = align(lines)
    total, disk = sum(each.total for each in found), sum(each.disk for each in found)
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
