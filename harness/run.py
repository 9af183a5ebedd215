"""One run from names to record: resolve, check, prepare, pre-train, fine-tune, evaluate, record."""

import json
import platform
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.files import check_name, digest, digest_file, digest_tree, read_json, read_stage, write_atomic
from harness.locks import Lock
from harness.planning import Request, Setting, locate, plan
from harness.progress import say
from harness.registry import Registry
from harness.team import Carried, Team
from harness.tracking import tracked

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.volumes import Volume

SCHEMA = 1


@dataclass(frozen=True)
class Finished:
    """A finished run; `again` says that it was there already."""

    folder: Path
    record: dict[str, Any]
    again: bool


def run(request: Request) -> Finished:
    """Carry out a run, or answer with the finished one.

    Started by a launcher as several processes, all of them share the work; the first one decides and writes.

    Raises:
        UserError: anything that the user can mend; what is finished stays finished.
        Interrupted: a signal came; the same run goes on later.
    """
    team, runs = Team(), request.runs
    located = team.first(lambda: locate(request))
    registry, _, root, corpora = located
    asked = team.decide(lambda: _digest_request(request, registry, [root, *(place for _, place in corpora)]))
    known = team.decide(lambda: _answer(runs, asked, request.save_predictions))
    if known is not None:
        return Finished(known, _read_record(known), again=True)
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
    return Finished(folder, _read_record(folder), again=again and not wanted)


def pretrain_only(request: Request) -> Path:
    """The pre-training of a run, for whichever run shares it. Returns its folder.

    Raises:
        UserError: as `run`, or the method pre-trains nothing.
    """
    team = Team()
    located = team.first(lambda: locate(request))
    setting = team.first(lambda: plan(request, *located))
    if not setting.plugins.method.trains:
        raise UserError(f"method {request.method!r} pre-trains nothing: leave --until pretrain out")
    with tracked(request.how.trackers, setting, request.runs, team) as log:
        _, _, pretrain_on = team.first(lambda: _volumes(setting, request.runs / "cache"))
        _pretrained(setting, request.runs, pretrain_on, Carried(team, request.how, log))
    return setting.pretrain_folder(request.runs)


def _execute(setting: Setting, request: Request, folder: Path, team: Team, lock: Lock | None) -> None:
    with tracked(request.how.trackers, setting, request.runs, team) as log:
        _compute(setting, request, folder, Carried(team, request.how, log).under(lock))


def _compute(setting: Setting, request: Request, folder: Path, carried: Carried) -> None:
    from harness.evaluation import evaluate
    from harness.stages import load_network

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
    record = _record(setting, summary, seconds, tuned, network, stage)

    def finish() -> None:
        record["digests"] = {name: digest_file(folder / name) for name in ("cases.csv", "weights.safetensors")}
        write_atomic(folder / "record.json", json.dumps(record, indent=1, allow_nan=False))
        shutil.rmtree(folder / "evaluation", ignore_errors=True)

    team.decide(finish)


def _finetuned(
    setting: Setting,
    volumes: "Sequence[Volume]",
    weights: "Mapping[str, Tensor]",
    stage: dict[str, Any],
    folder: Path,
    carried: Carried,
) -> dict[str, Any]:
    """What fine-tuning left in the run's folder, now or before."""
    from harness.stages import finetune

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


def _volumes(setting: Setting, cache: Path) -> "tuple[list[Volume], list[Volume], list[Volume]]":
    """Prepared volumes to train on, to test on, and to pre-train on."""
    from harness.volumes import prepare

    digests = setting.data.inventory.digests
    cases = {case.id: case for case in (*setting.train, *setting.test)}
    # Verified, since a record is to be believed: a pass over the cache is nothing beside a training.
    prepared = prepare(setting.task, list(cases.values()), digests, cache, verify=True)
    volumes = dict(zip(cases, prepared, strict=True))
    train, test = ([volumes[case.id] for case in side] for side in (setting.train, setting.test))
    if not setting.corpora:
        return train, test, train
    scans = [prepare(each.corpus, each.cases, each.inventory.digests, cache, verify=True) for each in setting.corpora]
    return train, test, [volume for each in scans for volume in each]


def _title(setting: Setting) -> str:
    config = setting.config
    marks = "PHANTOM - " if setting.phantom else ""
    marks += "TRAINED ON TEST CASES - " if setting.num_test_seen else ""
    return f"{marks}{config.task}, {config.method} on {config.backbone}, preset {config.preset}, seed {config.seed}"


def _evaluate_again(setting: Setting, runs: Path, folder: Path, team: Team) -> None:
    """The same evaluation of a finished run once more, for its predictions; what was scored stays as it is."""
    from harness.evaluation import evaluate
    from harness.stages import load_network

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
    setting: Setting, runs: Path, volumes: "Sequence[Volume]", carried: Carried
) -> "tuple[Mapping[str, Tensor], dict[str, Any]]":
    """What fine-tuning starts from, and the pre-training stage; an earlier one where all that determines it is the same."""
    from safetensors.torch import load_file

    from harness.stages import pretrain

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
    from harness.stages import PICTURE

    return {"history": folder / "history.jsonl", "picture": folder / PICTURE}


