"""One run from names to record: resolve, check, prepare, pre-train, fine-tune, evaluate, record."""

import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import RunConfig, parse_overrides, resolve
from harness.errors import UserError
from harness.files import digest, digest_file, digest_tree, write_atomic
from harness.phantom import PHANTOM, is_phantom, write_phantom
from harness.presets import read_preset
from harness.progress import say, say_once
from harness.registry import Registry
from harness.task import Case, Task

if TYPE_CHECKING:
    from torch import Tensor

    from harness.stages import Plugins
    from harness.volumes import Volume

SCHEMA = 1


@dataclass(frozen=True)
class Request:
    """What the user asked for, before anything was resolved."""

    method: str
    task: str
    backbone: str = "unet"
    preset: str = "demo"
    seed: int = 0
    label_fraction: float = 1.0
    data: Path | None = None
    runs: Path = Path("runs")
    settings: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finished:
    """A finished run; `again` says that it was there already."""

    folder: Path
    record: dict[str, Any]
    again: bool


@dataclass(frozen=True)
class Setting:
    """Everything about a run that is known before it starts."""

    config: RunConfig
    plugins: "Plugins"
    task: Task
    phantom: bool
    train: list[Case]
    test: list[Case]
    digests: dict[str, str]
    fingerprint: str
    sources: list[str]
    files: dict[str, str]

    @property
    def label_cases(self) -> list[Case]:
        """The nested subset of the training cases whose labels are used."""
        return self.train[: max(1, ceil(self.config.label_fraction * len(self.train)))]

    @property
    def pretrain_key(self) -> str:
        """Digest of all that determines the pre-trained weights."""
        parts = self.config.model_dump(mode="json", include={"method", "backbone", "seed", "mode", "pretrain"})
        settings = self.config.model_dump(mode="json", include={"method_settings", "backbone_settings"})
        versions = [self.plugins.method.version, self.plugins.backbone.version, version("ssl-seg-harness")]
        return digest([parts, settings, versions, self._pretrain_data, self.sources, self.files])

    @property
    def discovery(self) -> list[Any]:
        """All that whatever a method discovers depends on; the settings it depends on it states itself."""
        method = self.plugins.method
        return [
            method.name,
            method.version,
            version("ssl-seg-harness"),
            self.sources,
            self._pretrain_data,
            self.config.seed,
        ]

    @property
    def _pretrain_data(self) -> list[Any]:
        return [self.task.name, self.task.version, [self.digests[case.id] for case in self.train]]

    @property
    def run_id(self) -> str:
        """Readable name, made unique by a digest of all that determines the result."""
        config = self.config
        key = digest([self.pretrain_key, config.model_dump(mode="json"), self.fingerprint, [c.id for c in self.test]])
        return f"{config.task}-{config.method}-{config.backbone}-{config.preset}-s{config.seed}-{key[:10]}"


