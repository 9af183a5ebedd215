"""The fields that a record must have before anything is computed from it. Further fields are kept, but not checked or used."""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Name = Annotated[str, Field(min_length=1, max_length=1000)]
Digest = Annotated[str, Field(max_length=200)]
Number = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**9)]
Cases = list[Annotated[str, Field(min_length=1, max_length=1000)]]


MOST_TRIALS = 100
"""Largest number of settings that tuning tries, as in `harness.config.grid`."""

Point = Annotated[list[Number], Field(min_length=2, max_length=2)]
"""A step and the Dice there."""


class Part(BaseModel):
    """A section of a record. Types are exact: the string "3" is no number."""

    model_config = ConfigDict(strict=True, extra="allow")


class Phase(Part):
    """Median time of one phase of a step in ms."""

    p50_ms: Number


class Step(Part):
    """Times of a pre-training step and of its phases."""

    step: Phase
    forward: Phase
    backward: Phase
    optimizer: Phase


class Seconds(Part):
    """Seconds per stage."""

    __pydantic_extra__: dict[str, Number]
    pretrain: Number = 0.0
    method_prepare: Number = 0.0


class Timing(Part):
    """Times of a run; `pretrain_step` is None where nothing was pre-trained."""

    seconds: Seconds
    pretrain_step: Step | None = None


class Energy(Part):
    """Energy of the training stages in kWh; None where the machine does not tell."""

    pretrain_kwh: Number | None = None
    finetune_kwh: Number | None = None
    tune_kwh: Number | None = None


class Peak(Part):
    """Largest memory of a process, and of a device that has memory of its own, in GiB."""

    host_peak_gib: Number | None = None
    device_peak_gib: Number | None = None


class Memory(Part):
    """Peak memory of pre-training, None without one, and of the rest of the run."""

    pretrain: Peak | None = None
    run: Peak | None = None


class Used(Part):
    """What a stage was computed with."""

    device: Name | None = None
    processes: Annotated[int, Field(ge=1, le=100_000)] = 1


class ComputedWith(Part):
    """What each stage was computed with; None for pre-training where there was none."""

    pretrain: Used | None = None
    finetune: Used | None = None


class Corpus(Part):
    """A corpus that was pre-trained on."""

    name: Name
    fingerprint: Digest


class Data(Part):
    """The data of a run: source, and the cases of training, pre-training and testing."""

    source: Literal["real", "phantom"]
    fingerprint: Annotated[str, Field(min_length=1, max_length=200)]
    n_test_seen: Count | None
    label_subset: Annotated[str, Field(pattern=r"^(first|per seed|by label seed \d{1,19})$")] = "first"
    split: Name = "fixed"
    overlap: list[Annotated[list[Name], Field(min_length=2, max_length=2)]] = []
    n_train: Count | None = None
    train: Cases | None = None
    pretrain: Cases | None = None
    test: Cases | None = None
    validation: Cases | None = None
    corpora: list[Corpus] = []


class Metric(Part):
    """Averages and counts of one target; `hd95` in mm."""

    dice: Annotated[float, Field(ge=0, le=1)] | None = None
    hd95: Number | None = None
    surface_dice: Annotated[float, Field(ge=0, le=1)] | None = None
    n_cases: Count | None = None
    n_missed: Count | None = None
    n_spurious: Count | None = None
    n_empty: Count | None = None


class Definitions(Part):
    """The definitions of the metrics, where the literature has several."""

    hd95: Name = "max-directed"
    surface_dice_tolerance_mm: Number | None = None


class Environment(Part):
    """Versions of packages, and the git state."""

    packages: dict[Name, str | None] = {}
    git: dict[Name, str | bool | None] = {}


class Transferred(Part):
    """What fine-tuning started from."""

    requested: Literal["method", "encoder", "all"] = "method"


class TrialPart(Part):
    """One setting that tuning tried, and its mean Dice on the validation cases."""

    settings: Annotated[dict[Name, Name], Field(min_length=1, max_length=10)]
    dice: Annotated[float, Field(ge=0, le=1)]
    curve: list[Point] = []


