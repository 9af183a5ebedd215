"""One run from names to record: resolve, check, prepare, pre-train, fine-tune, evaluate, record."""

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import UserError
from harness.files import digest, digest_file, digest_tree, read_json, write_atomic
from harness.planning import Request, Setting, locate, plan
from harness.progress import say
from harness.registry import Registry

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

    Raises:
        UserError: anything that the user can mend; stages that are finished stay finished.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a run takes one process in this version, WORLD_SIZE says several: start it without a launcher")
    registry, task, root, corpora = locate(request)
    asked = _digest_request(request, registry, [root, *(place for _, place in corpora)])
    finished = _answer(request.runs, asked, request.save_predictions)
    if finished is not None:
        return finished
    setting = plan(request, registry, task, root, corpora)
    folder = request.runs / setting.run_id
    if not (folder / "record.json").exists():
        _execute(setting, request.runs, folder, request.save_predictions)
        finished = Finished(folder, _read_record(folder), again=False)
    elif request.save_predictions and not (folder / "predictions").is_dir():
        _evaluate_again(setting, request.runs, folder)
    write_atomic(request.runs / "cache" / "requests" / asked, setting.run_id)
    return finished or Finished(folder, _read_record(folder), again=True)


def _execute(setting: Setting, runs: Path, folder: Path, save_predictions: bool) -> None:
    from harness.stages import evaluate, finetune

    config, task, started = setting.config, setting.task, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"run {setting.run_id}")
    write_atomic(folder / "config.json", config.model_dump_json(indent=1))
    train, test, pretrain_on = _volumes(setting, runs / "cache")
    seconds = {"prepare": time.perf_counter() - started}
    weights, stage = _pretrained(setting, runs, pretrain_on)
    (folder / "history.jsonl").unlink(missing_ok=True)
    if stage:
        shutil.copyfile(stage["history"], folder / "history.jsonl")
        if stage["picture"].exists():
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(stage["picture"], folder / "figures" / stage["picture"].name)
        seconds |= {"pretrain": stage["seconds"], "method_prepare": stage["prepare_seconds"]}
    repeat_stem = setting.pretrain_channels == 1 < len(task.channels) and bool(setting.corpora)
    network, trained, transfer = finetune(
        config, setting.plugins, task, train[: len(setting.label_cases)], weights, folder, repeat_stem
    )
    say(transfer.pop("text"))
    seconds["finetune"] = trained.seconds
    begun = time.perf_counter()
    summary = evaluate(config, task, network, test, folder, _title(setting), save_predictions)
    seconds["evaluate"] = time.perf_counter() - begun
    timing = {
        "pretrain_step": stage.get("clock"),
        "finetune_step": trained.clock,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    used = {"pretrain": stage.get("used"), "finetune": trained.used}
    record = _record(setting, summary, timing, used, transfer, network, stage)
    record["digests"] = {name: digest_file(folder / name) for name in ("cases.csv", "weights.safetensors")}
    write_atomic(folder / "record.json", json.dumps(record, indent=1, allow_nan=False))


def _volumes(setting: Setting, cache: Path) -> "tuple[list[Volume], list[Volume], list[Volume]]":
    """Prepared volumes to train on, to test on, and to pre-train on."""
    from harness.volumes import prepare

    digests = setting.data.inventory.digests
    cases = {case.id: case for case in (*setting.train, *setting.test)}
    prepared = prepare(setting.task, list(cases.values()), digests, cache)
    volumes = dict(zip(cases, prepared, strict=True))
    train, test = ([volumes[case.id] for case in side] for side in (setting.train, setting.test))
    if not setting.corpora:
        return train, test, train
    scans = [prepare(each.corpus, each.cases, each.inventory.digests, cache) for each in setting.corpora]
    return train, test, [volume for each in scans for volume in each]


def _title(setting: Setting) -> str:
    config = setting.config
    marks = "PHANTOM - " if setting.phantom else ""
    marks += "TRAINED ON TEST CASES - " if setting.num_test_seen else ""
    return f"{marks}{config.task}, {config.method} on {config.backbone}, preset {config.preset}, seed {config.seed}"


def _evaluate_again(setting: Setting, runs: Path, folder: Path) -> None:
    """The same evaluation of a finished run once more, for its predictions; what was scored stays as it is."""
    from safetensors.torch import load_file

    from harness.protocols import with_head
    from harness.stages import evaluate
    from harness.training import new_accelerator

    backbone = setting.plugins.new_backbone(setting.config, len(setting.task.channels))
    network = with_head(backbone, setting.task.num_outputs, setting.config.protocol)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    network.to(new_accelerator().device)
    _, test, _ = _volumes(setting, runs / "cache")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".again-") as again:
        place = Path(again)
        evaluate(setting.config, setting.task, network, test, place, _title(setting), save_predictions=True)
        if (place / "cases.csv").read_bytes() != (folder / "cases.csv").read_bytes():
            say(f"the predictions now differ from those that {folder / 'cases.csv'} scored: another device or version?")
        (place / "predictions").replace(folder / "predictions")