def run(request: Request) -> Finished:
    """Carry out a run, or answer with the finished one.

    Raises:
        UserError: anything that the user can mend; stages that are finished stay finished.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("a run takes one process in this version, WORLD_SIZE says several: start it without a launcher")
    registry = Registry(request.plugins)
    task = registry.task(request.task)
    # Names are checked before a phantom is written or data is read.
    registry.plugin("method", request.method)
    registry.plugin("backbone", request.backbone)
    read_preset(request.preset)
    runs = writable(request.runs)
    root = find_data(task, request.data, runs)
    asked = _digest_request(request, registry, root)
    finished = _answer(runs, asked)
    if finished is not None:
        return finished
    setting = plan(request, registry, task, root)
    folder = runs / setting.run_id
    if not (folder / "record.json").exists():
        _execute(setting, runs, folder)
        finished = Finished(folder, _read_record(folder), again=False)
    write_atomic(runs / "cache" / "requests" / asked, setting.run_id)
    return finished or Finished(folder, _read_record(folder), again=True)


def plan(request: Request, registry: Registry, task: Task, root: Path) -> Setting:
    """Configuration, plugins, split and data fingerprint; every check that needs no voxels is made here."""
    config = resolve(
        registry,
        task,
        method=request.method,
        backbone=request.backbone,
        preset=request.preset,
        overrides=parse_overrides(request.settings),
        seed=request.seed,
        label_fraction=request.label_fraction,
    )
    from harness.stages import Plugins
    from harness.volumes import digest_cases, fingerprint

    plugins = Plugins(registry.load("method", request.method), registry.load("backbone", request.backbone))
    check_fit(registry, config, plugins, task)
    phantom = is_phantom(root)
    # A phantom's cases have the names of real ones, the shipped test list does not speak of them.
    task = replace(task, test_ids=None) if phantom else task
    cases = task.cases(root)
    train, test = task.split(cases)
    # A warm-up that does not fit fine-tuning is to be known before pre-training.
    if plugins.method.trains:
        config.pretrain.schedule(len(train), num_processes=1)
    config.finetune.schedule(max(1, ceil(config.label_fraction * len(train))), num_processes=1)
    digests = digest_cases(cases, request.runs / "cache")
    # A plugin that is named as a file changes without a new version; installed ones state theirs.
    named = [(kind, getattr(request, kind)) for kind in ("method", "backbone")]
    sources = [registry.digest(*each) for each in named if registry.plugin(*each).entry_point is None]
    # Paths say where a file lies, not what is in it.
    files = {name: digest_file(path) for name, path in config.method_settings if isinstance(path, Path)}
    return Setting(config, plugins, task, phantom, train, test, digests, fingerprint(digests), sources, files)


def check_fit(registry: Registry, config: RunConfig, plugins: "Plugins", task: Task) -> None:
    """Whether method, backbone, crops and batch fit each other; builds the modules, reads no data.

    Raises:
        UserError: a need that the backbone does not meet, a crop that is not a multiple of its stride, or whatever
            the method itself refuses.
    """
    backbone = plugins.new_backbone(config, task)
    missing = plugins.method.needs - backbone.abilities
    if missing:
        able = [
            name
            for name in registry.names("backbone")
            if registry.load("backbone", name).abilities >= plugins.method.needs
        ]
        raise UserError(
            f"method {config.method!r} needs a backbone with {', '.join(sorted(missing))}, {config.backbone!r} has "
            f"{', '.join(sorted(backbone.abilities)) or 'no optional ability'}: choose --backbone from "
            f"{', '.join(able) or 'none of those installed'}"
        )
    for section, crop in (("pretrain", config.pretrain.crop), ("finetune", config.finetune.crop)):
        if any(edge % stride for edge, stride in zip(crop, backbone.stride, strict=True)):
            raise UserError(
                f"{section}.crop={','.join(map(str, crop))} is not a multiple of the deepest stride "
                f"{','.join(map(str, backbone.stride))} of backbone {config.backbone!r}: set {section}.crop to one"
            )
        if crop == backbone.stride:
            raise UserError(
                f"{section}.crop={','.join(map(str, crop))} leaves a single voxel of the deepest features of backbone "
                f"{config.backbone!r}, which cannot be normalised: set it to at least twice as much along one axis"
            )
    plugins.method(config.method_settings, backbone).check(config.pretrain.crop, config.pretrain.batch_size)


def find_data(task: Task, data: Path | None, runs: Path) -> Path:
    """The task's folder: the user's, or a phantom written on first use."""
    if data is not None:
        if not data.is_dir():
            raise UserError(f"--data {data} is not a folder: give the task's own folder or the one that contains it")
        return task.find(data)
    root = runs / "phantoms" / f"{task.name}-v{PHANTOM}-n{task.phantom_cases}"
    say_once(
        f"No data given (--data or HARNESS_DATA): using a PHANTOM of {task.name} in {root}. "
        "Its numbers say that the software works, nothing about any method."
    )
    if not is_phantom(root):
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root.parent, prefix=".partial-") as partial:
            write_phantom(task, Path(partial) / "phantom", task.phantom_cases, seed=0)
            (Path(partial) / "phantom").replace(root)
    return task.find(root)


def writable(runs: Path) -> Path:
    """The runs folder, made if need be. Raises UserError where it cannot be written."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise UserError(
            f"the runs folder {runs} cannot be written ({error.strerror}): give another with --runs or HARNESS_RUNS"
        ) from None
    return runs