class Tuning(Part):
    """The grid of fine-tuning settings that were tried, and the index of the one that was chosen."""

    grid: Name
    trials: Annotated[list[TrialPart], Field(min_length=1, max_length=MOST_TRIALS)]
    chosen: Count

    @model_validator(mode="after")
    def _chose_the_best(self) -> "Tuning":
        """The first of the trials with the highest validation Dice must be the chosen one."""
        scores = [trial.dice for trial in self.trials]
        if self.chosen >= len(scores) or self.chosen != scores.index(max(scores)):
            raise ValueError("the chosen trial is not the one with the highest validation Dice")
        return self


class Probed(Part):
    """Linear probes while pre-training ran: (step, Dice, effective rank), and the step at which features had collapsed."""

    points: list[Annotated[list[Number], Field(min_length=3, max_length=3)]] = []
    collapsed: Count | None = None


class Foreign(Part):
    """A file of weights whose trainings are not known; `scans`: whether those that its user states are at hand."""

    file: Name
    digest: Digest
    stated: Annotated[str, Field(max_length=1000)] = ""
    scans: bool = False


class GenerationPart(Part):
    """One training that the starting weights went through."""

    stage: Name
    method: Name
    data: Name
    num_scans: Count
    labels: bool


class Citation(Part):
    """Something that a run used, and how to cite it; licence and BibTeX are empty where they are not known."""

    kind: Name
    name: Name
    licence: Annotated[str, Field(max_length=1000)] = ""
    reference: Annotated[str, Field(max_length=1000)] = ""
    bibtex: Annotated[str, Field(max_length=10_000)] = ""


class LineagePart(Part):
    """What the weights that the run started from were trained on."""

    generations: list[GenerationPart] = []
    num_scans: Count = 0
    num_labelled: Count = 0
    num_without_signatures: Count = 0
    foreign: list[Foreign] = []


class Validation(Part):
    """Validation cases and their mean Dice while fine-tuning ran: (step, Dice), in ascending order."""

    cases: Cases = []
    curve: list[Point] = []

    @field_validator("curve")
    @classmethod
    def _ascends(cls, points: list[list[float]]) -> list[list[float]]:
        """Steps must be whole numbers of 1 or more in ascending order, Dice in 0..1."""
        steps = [step for step, _ in points]
        if any(step != int(step) or step < 1 for step in steps) or any(b <= a for a, b in pairwise(steps)):
            raise ValueError("steps must be whole numbers from 1 in ascending order")
        if any(dice > 1 for _, dice in points):
            raise ValueError("a Dice exceeds 1")
        return points


class ImportedPart(Part):
    """Where imported results come from."""

    kind: Literal["label maps", "summary.json"]
    note: Annotated[str, Field(max_length=1000)] = ""


class Record(Part):
    """A run record of schema 1."""

    record_schema: Annotated[Literal[1], Field(alias="schema")]
    rules: Literal[1, 2] = 1
    uses_labels: bool = False
    imported: ImportedPart | None = None
    validation: Validation = Validation()
    final_soft_dice: Annotated[float, Field(ge=-1, le=1)] | None = None
    tuning: Tuning | None = None
    probe: Probed | None = None
    run_id: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}$")]
    method: Name
    backbone: Name
    task: Name
    task_version: Name
    mode: Name
    protocol: Name
    preset: Name
    metric_policy: Name
    overrides: dict[Name, Annotated[str, Field(max_length=10_000)]]
    label_fraction: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)]
    data: Data
    metrics: Annotated[dict[Name, Metric], Field(min_length=1)]
    timing: Timing
    energy: Energy = Energy()
    memory: Memory = Memory()
    computed_with: ComputedWith = ComputedWith()
    metric_definitions: Definitions = Definitions()
    environment: Environment = Environment()
    files: dict[Name, Digest] = {}
    pretrain_folder: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}$")] | None = None
    lineage: LineagePart | None = None
    citations: Annotated[list[Citation], Field(max_length=100)] = []
    transfer: Transferred = Transferred()
    finished: Annotated[str, Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")] | None = None
