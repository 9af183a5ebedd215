"""What the user asked for. Each field is declared once: its option, its axis in sweep files, its place in the record.

The options of the commands, the command line that asks for a run, the axes of a sweep and the request of a finished run's
record are made from these declarations.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from harness.system.errors import UserError, unknown

Mode = Literal["task-specific", "generic"]
FinetuneProtocol = Literal["finetune", "frozen", "linear"]
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Names of trackers, and the package that each one needs."""


@dataclass(frozen=True)
class Option:
    """How one field of a request is written.

    Attributes:
        flag: the option, for instance `--label-fraction`.
        text: one line for `--help`.
        metavar: what stands for the value there.
        parse: text to value; raises ValueError, whose words are shown.
        choices: the allowed values, where they are few.
        environment: variable that gives the default.
        axis: type of its values in a sweep file, which may list several; None: it is no axis.
        record: where `record.json` holds it, keys joined by dots; empty: a run's result does not depend on it.
        always: whether the command line of a run states it even where it is the default.
    """

    flag: str
    text: str
    metavar: str = ""
    parse: Callable[[str], Any] = str
    choices: tuple[str, ...] = ()
    environment: str = ""
    axis: type | None = None
    record: str = ""
    always: bool = False


def whole_number(text: str) -> int:
    """A whole number of 0 or more. Raises ValueError."""
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """A whole number of 1 or more. Raises ValueError."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def minutes(text: str) -> float:
    """Minutes, 0 or more. Raises ValueError."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{text!r} is not a number of minutes, 0 or more")
    return number


def _option(default: Any, flag: str, text: str, **more: Any) -> Any:
    return field(default=default, metadata={"option": Option(flag, text, **more)})


@dataclass(frozen=True)
class Execution:
    """How a run is carried out. No result depends on it: a run may be resumed with other values.

    Attributes:
        checkpoint_minutes: between checkpoints of a training stage.
        micro_batches: parts of a batch that each process computes one after the other; 0: as the launcher says, else 1.
        on_nonfinite: what to do about a loss or gradient that is not finite: stop, or leave the step out and count it.
        trackers: where the values of every step go as well (`harness.training.trackers`).
        until: the stage after which to leave; empty: go to the end.
    """

    checkpoint_minutes: float = _option(
        10.0,
        "--checkpoint-minutes",
        "between checkpoints of a training stage (default: 10)",
        metavar="M",
        parse=minutes,
    )
    micro_batches: int = _option(
        0,
        "--micro-batches",
        "compute each batch in N parts one after the other, for the same result in less memory",
        metavar="N",
        parse=positive,
    )
    on_nonfinite: Literal["stop", "skip"] = _option(
        "stop",
        "--on-nonfinite",
        "a loss or gradient that is not finite ends the run (default), or its step is left out and counted",
        choices=("stop", "skip"),
    )
    trackers: tuple[str, ...] = _option(
        (),
        "--tracker",
        "where the values of every step go as well, also several; a tracker's failure never stops a run",
        choices=tuple(TRACKERS),
    )
    until: Literal["", "pretrain"] = _option(
        "", "--until", "leave after that stage; runs that share it use its result", choices=("pretrain",)
    )


