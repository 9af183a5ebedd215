"""Plans a run before it starts: names, data, configuration and split, and checks that they fit each other."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from harness.api.registry import Registry
from harness.api.task import Case, Task
from harness.compute.devices import micro_batches
from harness.config.request import Request
from harness.config.resolve import TuningTrial, change_task, parse_overrides, resolve, resolve_trials, shots_of
from harness.config.schema import Finetune, RunConfig, Training
from harness.data.corpus import Corpus
from harness.data.datasets import CorpusData, TaskData, check_overlap, open_corpora, open_task
from harness.data.phantom import check_phantom
from harness.data.splits import SAME, TUNING_SHARE, VALIDATION_SHARE, check_split, draw_labelled, parse_fold
from harness.runs.locate import locate
from harness.runs.provenance import check_lineage, citations, named_files, parent_lineage, scans_of
from harness.system.console import say_once
from harness.system.errors import UserError
from harness.system.files import digest, digest_file
from harness.training.compatibility import check_fit
from harness.training.lineage import Generation, Lineage
from harness.training.models import Plugins, seed_for


@dataclass(frozen=True)
class RunPlan:
    """Everything about a run that is known before it starts.

    Attributes:
        data: cases of the task and their split.
        corpora: for pre-training; empty if the run is pre-trained on the task's own training cases.
        overlap: pairs (scan of a corpus, test case) that are copies of each other.
        sources: digests of the code of method and backbone.
        files: digests of the files that the method's settings name, by setting.
        trials: the settings of a grid that are tried; empty without `--tune`.
        lineage: of the weights that the method's settings name; empty where they name none.
        citations: of everything that the run uses, with licence and BibTeX, see `harness.runs.provenance.citations`.
    """

    config: RunConfig
    plugins: Plugins
    data: TaskData
    corpora: list[CorpusData]
    overlap: list[tuple[str, str]]
    sources: list[str]
    files: dict[str, str]
    trials: list[TuningTrial] = field(default_factory=list)
    lineage: Lineage = field(default_factory=Lineage)
    citations: list[dict[str, str]] = field(default_factory=list)

    @property
    def task(self) -> Task:
        """The task, with the preprocessing of this run."""
        return self.data.task

    @property
    def train(self) -> list[Case]:
        """Training cases in a fixed order."""
        return self.data.split.train

    @property
    def test(self) -> list[Case]:
        """Test cases."""
        return self.data.split.test

    @property
    def validation(self) -> list[Case]:
        """Cases that are held out to watch fine-tuning."""
        return self.data.split.validation

    @property
    def phantom(self) -> bool:
        """Whether any data of the run is a phantom."""
        return self.data.phantom or any(corpus.phantom for corpus in self.corpora)

    @property
    def label_cases(self) -> list[Case]:
        """The training cases whose labels are used; those of a smaller fraction are among those of a larger one."""
        seed = self.config.seed if self.config.label_seed is None else self.config.label_seed
        return draw_labelled(self.train, self.config.label_fraction, seed_for(seed, "labelled cases"))

    @property
    def pretrain_channels(self) -> int:
        """Number of channels of the images for pre-training."""
        return len(self.corpora[0].corpus.channels if self.corpora else self.task.channels)

    @property
    def num_pretrain(self) -> int:
        """Number of scans for pre-training."""
        return sum(len(corpus.cases) for corpus in self.corpora) or len(self.train)

    @property
    def pretrain_key(self) -> str:
        """Digest of everything that determines the pre-trained weights."""
        names = self.config.model_dump(mode="json", include={"method", "backbone", "seed", "mode", "pretrain"})
        del names["pretrain"]["workers"]
        if self.config.pretrain.probe_every:
            names["probe"] = self._probe_identity
        else:
            del names["pretrain"]["probe_every"]
        settings = self.config.model_dump(mode="json", include={"method_settings", "backbone_settings"})
        if self.plugins.method.uses_labels:
            own = set(Finetune.model_fields) - set(Training.model_fields)  # how labelled crops are drawn and augmented
            own.discard("layer_decay")
            settings["finetune"] = self.config.finetune.model_dump(mode="json", include=own)
            settings["labels"] = self._meaning_of_labels
        versions = [self.plugins.method.version, self.plugins.backbone.version, version("ssl-seg-harness")]
        return digest([names, settings, versions, self._pretrain_data, self.sources, self.files])

    @property
    def _meaning_of_labels(self) -> list[Any]:
        """What the task makes of a label map. Two tasks of one name may differ in nothing else."""
        task = self.task
        return [list(task.channels), list(task.targets.items()), list(task.labels), task.overlapping]

    @property
    def _probe_identity(self) -> list[Any]:
        """Everything that probes depend on beside the weights: the task's cases, and how crops and predictions are made."""
        settings = self.config.model_dump(mode="json", include={"finetune", "evaluate", "prepared"})
        cases = [
            [self.data.inventory.digests[case.id] for case in side] for side in (self.label_cases, self.validation)
        ]
        return [self.task.name, self.task.version, settings, cases, self._meaning_of_labels]

    def pretrain_folder(self, runs: Path) -> Path:
        """The folder of the pre-training, for all runs that share it."""
        return runs / "cache" / "pretrain" / f"{self.config.method}-{self.pretrain_key[:16]}"

    @property
    def preparation_identity(self) -> list[Any]:
        """Everything that a cached value of `Method.prepare` depends on, apart from settings, which the method names itself."""
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
        """Names, versions, preprocessing and digests of the data for pre-training."""
        if self.corpora:
            return [
                [data.corpus.name, data.corpus.version, data.corpus.spacing, repr(data.corpus.normalisation)]
                + [data.inventory.digests[case.id] for case in data.cases]
                for data in self.corpora
            ]
        digests = [self.data.inventory.digests[case.id] for case in self.train]
        return [self.task.name, self.task.version, self.config.prepared, digests]

    @property
    def num_test_seen(self) -> int | None:
        """Number of test cases that were trained on, in this run or before it; None if nobody knows.

        A number above 0 is the least that is known.
        """
        trained = {case.id for case in self.train} | {case for _, case in self.overlap}
        return len(trained & {case.id for case in self.test}) or (0 if self.lineage.is_complete else None)

    @property
    def pretrained_lineage(self) -> Lineage:
        """The lineage of the weights that fine-tuning starts from."""
        if not self.plugins.method.trains:
            return self.lineage
        scans = scans_of(self.data.inventory, self.train)
        if self.corpora:
            scans = {}
            for corpus in self.corpora:
                scans |= scans_of(corpus.inventory, corpus.cases)
        names = {"mode", "pretrain", "method_settings", "backbone_settings"}
        settings = self.config.model_dump(mode="json", include=names)
        del settings["pretrain"]["probe_every"]  # the weights do not depend on it
        for name, path in named_files(self.config.method_settings).items():
            settings["method_settings"][name.partition(".")[0]] = None  # where a file lies says nothing
            settings["method_settings"][f"{name} file"] = f"{path.name}@{self.files[name]}"
        label = "+".join(corpus.label for corpus in self.corpora) or self.task.name
        labels = self.plugins.method.uses_labels
        generation = self._generation("pretrain", label, len(scans), labels, settings)
        return self.lineage.after(generation, scans, scans if labels else ())

    @property
    def finetuned_lineage(self) -> Lineage:
        """The lineage of the fine-tuned weights. Validation cases count where settings were chosen on them."""
        cases = self.label_cases + (self.validation if self.config.tune else [])
        scans = scans_of(self.data.inventory, cases)
        settings = self.config.model_dump(
            mode="json", include={"protocol", "transfer", "finetune", "backbone_settings"}
        )
        generation = self._generation("finetune", self.task.name, len(scans), True, settings)
        return self.pretrained_lineage.after(generation, scans, scans)

    def _generation(
        self, stage: Literal["pretrain", "finetune"], data: str, number: int, labels: bool, settings: dict[str, Any]
    ) -> Generation:
        """One training of this run, on `number` scans."""
        return Generation(
            stage=stage,
            method=self.config.method,
            method_version=self.plugins.method.version,
            backbone=self.config.backbone,
            harness=version("ssl-seg-harness"),
            data=data[:1000],
            num_scans=number,
            labels=labels,
            seed=self.config.seed,
            settings=settings,
        )

    @property
    def run_id(self) -> str:
        """Readable name, made unique by a digest of everything that determines the result.

        `-n4` in it says that four cases are labelled, which is not all of them.
        """
        config = self.config
        tested = [case.id for case in self.test]
        # Skipped scans change only the record, which lists them.
        skipped = [sorted(data.inventory.bad) for data in self.corpora]
        settings = config.model_dump(mode="json")
        for stage in ("pretrain", "finetune"):
            del settings[stage]["workers"]  # as many loader processes as one likes give the same crops
        identity: list[Any] = [
            self.pretrain_key,
            settings,
            self.data.fingerprint,
            tested,
            skipped,
            self.task.version,
            self._meaning_of_labels,
        ]
        if self.files:  # what is known about their past changes the record
            identity.append([sorted(self.lineage.scans), [each.model_dump() for each in self.lineage.foreign]])
        key = digest(identity)
        labels = f"-n{len(self.label_cases)}" if config.label_fraction < 1 else ""
        return f"{config.task}-{config.method}-{config.backbone}-{config.preset}{labels}-s{config.seed}-{key[:10]}"


