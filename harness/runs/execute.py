"""Computes one run, from the names in a request to the record: plan, preprocess, pre-train, fine-tune, evaluate, record."""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from harness.compute.environment import advise_on_other_work
from harness.compute.processes import Processes
from harness.config.request import Request
from harness.data.volumes import Volume, preprocess_cases
from harness.evaluation.evaluate import evaluate
from harness.evaluation.validation import Validation
from harness.runs.finished import FinishedRun, digest_request, finished_folder, read_finished
from harness.runs.locate import locate
from harness.runs.plan import RunPlan, plan
from harness.runs.probe import Probe
from harness.runs.record import in_kwh, make_record
from harness.runs.tune import TRIALS, tune
from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import digest_file, write_atomic
from harness.system.locks import Lock
from harness.training.finetune import finetune
from harness.training.lineage import cache_lineage
from harness.training.loop import StageContext
from harness.training.models import new_network, seed_for
from harness.training.pretrain import PICTURE, pretrain
from harness.training.stage_files import PROBE, read_stage
from harness.training.trackers import tracked


def run(request: Request) -> FinishedRun:
    """Compute a run, or return the finished run that answered the same request before.

    If a launcher started several processes, all of them share the work. The first one decides and writes.

    Raises:
        UserError: any problem that the user can fix; finished stages are kept.
        Interrupted: a signal arrived; the same request goes on from there later.
    """
    processes, runs = Processes(), request.runs
    located = processes.first(lambda: locate(request))
    registry, _, root, corpora = located
    key = processes.decide(lambda: digest_request(request, registry, [root, *(folder for _, folder in corpora)]))
    before = processes.decide(lambda: finished_folder(runs, key, request.save_predictions))
    if before is not None:
        return FinishedRun(before, read_finished(before), again=True)
    run_plan = processes.first(lambda: plan(request, *located))
    folder = runs / run_plan.run_id
    with processes.held(folder / "run", f"run {run_plan.run_id}") as lock:
        again = processes.decide((folder / "record.json").exists)
        predictions_missing = request.save_predictions and not (folder / "predictions").is_dir()
        if not again:
            _execute(run_plan, request, folder, processes, lock)
        elif predictions_missing:
            _predict_again(run_plan, runs, folder, processes)
        processes.decide(lambda: write_atomic(runs / "cache" / "requests" / key, run_plan.run_id))
    return FinishedRun(folder, read_finished(folder), again=again and not predictions_missing)


def pretrain_only(request: Request) -> Path:
    """Compute only the pre-training of a run, for all runs that share it. Returns its folder.

    Raises:
        UserError: as `run`, or the method pre-trains nothing.
        Interrupted: as `run`.
    """
    processes = Processes()
    located = processes.first(lambda: locate(request))
    run_plan = processes.first(lambda: plan(request, *located))
    if not run_plan.plugins.method.trains:
        raise UserError(f"method {request.method!r} pre-trains nothing: leave --until pretrain out")
    with _tracked(run_plan, request, processes) as context:
        volumes = processes.first(lambda: _volumes(run_plan, request.runs / "cache"))
        _pretrain_or_reuse(run_plan, request.runs, volumes, context)
    return run_plan.pretrain_folder(request.runs)


def _execute(run_plan: RunPlan, request: Request, folder: Path, processes: Processes, lock: Lock | None) -> None:
    """Compute all stages of a run and its record, with trackers."""
    with _tracked(run_plan, request, processes) as context:
        _compute(run_plan, request, folder, context.under(lock))


@contextmanager
def _tracked(run_plan: RunPlan, request: Request, processes: Processes) -> Iterator[StageContext]:
    """Open the trackers of a run, and yield the context of its stages."""
    execution, config = request.execution, run_plan.config.model_dump(mode="json")
    with tracked(execution.trackers, run_plan.run_id, config, request.runs, processes) as log:
        yield StageContext(processes, execution, log)


