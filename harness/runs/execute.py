"""One run from names to record: resolve, check, prepare, pre-train, fine-tune, evaluate, record."""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from harness.compute.processes import Processes
from harness.config.request import Request
from harness.data.volumes import Volume, preprocess_cases
from harness.evaluation.evaluate import evaluate
from harness.runs.finished import FinishedRun, digest_request, finished_run, read_record
from harness.runs.locate import locate
from harness.runs.plan import RunPlan, plan
from harness.runs.record import make_record
from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import digest_file, write_atomic
from harness.system.locks import Lock
from harness.training.finetune import finetune
from harness.training.loop import StageContext
from harness.training.models import load_network
from harness.training.pretrain import PICTURE, pretrain
from harness.training.stage_files import read_stage
from harness.training.trackers import tracked


def run(request: Request) -> FinishedRun:
    """Carry out a run, or answer with the finished one.

    Started by a launcher as several processes, all of them share the work; the first one decides and writes.

    Raises:
        UserError: anything that the user can mend; what is finished stays finished.
        Interrupted: a signal came; the same run goes on later.
    """
    team, runs = Processes(), request.runs
    located = team.first(lambda: locate(request))
    registry, _, root, corpora = located
    asked = team.decide(lambda: digest_request(request, registry, [root, *(place for _, place in corpora)]))
    known = team.decide(lambda: finished_run(runs, asked, request.save_predictions))
    if known is not None:
        return FinishedRun(known, read_record(known), again=True)
    setting = team.first(lambda: plan(request, *located))
    folder = runs / setting.run_id
    with team.held(folder / "run", f"run {setting.run_id}") as lock:
        again = team.decide((folder / "record.json").exists)
        wanted = request.save_predictions and not (folder / "predictions").is_dir()
        if not again:
            _execute(setting, request, folder, team, lock)
        elif wanted:
            _evaluate_again(setting, runs, folder, team)
        team.decide(lambda: write_atomic(runs / "cache" / "requests" / asked, setting.run_id))
    return FinishedRun(folder, read_record(folder), again=again and not wanted)


def pretrain_only(request: Request) -> Path:
    """The pre-training of a run, for whichever run shares it. Returns its folder.

    Raises:
        UserError: as `run`, or the method pre-trains nothing.
    """
    team = Processes()
    located = team.first(lambda: locate(request))
    setting = team.first(lambda: plan(request, *located))
    if not setting.plugins.method.trains:
        raise UserError(f"method {request.method!r} pre-trains nothing: leave --until pretrain out")
    with tracked(
        request.how.trackers, setting.run_id, setting.config.model_dump(mode="json"), request.runs, team
    ) as log:
        _, _, pretrain_on = team.first(lambda: _volumes(setting, request.runs / "cache"))
        _pretrained(setting, request.runs, pretrain_on, StageContext(team, request.how, log))
    return setting.pretrain_folder(request.runs)


def _execute(setting: RunPlan, request: Request, folder: Path, team: Processes, lock: Lock | None) -> None:
    with tracked(
        request.how.trackers, setting.run_id, setting.config.model_dump(mode="json"), request.runs, team
    ) as log:
        _compute(setting, request, folder, StageContext(team, request.how, log).under(lock))


def _compute(setting: RunPlan, request: Request, folder: Path, carried: StageContext) -> None:
    config, task, team, started = setting.config, setting.task, carried.team, time.perf_counter()
    say(f"run {setting.run_id}")
    team.decide(lambda: write_atomic(folder / "config.json", config.model_dump_json(indent=1)))
    train, test, pretrain_on = team.first(lambda: _volumes(setting, request.runs / "cache"))
    seconds = {"prepare": time.perf_counter() - started}
    weights, stage = _pretrained(setting, request.runs, pretrain_on, carried)
    seconds |= {"pretrain": stage["seconds"], "method_prepare": stage["prepare_seconds"]} if stage else {}
    tuned = _finetuned(setting, train[: len(setting.label_cases)], weights, stage, folder, carried)
    seconds["finetune"] = tuned["trained"]["seconds"]
    network = load_network(config, setting.plugins, task, folder)
    summary, seconds["evaluate"] = evaluate(
        *(config, task, network, tuned["weights"], test, folder, _title(setting), team, request.save_predictions)
    )
    carried.check()
    record = make_record(setting, summary, seconds, tuned, network, stage)

    def finish() -> None:
        record["digests"] = {name: digest_file(folder / name) for name in ("cases.csv", "weights.safetensors")}
        write_atomic(folder / "record.json", json.dumps(record, indent=1, allow_nan=False))
        shutil.rmtree(folder / "evaluation", ignore_errors=True)

    team.decide(finish)