def plan(
    request: Request, registry: Registry, task: Task, root: Path, located: Sequence[tuple[Corpus, Path]] = ()
) -> RunPlan:
    """Plan a run: configuration, plugins, split, data fingerprint, and the check for leakage. Every case is opened once.

    Args:
        located: corpora and their folders.

    Raises:
        UserError: something does not fit. All such problems are found before anything is computed.
    """
    plugins = Plugins(registry.load("method", request.method), registry.load("backbone", request.backbone))
    if not plugins.method.trains or plugins.method.uses_labels:
        located = ()  # one run serves both modes
    config, trials = resolve(request, registry, task), resolve_trials(request, registry, task)
    channels = len(located[0][0].channels if located else task.channels)
    num_micro_batches = micro_batches(request.execution.micro_batches)
    check_fit(registry, config, plugins, len(task.channels), channels, num_micro_batches)
    cache = request.runs / "cache"
    share = TUNING_SHARE if trials else VALIDATION_SHARE
    data = open_task(task, root, cache, request.split, config.finetune.validation, share)
    if trials and not data.split.validation:
        raise _no_validation("tuning", config, data)
    if plugins.method.trains and config.pretrain.probe_every:
        _check_probe(config, data, channels)
    corpora = open_corpora(located, cache, request.skip_bad)
    overlap = check_overlap(data, corpora, request.allow_overlap)
    # Paths say where a file lies, not what is in it.
    files = {name: digest_file(path) for name, path in named_files(config.method_settings).items()}
    lineage, asked = parent_lineage(config.method_settings, files, registry, task, request)
    overlap += check_lineage(data, lineage, request.allow_overlap)
    # A plugin's code may change without a new version.
    sources = [registry.digest(kind, getattr(request, kind)) for kind in ("method", "backbone")]
    fold = parse_fold(request.split)
    known_now = {"corpora": tuple(corpus.label for corpus in corpora)} | _labelled(request, data)
    known_now |= {"split": fold.canonical} if fold is not None else {}
    trials = [replace(trial, config=trial.config.model_copy(update=known_now)) for trial in trials]
    config = config.model_copy(update=known_now)
    cited = [*citations(registry, request, plugins, task, corpora), *asked]
    run_plan = RunPlan(config, plugins, data, corpora, overlap, sources, files, trials, lineage, cited)
    # Problems of fine-tuning must be known before pre-training.
    num_labelled = len(run_plan.label_cases)
    finetuning = [(each.finetune, num_labelled) for each in (config, *(trial.config for trial in trials))]
    pretraining = [(config.pretrain, run_plan.num_pretrain)] if plugins.method.trains else []
    problems = [problem for each in [*pretraining, *finetuning] if (problem := _schedule_problem(*each))]
    if problems:
        raise UserError("; ".join(dict.fromkeys(problems)))
    for settings, _ in [*pretraining, *finetuning]:
        settings.rows(int(os.environ.get("WORLD_SIZE") or 1), num_micro_batches)
    return run_plan