AS_USUAL = Execution()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, before names are resolved and data is read.

    Raises:
        UserError: a value that is out of range.
    """

    method: str = _option("", "--method", "`harness list methods`", metavar="M", axis=str, record="method", always=True)
    backbone: str = _option(
        "unet",
        "--backbone",
        "`harness list backbones` (default: unet)",
        metavar="B",
        axis=str,
        record="backbone",
        always=True,
    )
    task: str = _option(
        "",
        "--task",
        "`harness list tasks`, or a Decathlon or nnU-Net folder",
        metavar="T",
        axis=str,
        record="task",
        always=True,
    )
    preset: str = _option(
        "demo",
        "--preset",
        "`harness list presets` (default: demo)",
        metavar="P",
        axis=str,
        record="preset",
        always=True,
    )
    mode: str = _option(
        "task-specific",
        "--mode",
        "pre-train on the task's own training cases, or on corpora",
        choices=("task-specific", "generic"),
        axis=str,
        record="mode",
        always=True,
    )
    protocol: str = _option(
        "finetune",
        "--protocol",
        "what is trained with labels: all, all but the encoder, or one layer on the frozen encoder",
        choices=("finetune", "frozen", "linear"),
        axis=str,
        record="protocol",
        always=True,
    )
    split: str = _option(
        "fixed",
        "--split",
        "80/20 (default), fold K of N, or train and test on the same cases, a plumbing check",
        metavar="fixed|K/N|same",
        axis=str,
        record="data.split",
        always=True,
    )
    seed: int = _option(
        0,
        "--seed",
        "of all randomness (default: 0)",
        metavar="N",
        parse=whole_number,
        axis=int,
        record="seed",
        always=True,
    )
    label_fraction: float = _option(
        1.0,
        "--label-fraction",
        "share of the training labels",
        metavar="F",
        parse=float,
        axis=float,
        record="label_fraction",
        always=True,
    )
    corpora: tuple[str, ...] = _option(
        (),
        "--corpus",
        "what generic mode pre-trains on, also several: `harness list corpora`, or a folder of scans; with a window",
        metavar="NAME|DIR[=LOW,HIGH]",
    )
    settings: tuple[str, ...] = _option(
        (),
        "--set",
        "method.*, backbone.*, task.*, pretrain.*, finetune.*, evaluate.*; for instance pretrain.steps=200",
        metavar="KEY=VALUE",
    )
    plugins: tuple[str, ...] = _option(
        (),
        "--plugin",
        "Python file or module with methods, backbones or tasks of your own; its code is run",
        metavar="FILE|MODULE",
    )
    data: Path | None = _option(
        None,
        "--data",
        "the task's folder or the one that contains it (default: $HARNESS_DATA, else a phantom)",
        metavar="DIR",
        parse=Path,
        environment="HARNESS_DATA",
    )
    allow_overlap: bool = _option(
        False, "--allow-overlap", "pre-train although scans are test cases; every table says so"
    )
    skip_bad: bool = _option(False, "--skip-bad", "leave out scans of a corpus that cannot be used, counted")
    save_predictions: bool = _option(False, "--save-predictions", "write the test cases' label maps as NIfTI")
    execution: Execution = AS_USUAL
    runs: Path = _option(
        Path("runs"),
        "--runs",
        "where runs and caches are kept (default: $HARNESS_RUNS, else ./runs)",
        metavar="DIR",
        parse=Path,
        environment="HARNESS_RUNS",
        always=True,
    )

    def __post_init__(self) -> None:
        if not 0 < self.label_fraction <= 1:
            raise UserError(f"--label-fraction {self.label_fraction:g} is not in 0..1: give for instance 0.1")
        for name, option in options(Request):
            value = getattr(self, name)
            if option.choices and value not in option.choices:
                raise unknown(f"value of {option.flag}", str(value), option.choices)


def options(kind: type[Request] | type[Execution]) -> Iterator[tuple[str, Option]]:
    """Names and options of the fields, in their order."""
    for each in fields(kind):
        if "option" in each.metadata:
            yield each.name, each.metadata["option"]


def field_of(name: str) -> Field[Any]:
    """The field of that name, of a request or of its execution."""
    return next(each for kind in (Request, Execution) for each in fields(kind) if each.name == name)


def command(request: Request) -> list[str]:
    """The words that ask for this run."""
    words = ["harness", "run"]
    for each in fields(Request):
        if each.name == "execution":
            for inner in fields(Execution):
                words += _words(inner, getattr(request.execution, inner.name))
        else:
            words += _words(each, getattr(request, each.name))
    return words


def _words(each: Field[Any], value: Any) -> list[str]:
    option: Option = each.metadata["option"]
    if isinstance(value, tuple):
        return [word for one in value for word in (option.flag, one)]
    if isinstance(value, bool):
        return [option.flag] if value else []
    if value == each.default and not option.always:
        return []
    return [option.flag, f"{value:g}" if isinstance(value, float) else str(value)]


def recorded_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request that made a record, as far as the record holds them."""
    found = {}
    for name, option in options(Request):
        value: Any = record
        for key in option.record.split(".") if option.record else ():
            value = value.get(key) if isinstance(value, Mapping) else None
        if option.record and value is not None:
            found[name] = option.axis(value) if option.axis else value
    return found
