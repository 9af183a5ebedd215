"""What a run will do, known before it starts: names, data, configuration, split, and whether all of it fits."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

from harness.api.registry import Registry
from harness.api.task import Case, Task
from harness.compute.devices import micro_batches
from harness.config.request import Request
from harness.config.resolve import change_task, parse_overrides, resolve
from harness.config.schema import RunConfig
from harness.data.corpus import Corpus
from harness.data.datasets import CorpusData, TaskData, check_overlap, open_corpora, open_task
from harness.runs.locate import locate
from harness.system.files import digest, digest_file
from harness.training.compatibility import check_fit
from harness.training.models import Plugins


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that is known before it starts."""

    config: RunConfig
    plugins: Plugins
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
    def preparation_identity(self) -> list[Any]:
        """What every cached value of `Method.prepare` depends on, without the settings, which the method names itself."""
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


def plan(
    request: Request, registry: Registry, task: Task, root: Path, found: Sequence[tuple[Corpus, Path]] = ()
) -> RunPlan:
    """Configuration, plugins, split, data fingerprint and the leakage guard; every case is opened once.

    Raises:
        UserError: anything that does not fit, found before anything is computed.
    """
    plugins = Plugins(registry.load("method", request.method), registry.load("backbone", request.backbone))
    if not plugins.method.trains:
        found = ()  # nothing is pre-trained, so that one run serves both modes
    config = resolve(request, registry, task)
    channels = len(found[0][0].channels if found else task.channels)
    in_turn = micro_batches(request.execution.micro_batches)
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
    run_plan = RunPlan(config.model_copy(update={"corpora": labels}), plugins, data, corpora, pairs, sources, files)
    # What does not fit fine-tuning is to be known before pre-training.
    trained = [(config.finetune, len(run_plan.label_cases))]
    for settings, number in [(config.pretrain, run_plan.num_pretrain), *trained] if plugins.method.trains else trained:
        settings.schedule(number)
        settings.rows(int(os.environ.get("WORLD_SIZE") or 1), in_turn)
    return run_plan


def plan_without_data(request: Request) -> tuple[RunConfig, RunPlan | None]:
    """What a run would do: its configuration, and with data given everything that `plan` finds. No phantom is written.

    Raises:
        UserError: as `locate` and `plan`.
    """
    registry = Registry(request.plugins)
    if request.data is not None or registry.task_folder(request.task) is not None:
        run_plan = plan(request, *locate(request))
        return run_plan.config, run_plan
    task = change_task(registry.task(request.task), parse_overrides(request.settings))
    config = resolve(request, registry, task)
    plugins = Plugins(registry.load("method", config.method), registry.load("backbone", config.backbone))
    check_fit(registry, config, plugins, len(task.channels), len(task.channels))
    return config, None