def _schedule_problem(settings: Training, num_cases: int) -> str:
    """What is wrong with the steps of a stage; empty if nothing is."""
    try:
        settings.schedule(num_cases)
    except UserError as error:
        return str(error)
    return ""


def _check_probe(config: RunConfig, data: TaskData, channels: int) -> None:
    """Raises UserError where `pretrain.probe_every` has no validation case, or images of other channels than the task's."""
    if not data.split.validation:
        raise _no_validation("pretrain.probe_every", config, data)
    if channels != len(data.task.channels):
        raise UserError(
            f"pretrain.probe_every scores cases of the task, which have {len(data.task.channels)} channels; pre-training has "
            f"{channels}: set it to 0"
        )


def _no_validation(option: str, config: RunConfig, data: TaskData) -> UserError:
    """The error of a run that has no validation case, which `option` needs."""
    if config.split == SAME or not config.finetune.validation:
        return UserError(
            f"{option} needs validation cases, and there are none with --split {config.split} and finetune.validation="
            f"{config.finetune.validation}: give another split, or a number of 1 or more"
        )
    share = TUNING_SHARE if config.tune else VALIDATION_SHARE
    return UserError(
        f"{option} needs validation cases, at most one in {share.denominator} training cases, and {len(data.split.train)} "
        f"training cases are too few: give more cases, or leave {option} out"
    )


