"""What a run will do, known before it starts: names, data, configuration, split, and whether all of it fits."""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.config import RunConfig, change_task, parse_overrides, resolve
from harness.corpus import Corpus
from harness.data import (
    CorpusData,
    TaskData,
    check_overlap,
    find_corpora,
    find_data,
    open_corpora,
    open_task,
    read_spec,
)
from harness.errors import UserError
from harness.execution import AS_USUAL, Execution, micro_batches
from harness.files import digest, digest_file
from harness.presets import read_preset
from harness.registry import Registry
from harness.splits import check_how
from harness.task import Case, Task

if TYPE_CHECKING:
    from harness.stages import Plugins


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
    mode: str = "task-specific"
    corpora: tuple[str, ...] = ()
    split: str = "fixed"
    protocol: str = "finetune"
    skip_bad: bool = False
    allow_overlap: bool = False
    save_predictions: bool = False
    how: Execution = AS_USUAL


def command(request: Request) -> list[str]:
    """The words that ask for this run."""
    words = ["harness", "run", "--method", request.method, "--task", request.task]
    words += ["--backbone", request.backbone, "--mode", request.mode, "--preset", request.preset]
    words += ["--protocol", request.protocol, "--seed", str(request.seed)]
    words += ["--label-fraction", f"{request.label_fraction:g}", "--split", request.split]
    for option, values in (
        ("--corpus", request.corpora),
        ("--set", request.settings),
        ("--plugin", request.plugins),
        ("--tracker", request.how.trackers),
    ):
        words += [word for value in values for word in (option, value)]
    words += ["--data", str(request.data)] if request.data else []
    for option, given in (
        ("--allow-overlap", request.allow_overlap),
        ("--skip-bad", request.skip_bad),
        ("--save-predictions", request.save_predictions),
    ):
        words += [option] if given else []
    how = request.how
    if how.checkpoint_minutes != AS_USUAL.checkpoint_minutes:
        words += ["--checkpoint-minutes", f"{how.checkpoint_minutes:g}"]
    words += ["--micro-batches", str(how.micro_batches)] if how.micro_batches else []
    words += ["--on-nonfinite", how.on_nonfinite] if how.on_nonfinite != AS_USUAL.on_nonfinite else []
    return [*words, "--runs", str(request.runs)]


@dataclass(frozen=True)
class Setting:
    """Everything about a run that is known before it starts."""

    config: RunConfig
    plugins: "Plugins"
    data: TaskData
    corpora: list[CorpusData]
    overlap: list[tuple[str, str]]
    sources: list[str]
    files: dict[str, str]

    @property
    def task(self) -> Task:
        """The task, as this run prepares it."""
        return self.data.task

    @property
    def train(self) -> list[Case]:
        """Training cases; prefixes are the label fractions."""
        return self.data.split.train

    @property
    def test(self) -> list[Case]:
        """Test cases."""
        return self.data.split.test

    @property
    def phantom(self) -> bool:
        """Whether anything in the run is made up."""
        return self.data.phantom or any(each.phantom for each in self.corpora)

    @property
    def label_cases(self) -> list[Case]:
        """The nested subset of the training cases whose labels are used."""
        return self.train[: max(1, ceil(self.config.label_fraction * len(self.train)))]

    @property
    def pretrain_channels(self) -> int:
        """Channels of the images that are pre-trained on."""
        return len(self.corpora[0].corpus.channels if self.corpora else self.task.channels)

    @property
    def num_pretrain(self) -> int:
        """Scans that are pre-trained on."""
        return sum(len(each.cases) for each in self.corpora) or len(self.train)

    @property
    def pretrain_key(self) -> str:
        """Digest of all that determines the pre-trained weights."""
        parts = self.config.model_dump(mode="json", include={"method", "backbone", "seed", "mode", "pretrain"})
        settings = self.config.model_dump(mode="json", include={"method_settings", "backbone_settings"})
        versions = [self.plugins.method.version, self.plugins.backbone.version, version("ssl-seg-harness")]
        return digest([parts, settings, versions, self._pretrain_data, self.sources, self.files])

    def pretrain_folder(self, runs: Path) -> Path:
        """Where its pre-training is kept, for every run that shares it."""
        return runs / "cache" / "pretrain" / f"{self.config.method}-{self.pretrain_key[:16]}"

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
        if self.corpora:
            return [
                [each.corpus.name, each.corpus.version, each.corpus.spacing, repr(each.corpus.normalisation)]
                + [each.inventory.digests[case.id] for case in each.cases]
                for each in self.corpora
            ]
        digests = [self.data.inventory.digests[case.id] for case in self.train]
        return [self.task.name, self.task.version, self.config.prepared, digests]

    @property
    def num_test_seen(self) -> int:
        """Test cases that were trained or pre-trained on."""
        trained = {case.id for case in self.train} | {case for _, case in self.overlap}
        return len(trained & {case.id for case in self.test})

    @property
    def run_id(self) -> str:
        """Readable name, made unique by a digest of all that determines the result."""
        config = self.config
        tested = [case.id for case in self.test]
        # What was skipped changes nothing but the record, which counts it.
        skipped = [sorted(each.inventory.bad) for each in self.corpora]
        key = digest([self.pretrain_key, config.model_dump(mode="json"), self.data.fingerprint, tested, skipped])
        return f"{config.task}-{config.method}-{config.backbone}-{config.preset}-s{config.seed}-{key[:10]}"