def _execute(setting: Setting, runs: Path, folder: Path) -> None:
    from harness.stages import evaluate, finetune
    from harness.volumes import prepare

    config, task, started = setting.config, setting.task, time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    say(f"run {setting.run_id}")
    write_atomic(folder / "config.json", config.model_dump_json(indent=1))
    volumes = prepare(task, [*setting.train, *setting.test], setting.digests, runs / "cache")
    train, test = volumes[: len(setting.train)], volumes[len(setting.train) :]
    seconds = {"prepare": time.perf_counter() - started}
    weights, stage = _pretrained(setting, runs, train)
    (folder / "history.jsonl").unlink(missing_ok=True)
    if stage:
        shutil.copyfile(stage["history"], folder / "history.jsonl")
        seconds |= {"pretrain": stage["seconds"], "method_prepare": stage["prepare_seconds"]}
    backbone, trained, transfer = finetune(
        config, setting.plugins, task, train[: len(setting.label_cases)], weights, folder
    )
    say(transfer.pop("text"))
    seconds["finetune"] = trained.seconds
    begun = time.perf_counter()
    source = "PHANTOM - " if setting.phantom else ""
    title = f"{source}{config.task}, {config.method} on {config.backbone}, preset {config.preset}, seed {config.seed}"
    summary = evaluate(config, task, backbone, test, folder, title)
    seconds["evaluate"] = time.perf_counter() - begun
    timing = {
        "pretrain_step": stage.get("clock"),
        "finetune_step": trained.clock,
        "seconds": {name: round(value, 3) for name, value in seconds.items()},
    }
    used = {"pretrain": stage.get("used"), "finetune": trained.used}
    record = _record(setting, summary, timing, used, transfer, backbone, stage)
    write_atomic(folder / "record.json", json.dumps(record, indent=1, allow_nan=False))


def _pretrained(
    setting: Setting, runs: Path, train: "Sequence[Volume]"
) -> "tuple[Mapping[str, Tensor], dict[str, Any]]":
    """What fine-tuning starts from, and the pre-training stage; an earlier one where all that determines it is the same."""
    from safetensors.torch import load_file

    from harness.stages import pretrain

    config, plugins = setting.config, setting.plugins
    if not plugins.method.trains:
        return plugins.method(config.method_settings, plugins.new_backbone(config, setting.task)).weights(), {}
    folder = runs / "cache" / "pretrain" / f"{config.method}-{setting.pretrain_key[:16]}"
    if (folder / "stage.json").exists():
        say(f"pre-training found in {folder}")
        stage = json.loads((folder / "stage.json").read_text())
    else:
        discovery = (setting.discovery, runs / "cache" / "prepared-by-methods" / config.method)
        stage = pretrain(config, plugins, setting.task, train, folder, discovery)
    return load_file(folder / "weights.safetensors"), stage | {"history": folder / "history.jsonl"}


def _record(
    setting: Setting,
    summary: dict[str, Any],
    timing: dict[str, Any],
    used: dict[str, Any],
    transfer: dict[str, Any],
    backbone: Any,
    stage: dict[str, Any],
) -> dict[str, Any]:
    from harness import hardware, metrics

    config, task = setting.config, setting.task
    device = next(backbone.parameters()).device
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
        "data": {
            "source": "phantom" if setting.phantom else "real",
            "fingerprint": setting.fingerprint,
            "licence": task.licence,
            "n_train": len(setting.label_cases),
            "n_test": len(setting.test),
            "train": [case.id for case in setting.label_cases],
            "pretrain": [case.id for case in setting.train],
            "test": [case.id for case in setting.test],
        },
        "config": config.model_dump(mode="json"),
        "metrics": summary,
        "metric_policy": metrics.POLICY,
        "metric_definitions": {"hd95": "max-directed", "unit": "mm"},
        "timing": timing,
        "computed_with": used,
        "parameters": sum(parameter.numel() for parameter in backbone.parameters()),
        "memory": {"pretrain": stage.get("memory"), "run": hardware.memory(device)},
        "environment": hardware.environment(device),
        "transfer": transfer,
        "method_prepare": stage.get("prepared", {}),
        "files": setting.files,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _digest_request(request: Request, registry: Registry, root: Path) -> str:
    """Recognises a request that was answered before without importing torch: names, sources and data unchanged."""
    asked = asdict(request) | {"runs": None, "data": str(root.resolve())}
    named = [Path(pair.partition("=")[2]) for pair in request.settings]
    asked["files"] = [digest_file(path) for path in named if path.is_file()]
    engine = digest_tree(Path(__file__).parent)
    plugins = [registry.digest(kind, getattr(request, kind)) for kind in ("method", "backbone")]
    return digest([asked, engine, plugins, digest_tree(root), platform.node()])


def _answer(runs: Path, asked: str) -> Finished | None:
    known = runs / "cache" / "requests" / asked
    if not known.exists():
        return None
    folder = runs / known.read_text()
    return Finished(folder, _read_record(folder), again=True) if (folder / "record.json").exists() else None


def _read_record(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "record.json").read_text())
    return record