def _labelled(request: Request, data: TaskData) -> dict[str, Any]:
    """The share of labelled cases, from `--shots`, `--label-fraction` or the preset, and whether their draw has a seed.

    Raises:
        UserError: there are fewer cases.
    """
    shots, number = shots_of(request), len(data.split.train)
    if shots > number:
        origin = "--shots" if request.shots else f"preset {request.preset!r} labels"
        raise UserError(f"{origin} {shots}: there are {number} training cases: give --shots {number} or fewer")
    fraction = shots / number if shots else request.label_fraction
    if shots and not request.shots:
        say_once(f"preset {request.preset!r}: {shots} labelled cases; --shots gives another number")
    # With all labels there is no draw, so that a seed for it changes nothing.
    return {"label_fraction": fraction} | ({"label_seed": None} if fraction == 1 else {})


def plan_without_data(request: Request) -> tuple[RunConfig, RunPlan | None]:
    """The configuration of a run and, if data is given, its plan. No phantom is written.

    Raises:
        UserError: as `locate` and `plan`.
    """
    registry = Registry(request.plugins)
    if request.data is not None or registry.task_folder(request.task) is not None:
        run_plan = plan(request, *locate(request))
        return run_plan.config, run_plan
    task = change_task(registry.task(request.task), request.preset, parse_overrides(request.settings))
    check_phantom(task)
    check_split(request.split)
    config = resolve(request, registry, task)
    for trial in resolve_trials(request, registry, task):
        if trial.config.finetune.steps is not None:  # without data, passes over it have no number of steps
            trial.config.finetune.schedule(1)
    plugins = Plugins(registry.load("method", config.method), registry.load("backbone", config.backbone))
    check_fit(registry, config, plugins, len(task.channels), len(task.channels))
    return config, None