def locate(request: Request) -> tuple[Registry, Task, Path, list[tuple[Corpus, Path]]]:
    """Names checked, and the folders of the data found; a phantom is written where none was given.

    Raises:
        UserError: an unknown name, data that is not there, or a mode that does not fit the corpora.
    """
    registry = Registry(request.plugins)
    overrides = parse_overrides(request.settings)
    task = change_task(registry.task(request.task), overrides)
    # Names are checked before a phantom is written or data is read.
    registry.plugin("method", request.method)
    registry.plugin("backbone", request.backbone)
    read_preset(request.preset)
    check_how(request.split)
    if request.mode == "generic" and not request.corpora:
        raise UserError("--mode generic needs what to pre-train on: give --corpus NAME or --corpus DIR, also several")
    if request.mode != "generic" and request.corpora:
        raise UserError("--corpus is for --mode generic; in task-specific mode the task's own training cases are used")
    for spec in request.corpora:
        read_spec(registry, spec)
    writable(request.runs)
    # A task that is a folder is its own data.
    data = registry.task_folder(request.task) or request.data
    root = find_data(task, data, request.runs)
    return registry, task, root, find_corpora(registry, request.corpora, task, request.data or data, request.runs)


def plan(
    request: Request, registry: Registry, task: Task, root: Path, found: Sequence[tuple[Corpus, Path]] = ()
) -> Setting:
    """Configuration, plugins, split, data fingerprint and the leakage guard; every case is opened once.

    Raises:
        UserError: anything that does not fit, found before anything is computed.
    """
    from harness.stages import Plugins

    plugins = Plugins(registry.load("method", request.method), registry.load("backbone", request.backbone))
    if not plugins.method.trains:
        found = ()  # nothing is pre-trained, so that one run serves both modes
    config = resolve_request(request, registry, task)
    channels = len(found[0][0].channels if found else task.channels)
    in_turn = micro_batches(request.how.micro_batches)
    check_fit(registry, config, plugins, len(task.channels), channels, in_turn)
    cache = request.runs / "cache"
    data = open_task(task, root, cache, request.split)
    corpora = open_corpora(found, cache, request.skip_bad)
    pairs = check_overlap(data, corpora, request.allow_overlap)
    # A plugin that is named as a file changes without a new version; installed ones state theirs.
    named = [(kind, getattr(request, kind)) for kind in ("method", "backbone")]
    sources = [registry.digest(*each) for each in named if registry.plugin(*each).entry_point is None]
    # Paths say where a file lies, not what is in it.
    files = {name: digest_file(path) for name, path in config.method_settings if isinstance(path, Path)}
    labels = tuple(each.label for each in corpora)
    setting = Setting(config.model_copy(update={"corpora": labels}), plugins, data, corpora, pairs, sources, files)
    # What does not fit fine-tuning is to be known before pre-training.
    trained = [(config.finetune, len(setting.label_cases))]
    for settings, number in [(config.pretrain, setting.num_pretrain), *trained] if plugins.method.trains else trained:
        settings.schedule(number)
        settings.rows(int(os.environ.get("WORLD_SIZE") or 1), in_turn)
    return setting