def _pretrained(
    setting: Setting, runs: Path, volumes: "Sequence[Volume]"
) -> "tuple[Mapping[str, Tensor], dict[str, Any]]":
    """What fine-tuning starts from, and the pre-training stage; an earlier one where all that determines it is the same."""
    from safetensors.torch import load_file

    from harness.stages import pretrain

    config, plugins, channels = setting.config, setting.plugins, setting.pretrain_channels
    if not plugins.method.trains:
        return plugins.method(config.method_settings, plugins.new_backbone(config, channels)).weights(), {}
    folder = setting.pretrain_folder(runs)
    if (kept := _kept_pretraining(folder)) is not None:
        say(f"pre-training found in {folder}")
        return kept
    if folder.exists():
        say(f"{folder} is not whole: pre-training again")
    discovery = (setting.discovery, runs / "cache" / "prepared-by-methods" / config.method)
    mark = "PHANTOM - " if setting.phantom else ""
    title = f"{mark}{config.method} on {config.backbone}, after pre-training"
    stage = pretrain(config, plugins, channels, volumes, folder, discovery, title)
    return load_file(folder / "weights.safetensors"), stage | _left(folder)


def _left(folder: Path) -> dict[str, Path]:
    """What a pre-training leaves for the runs that use it."""
    from harness.stages import PICTURE

    return {"history": folder / "history.jsonl", "picture": folder / PICTURE}


def _kept_pretraining(folder: Path) -> "tuple[Mapping[str, Tensor], dict[str, Any]] | None":
    """What an earlier pre-training left; None where a part of it is missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    stage = read_json(folder / "stage.json")
    if not isinstance(stage, dict) or not (folder / "history.jsonl").exists():
        return None
    try:
        return load_file(folder / "weights.safetensors"), stage | _left(folder)
    except (OSError, SafetensorError):
        return None


def _record(
    setting: Setting,
    summary: dict[str, Any],
    timing: dict[str, Any],
    used: dict[str, Any],
    transfer: dict[str, Any],
    network: "nn.Module",
    stage: dict[str, Any],
) -> dict[str, Any]:
    from harness import hardware
    from harness.stages import new_scoring

    config, task = setting.config, setting.task
    device, scoring = next(network.parameters()).device, new_scoring(config.evaluate)
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
        "timing": timing,
        "computed_with": used,
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "memory": {"pretrain": stage.get("memory"), "run": hardware.memory(device)},
        "environment": hardware.environment(device),
        "transfer": transfer,
        "method_prepare": stage.get("prepared", {}),
        "files": setting.files,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


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
    asked = asdict(request) | {"runs": None, "data": [str(root.resolve()) for root in roots], "save_predictions": None}
    paths = [Path(pair.partition("=")[2]) for pair in request.settings]
    asked["files"] = [digest_file(path) for path in paths if path.is_file()]
    engine = digest_tree(Path(__file__).parent)
    plugins = registry.digest_sources()
    return digest([asked, engine, plugins, [digest_tree(root) for root in roots], platform.node()])


def _answer(runs: Path, asked: str, predictions: bool) -> Finished | None:
    known = runs / "cache" / "requests" / asked
    if not known.exists():
        return None
    folder = runs / known.read_text()
    if predictions and not (folder / "predictions").is_dir():
        return None
    return Finished(folder, _read_record(folder), again=True) if (folder / "record.json").exists() else None


def _read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "record.json")
    if not isinstance(record, dict):
        raise UserError(f"{folder / 'record.json'} is damaged: remove the folder {folder} and ask again")
    return record