def _compute(run_plan: RunPlan, request: Request, folder: Path, context: StageContext) -> None:
    """Compute the stages that are not finished yet, evaluate, and write the record."""
    config, task, processes, began = run_plan.config, run_plan.task, context.processes, time.perf_counter()
    say(f"run {run_plan.run_id}")
    processes.decide(advise_on_other_work)
    processes.decide(lambda: write_atomic(folder / "config.json", config.model_dump_json(indent=1)))
    volumes = processes.first(lambda: _volumes(run_plan, request.runs / "cache"))
    seconds = {"prepare": time.perf_counter() - began}
    weights, stage = _pretrain_or_reuse(run_plan, request.runs, volumes, context)
    seconds |= {"pretrain": stage["seconds"], "method_prepare": stage["prepare_seconds"]} if stage else {}
    tuning = None
    if run_plan.trials:
        tuning = tune(run_plan, folder, processes, partial(_try, volumes, weights, stage, context))
        seconds["tune"] = tuning.seconds
    tuned_plan = tuning.run_plan if tuning else run_plan
    finetuned, validation = _finetune_or_reuse(tuned_plan, volumes, weights, stage, folder, context)
    seconds["finetune"] = finetuned["trained"]["seconds"]
    network = _load_network(run_plan, folder)
    summary, seconds["evaluate"] = evaluate(
        config,
        task,
        network,
        finetuned["weights"],
        volumes.test,
        folder,
        _title(run_plan),
        processes,
        save_predictions=request.save_predictions,
    )
    context.check()
    record = make_record(run_plan, summary, seconds, finetuned, network, stage)
    record["validation"] = validation.record()
    if tuning is not None:
        record |= {"tuning": tuning.record, "config": tuning.run_plan.config.model_dump(mode="json")}
        record["energy"]["tune_kwh"] = in_kwh(tuning.joules)

    def finish() -> None:
        """Write the record; remove the per-case scores, which `cases.csv` now has, and the other trials of tuning."""
        record["digests"] = {name: digest_file(folder / name) for name in ("cases.csv", "weights.safetensors")}
        cache_lineage(folder / "weights.safetensors", request.runs / "cache")
        write_atomic(folder / "record.json", json.dumps(record, indent=1, allow_nan=False))
        for name in ("evaluation", TRIALS):
            shutil.rmtree(folder / name, ignore_errors=True)

    processes.decide(finish)


@dataclass(frozen=True)
class _Volumes:
    """The preprocessed cases of a run. `labelled` are those of the training cases whose labels are used."""

    labelled: list[Volume]
    validation: list[Volume]
    test: list[Volume]
    pretrain: list[Volume]


def _volumes(run_plan: RunPlan, cache: Path) -> _Volumes:
    """Preprocess the cases of a run."""
    digests = run_plan.data.inventory.digests
    cases = {case.id: case for case in (*run_plan.train, *run_plan.validation, *run_plan.test)}
    # The cache is verified, because a record must be true. One pass over the files costs little compared with a training.
    preprocessed = preprocess_cases(run_plan.task, list(cases.values()), digests, cache, verify=True)
    volumes = dict(zip(cases, preprocessed, strict=True))
    scans = [
        preprocess_cases(data.corpus, data.cases, data.inventory.digests, cache, verify=True)
        for data in run_plan.corpora
    ]
    return _Volumes(
        labelled=[volumes[case.id] for case in run_plan.label_cases],
        validation=[volumes[case.id] for case in run_plan.validation],
        test=[volumes[case.id] for case in run_plan.test],
        pretrain=[volume for corpus_volumes in scans for volume in corpus_volumes]
        or [volumes[case.id] for case in run_plan.train],
    )