def plan_without_data(request: Request) -> tuple[RunConfig, Setting | None]:
    """What a run would do: its configuration, and with data given everything that `plan` finds. No phantom is written.

    Raises:
        UserError: as `locate` and `plan`.
    """
    from harness.stages import Plugins

    registry = Registry(request.plugins)
    if request.data is not None or registry.task_folder(request.task) is not None:
        setting = plan(request, *locate(request))
        return setting.config, setting
    task = change_task(registry.task(request.task), parse_overrides(request.settings))
    config = resolve_request(request, registry, task)
    plugins = Plugins(registry.load("method", config.method), registry.load("backbone", config.backbone))
    check_fit(registry, config, plugins, len(task.channels), len(task.channels))
    return config, None


def resolve_request(request: Request, registry: Registry, task: Task) -> RunConfig:
    """The validated configuration of a request; `task` is as `change_task` gives it. Raises UserError as `resolve`."""
    trains = registry.load("method", request.method).trains
    return resolve(
        registry,
        task,
        method=request.method,
        backbone=request.backbone,
        preset=request.preset,
        overrides=parse_overrides(request.settings),
        seed=request.seed,
        label_fraction=request.label_fraction,
        mode=request.mode if trains else "task-specific",
        split=request.split,
        protocol=request.protocol,
    )


def check_fit(
    registry: Registry,
    config: RunConfig,
    plugins: "Plugins",
    channels: int,
    pretrain_channels: int,
    in_turn: int = 1,
) -> None:
    """Whether method, backbone, crops and batch fit each other and the memory; builds the modules, reads no data.

    Raises:
        UserError: a need that the backbone does not meet, a crop that is not a multiple of its stride, weights that no
            memory holds, batch norm over `in_turn` micro-batches, or whatever the method itself refuses.
    """
    import psutil

    from harness.fitting import is_too_large, weights_bytes

    try:
        # A copy for gradients and two for AdamW's moments; known before a byte of it is taken.
        need = 4 * weights_bytes(
            lambda: plugins.method(config.method_settings, plugins.new_backbone(config, pretrain_channels))
        )
        if need > psutil.virtual_memory().available:
            raise MemoryError(f"weights, gradients and moments take {need / 2**30:.1f} GiB")
        _check_parts(registry, config, plugins, channels, pretrain_channels, in_turn)
    except Exception as error:
        if not is_too_large(error):
            raise
        given = (f"{key}={value:.60}" for key, value in config.overrides.items())
        raise UserError(
            f"method {config.method!r} and backbone {config.backbone!r} with {', '.join(given) or 'these settings'} do not fit "
            f"the {psutil.virtual_memory().available / 2**30:.1f} GiB that are free ({' '.join(str(error).split())[:160]}): "
            "set smaller ones"
        ) from None


def _check_parts(
    registry: Registry, config: RunConfig, plugins: "Plugins", channels: int, pretrain_channels: int, in_turn: int
) -> None:
    from harness.training import refuse_batch_norm

    backbone = plugins.new_backbone(config, channels)
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
    if pretrain_channels != channels:
        backbone = plugins.new_backbone(config, pretrain_channels)
    method = plugins.method(config.method_settings, backbone)
    refuse_batch_norm(method, in_turn)
    method.check(config.pretrain.crop, config.pretrain.batch_size)


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