def _finetuned(
    setting: RunPlan,
    volumes: Sequence[Volume],
    weights: Mapping[str, Tensor],
    stage: dict[str, Any],
    folder: Path,
    carried: StageContext,
) -> dict[str, Any]:
    """What fine-tuning left in the run's folder, now or before."""

    def kept() -> dict[str, Any] | None:
        return read_stage(folder / "finetune.json")

    if (found := carried.team.decide(kept)) is not None:
        say(f"fine-tuning found in {folder}")
        return found

    def begin() -> str:
        if not stage:
            return ""
        if stage["picture"].exists():
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(stage["picture"], folder / "figures" / stage["picture"].name)
        head: str = stage["history"].read_text()
        return head

    head = carried.team.decide(begin)
    task = setting.task
    repeat_stem = setting.pretrain_channels == 1 < len(task.channels) and bool(setting.corpora)
    finetune(setting.config, setting.plugins, task, volumes, weights, folder, carried, repeat_stem, head)
    made = carried.team.decide(kept)
    if made is None:
        raise UserError(f"{folder} was changed while the run wrote to it: ask again, and it goes on")
    say(made["transfer"]["text"])
    return made


def _volumes(setting: RunPlan, cache: Path) -> tuple[list[Volume], list[Volume], list[Volume]]:
    """Prepared volumes to train on, to test on, and to pre-train on."""
    digests = setting.data.inventory.digests
    cases = {case.id: case for case in (*setting.train, *setting.test)}
    # Verified, since a record is to be believed: a pass over the cache is nothing beside a training.
    prepared = preprocess_cases(setting.task, list(cases.values()), digests, cache, verify=True)
    volumes = dict(zip(cases, prepared, strict=True))
    train, test = ([volumes[case.id] for case in side] for side in (setting.train, setting.test))
    if not setting.corpora:
        return train, test, train
    scans = [
        preprocess_cases(each.corpus, each.cases, each.inventory.digests, cache, verify=True)
        for each in setting.corpora
    ]
    return train, test, [volume for each in scans for volume in each]


def _title(setting: RunPlan) -> str:
    config = setting.config
    marks = "PHANTOM - " if setting.phantom else ""
    marks += "TRAINED ON TEST CASES - " if setting.num_test_seen else ""
    return f"{marks}{config.task}, {config.method} on {config.backbone}, preset {config.preset}, seed {config.seed}"


def _evaluate_again(setting: RunPlan, runs: Path, folder: Path, team: Processes) -> None:
    """The same evaluation of a finished run once more, for its predictions; what was scored stays as it is."""
    network = load_network(setting.config, setting.plugins, setting.task, folder)
    _, test, _ = team.first(lambda: _volumes(setting, runs / "cache"))
    place, weights = folder / ".again", digest_file(folder / "weights.safetensors")
    evaluate(setting.config, setting.task, network, weights, test, place, _title(setting), team, save_predictions=True)

    def take() -> None:
        if (place / "cases.csv").read_bytes() != (folder / "cases.csv").read_bytes():
            say(f"the predictions now differ from those that {folder / 'cases.csv'} scored: another device or version?")
        (place / "predictions").replace(folder / "predictions")
        shutil.rmtree(place, ignore_errors=True)

    team.decide(take)


def _pretrained(
    setting: RunPlan, runs: Path, volumes: Sequence[Volume], carried: StageContext
) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """What fine-tuning starts from, and the pre-training stage; an earlier one where all that determines it is the same."""
    config, plugins, channels = setting.config, setting.plugins, setting.pretrain_channels
    if not plugins.method.trains:
        return plugins.method(config.method_settings, plugins.new_backbone(config, channels)).weights(), {}
    folder, team = setting.pretrain_folder(runs), carried.team
    with team.held(folder / "stage", f"the pre-training {folder.name}") as lock:
        stage = team.decide(lambda: _kept_pretraining(folder))
        if stage is not None:
            say(f"pre-training found in {folder}")
        else:
            discovery = (setting.discovery, runs / "cache" / "prepared-by-methods" / config.method)
            mark = "PHANTOM - " if setting.phantom else ""
            title = f"{mark}{config.method} on {config.backbone}, after pre-training"
            pretrain(config, plugins, channels, volumes, folder, discovery, carried.under(lock), title)
            stage = team.decide(lambda: _kept_pretraining(folder))
    if stage is None:
        raise UserError(f"{folder} was changed while the run wrote to it: ask again, and it goes on")
    return load_file(folder / "weights.safetensors"), stage | _left(folder)


def _left(folder: Path) -> dict[str, Path]:
    """What a pre-training leaves for the runs that use it."""
    return {"history": folder / "history.jsonl", "picture": folder / PICTURE}


def _kept_pretraining(folder: Path) -> dict[str, Any] | None:
    """What an earlier pre-training left; None where a part of it is missing or damaged."""
    stage = read_stage(folder / "stage.json") if (folder / "history.jsonl").exists() else None
    if stage is None and (folder / "stage.json").exists():
        say(f"{folder} is not whole: pre-training again")
    return stage