def _pretrain_or_reuse(
    run_plan: RunPlan, runs: Path, volumes: _Volumes, context: StageContext
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """The weights that fine-tuning starts from, and the report of pre-training.

    A finished pre-training with the same inputs is used again. The report is empty if the method pre-trains nothing.
    """
    config, plugins, channels = run_plan.config, run_plan.plugins, run_plan.pretrain_channels
    if not plugins.method.trains:
        torch.manual_seed(seed_for(config.seed, "pretrain init"))
        return plugins.new_method(config, channels).weights(), {}
    folder, processes = run_plan.pretrain_folder(runs), context.processes
    probe = _probe(run_plan, volumes, folder)
    with processes.held(folder / "stage", f"the pre-training {folder.name}") as lock:
        stage = processes.decide(lambda: _read_pretraining(folder))
        if stage is not None:
            say(f"pre-training found in {folder}")
        else:
            cache = (run_plan.preparation_identity, runs / "cache" / "prepared-by-methods" / config.method)
            mark = "PHANTOM - " if run_plan.phantom else ""
            title = f"{mark}{config.method} on {config.backbone}, after pre-training"
            watched = replace(context.under(lock), watch=probe, lineage=run_plan.pretrained_lineage)
            pretrain(config, plugins, run_plan.task, channels, volumes.pretrain, folder, cache, watched, title)
            stage = processes.decide(lambda: _read_pretraining(folder))
            processes.decide(lambda: cache_lineage(folder / "weights.safetensors", runs / "cache"))
    if stage is None:
        raise UserError(f"{folder} was changed while the run wrote to it: ask again, and it goes on")
    stage |= {"folder": folder, "probe": None if probe is None else probe.record()}
    return load_file(folder / "weights.safetensors"), stage


def _probe(run_plan: RunPlan, volumes: _Volumes, folder: Path) -> Probe | None:
    """What probes the features while pre-training runs; None without `pretrain.probe_every`."""
    config = run_plan.config
    if not config.pretrain.probe_every:
        return None
    steps, _ = config.pretrain.schedule(len(volumes.pretrain))
    labelled, validation = volumes.labelled, volumes.validation
    return Probe(config, run_plan.plugins, run_plan.task, labelled, validation, steps, folder / PROBE)


def _read_pretraining(folder: Path) -> dict[str, Any] | None:
    """The report of a finished pre-training; None if there is none, or its files are incomplete or damaged."""
    stage = read_stage(folder / "stage.json") if (folder / "history.jsonl").exists() else None
    if stage is None and (folder / "stage.json").exists():
        say(f"{folder} is not whole: pre-training again")
    return stage


def _try(
    volumes: _Volumes,
    weights: Mapping[str, Tensor],
    stage: dict[str, Any],
    context: StageContext,
    trial: RunPlan,
    folder: Path,
) -> dict[str, Any]:
    """Fine-tune with one setting of a grid. Returns the validation curve, the seconds and the joules."""
    finetuned, validation = _finetune_or_reuse(trial, volumes, weights, stage, folder, context)
    curve = context.processes.decide(lambda: validation.record()["curve"])
    trained = finetuned["trained"]
    return {"curve": curve, "seconds": round(trained["seconds"], 3), "joules": trained.get("joules")}


def _finetune_or_reuse(
    run_plan: RunPlan,
    volumes: _Volumes,
    weights: Mapping[str, Tensor],
    stage: dict[str, Any],
    folder: Path,
    context: StageContext,
) -> tuple[dict[str, Any], Validation]:
    """The report of fine-tuning, and its validation. A finished fine-tuning in the folder is used again."""
    file, task = folder / "finetune.json", run_plan.task
    steps, _ = run_plan.config.finetune.schedule(len(volumes.labelled))
    validation = Validation(run_plan.config, task, volumes.validation, steps, folder / "validation.json")
    before: dict[str, Any] | None = context.processes.decide(
        lambda: read_stage(file) if validation.is_complete else None
    )
    if before is not None:
        say(f"fine-tuning found in {folder}")
        return before, validation

    def take_over_pretraining() -> str:
        """Copy the picture of the pre-training to the run. Returns the text of its history."""
        if not stage:
            return ""
        picture = stage["folder"] / PICTURE
        if picture.exists():
            (folder / "figures").mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, folder / "figures" / picture.name)
        history: str = (stage["folder"] / "history.jsonl").read_text()
        return history

    history = context.processes.decide(take_over_pretraining)
    repeat_stem = run_plan.pretrain_channels == 1 < len(task.channels) and bool(run_plan.corpora)
    watched = replace(context, watch=validation, lineage=run_plan.finetuned_lineage)
    labelled = volumes.labelled
    finetune(run_plan.config, run_plan.plugins, task, labelled, weights, folder, watched, repeat_stem, history)
    finetuned = context.processes.decide(lambda: read_stage(file))
    if finetuned is None:
        raise UserError(f"{folder} was changed while the run wrote to it: ask again, and it goes on")
    say(finetuned["transfer"]["text"])
    return finetuned, validation


def _predict_again(run_plan: RunPlan, runs: Path, folder: Path, processes: Processes) -> None:
    """Evaluate a finished run once more to write its predictions; its scores stay unchanged."""
    network = _load_network(run_plan, folder)
    test = processes.first(lambda: _volumes(run_plan, runs / "cache")).test
    again, weights = folder / ".again", digest_file(folder / "weights.safetensors")
    evaluate(
        run_plan.config,
        run_plan.task,
        network,
        weights,
        test,
        again,
        _title(run_plan),
        processes,
        save_predictions=True,
    )

    def take_predictions() -> None:
        """Move the predictions into the run's folder; tell the user if the scores differ."""
        if (again / "cases.csv").read_bytes() != (folder / "cases.csv").read_bytes():
            say(f"the predictions now differ from those that {folder / 'cases.csv'} scored: another device or version?")
        (again / "predictions").replace(folder / "predictions")
        shutil.rmtree(again, ignore_errors=True)

    processes.decide(take_predictions)


def _load_network(run_plan: RunPlan, folder: Path) -> nn.Module:
    """The fine-tuned network in the folder of a run."""
    backbone = run_plan.plugins.new_backbone(run_plan.config, len(run_plan.task.channels))
    return new_network(backbone, run_plan.task, run_plan.config.protocol, folder / "weights.safetensors")


def _title(run_plan: RunPlan) -> str:
    """The title of the figure: warnings, names, preset and seed."""
    config = run_plan.config
    marks = "PHANTOM - " if run_plan.phantom else ""
    marks += "TRAINED ON TEST CASES - " if run_plan.num_test_seen else ""
    return f"{marks}{config.task}, {config.method} on {config.backbone}, preset {config.preset}, seed {config.seed}"