def _kept_pretraining(folder: Path) -> dict[str, Any] | None:
    """What an earlier pre-training left; None where a part of it is missing or damaged."""
    stage = read_stage(folder / "stage.json") if (folder / "history.jsonl").exists() else None
    if stage is None and (folder / "stage.json").exists():
        say(f"{folder} is not whole: pre-training again")
    return stage


def _record(
    setting: Setting,
    summary: dict[str, Any],
    seconds: dict[str, float],
    tuned: dict[str, Any],
    network: "nn.Module",
    stage: dict[str, Any],
) -> dict[str, Any]:
    from harness import hardware
    from harness.evaluation import new_scoring

    config, task, trained = setting.config, setting.task, tuned["trained"]
    device, scoring = next(network.parameters()).device, new_scoring(config.evaluate)
    peaks = [hardware.memory(device), tuned["memory"]]
    transfer = {name: value for name, value in tuned["transfer"].items() if name != "text"}
    return {
        "schema": SCHEMA,
        "run_id": setting.run_id,
        "method": config.method,
        "method_version": setting.plugins.method.version,
        "backbone": config.backbone,
        "task": task.name,
        "task_version": task.version,
        "mode": config.mode,
        "protocol": config.protocol,
        "preset": config.preset,
        "overrides": config.overrides,
        "label_fraction": config.label_fraction,
        "seed": config.seed,
        "data": _data_record(setting),
        "task_description": {
            "channels": list(task.channels),
            "targets": {name: list(values) for name, values in task.targets.items()},
            "labels": list(task.labels),
            "overlapping": task.overlapping,
        },
        "config": config.model_dump(mode="json"),
        "metrics": summary,
        "metric_policy": scoring.policy,
        "metric_definitions": {"hd95": scoring.hd95, "surface_dice_tolerance_mm": scoring.tolerance, "unit": "mm"},
        "timing": {
            "pretrain_step": stage.get("clock"),
            "finetune_step": trained["clock"],
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        },
        "computed_with": {"pretrain": stage.get("used"), "finetune": trained["used"]},
        "resumed": {"pretrain": stage.get("resumed", 0), "finetune": trained["resumed"]},
        "skipped_steps": {"pretrain": stage.get("skipped", []), "finetune": trained["skipped"]},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "memory": {"pretrain": stage.get("memory"), "run": {key: _most(peaks, key) for key in peaks[0]}},
        "environment": hardware.environment(device),
        "transfer": transfer,
        "method_prepare": stage.get("prepared", {}),
        "files": setting.files,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _most(peaks: list[dict[str, Any]], key: str) -> float | None:
    """The larger one of what several processes, one after the other, needed."""
    known = [peak[key] for peak in peaks if peak.get(key) is not None]
    return max(known, default=None)


def _data_record(setting: Setting) -> dict[str, Any]:
    data, split = setting.data, setting.data.split
    scans = [case.id for each in setting.corpora for case in each.cases]
    return {
        "source": "phantom" if setting.phantom else "real",
        "fingerprint": data.fingerprint,
        "licence": setting.task.licence,
        "n_train": len(setting.label_cases),
        "n_test": len(setting.test),
        "train": [case.id for case in setting.label_cases],
        "pretrain": scans or [case.id for case in setting.train],
        "test": [case.id for case in setting.test],
        "split": setting.config.split,
        "split_by": split.by,
        "left_out": split.left_out,
        "repeated": split.repeated,
        "corpora": [
            {
                "name": each.corpus.name,
                "fingerprint": each.label.partition("@")[2],
                "n": len(each.cases),
                "normalisation": repr(each.corpus.normalisation),
                "spacing": each.corpus.spacing,
                "licence": each.corpus.licence,
                "skipped": each.inventory.bad,
            }
            for each in setting.corpora
        ],
        "overlap": setting.overlap,
        "n_test_seen": setting.num_test_seen,
    }


def _digest_request(request: Request, registry: Registry, roots: Sequence[Path]) -> str:
    """Recognises a request that was answered before without importing torch: names, sources and data unchanged."""
    asked = asdict(request) | {
        "runs": None,
        "data": [str(root.resolve()) for root in roots],
        "save_predictions": None,
        "how": None,
    }
    paths = [Path(pair.partition("=")[2]) for pair in request.settings]
    asked["files"] = [digest_file(path) for path in paths if path.is_file()]
    engine = digest_tree(Path(__file__).parent)
    plugins = registry.digest_sources()
    return digest([asked, engine, plugins, [digest_tree(root) for root in roots], platform.node()])


def _answer(runs: Path, asked: str, predictions: bool) -> Path | None:
    """The folder of the run that answered the same request before."""
    known = runs / "cache" / "requests" / asked
    try:
        folder = runs / check_name(known.read_text())
    except (OSError, ValueError, UserError):
        return None
    if predictions and not (folder / "predictions").is_dir():
        return None
    return folder if (folder / "record.json").exists() else None


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "record.json")
    if not isinstance(record, dict):
        raise UserError(f"{folder / 'record.json'} is damaged: remove the folder {folder} and ask again")
    return record
