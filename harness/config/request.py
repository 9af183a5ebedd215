"""A request: what the user asked for, before names are resolved and data is read.

Each field is declared once, with its command line option, its axis in sweep files and its key in the record. The options of
the commands, the command line of a run, the axes of a sweep, and the request that is restored from the record of a finished
run are all made from these declarations.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from harness.system.errors import UserError, unknown

Mode = Literal["task-specific", "generic"]
FinetuneProtocol = Literal["finetune", "frozen", "linear"]
TransferParts = Literal["method", "encoder", "all"]
PHANTOM = "phantom"
"""What is given instead of a data folder for made-up data."""
TRACKERS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
"""Name of each tracker -> the Python package that it needs."""


@dataclass(frozen=True)
class Option:
    """How one field of a request is written on the command line, in a sweep file and in a record.

    Attributes:
        flag: the command line option, for instance `--label-fraction`.
        text: its line in `--help`.
        metavar: placeholder for the value in `--help`.
        parse: converts text to the value. It raises ValueError, whose message is shown to the user.
        choices: the allowed values; empty if any value may be given.
        environment: name of the environment variable that gives the default; empty if there is none.
        axis: type of the field's values in a sweep file, where several may be listed; None if the field is no axis.
        record: keys of the value in `record.json`, joined by dots; empty if the record does not hold it under a key of
            its own.
        always: whether the command line of a run includes the option even if the value is the default.
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
    """Parse a whole number of 0 or more. Raises ValueError for any other text."""
    if not text.isdecimal():
        raise ValueError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number of 1 or more. Raises ValueError for any other text."""
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number of 1 or more")
    return int(text)


def data_folder(text: str) -> Path | None:
    """Parse a data folder; None for `phantom`. A folder of that name is written `./phantom`."""
    return None if text == PHANTOM else Path(text)


def minutes(text: str) -> float:
    """Parse a finite number of minutes, 0 or more. Raises ValueError for any other text."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < float("inf"):
        raise ValueError(f"{text!r} is not a number of minutes, 0 or more")
    return number


def _option(default: Any, flag: str, text: str, **more: Any) -> Any:
    """Declare a field of a request with its default and its `Option`."""
    return field(default=default, metadata={"option": Option(flag, text, **more)})


def options(kind: "type[Request] | type[Execution]") -> Iterator[tuple[str, Option]]:
    """The names of the fields that have an option, with their options, in the order of declaration."""
    for declared in fields(kind):
        if "option" in declared.metadata:
            yield declared.name, declared.metadata["option"]


def _check_choices(request: "Request | Execution") -> None:
    """Raises UserError where a field has none of the values that its option allows."""
    defaults = {each.name: each.default for each in fields(request)}
    for name, option in options(type(request)):
        value, allowed = getattr(request, name), (*option.choices, defaults[name])
        for item in value if isinstance(value, tuple) else (value,):
            if option.choices and item not in allowed:
                raise unknown(f"value of {option.flag}", str(item), option.choices)


@dataclass(frozen=True)
class Execution:
    """Options that change how a run is executed but not its result. A run may be resumed with other values.

    Attributes:
        checkpoint_minutes: minutes between checkpoints of a training stage.
        micro_batches: number of parts of a batch that each process computes one after another; 0 takes the launcher's
            number of gradient accumulation steps, or 1 if there is none.
        on_nonfinite: reaction to a loss or gradient that is not finite: "stop" ends the run, "skip" leaves the step out
            and counts it.
        trackers: names of trackers (`TRACKERS`) that also receive the values of every step.
        until: the stage after which the run stops; empty for a complete run.
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

    def __post_init__(self) -> None:
        _check_choices(self)


DEFAULT_EXECUTION = Execution()


@dataclass(frozen=True, kw_only=True)
class Request:
    """What the user asked for, before names are resolved and data is read.

    The text of each field's option says what the field is.

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
        "`harness list tasks`, or a folder of the Decathlon or of nnU-Net (v1, v2)",
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
    transfer: str = _option(
        "method",
        "--transfer",
        "pre-trained parts that fine-tuning starts from: those that the method names (default), encoder, or all",
        choices=("method", "encoder", "all"),
        axis=str,
        record="transfer.requested",
    )
    split: str = _option(
        "fixed",
        "--split",
        "80/20 (default), fold K of N, by rule or as splits_final.json of nnU-Net says, or the same cases, a plumbing check",
        metavar="fixed|K/N|K/N@FILE|same",
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
    shots: int = _option(
        0,
        "--shots",
        "number of labelled training cases, instead of a share",
        metavar="N",
        parse=positive,
        axis=int,
    )
    label_seed: int | None = _option(
        None,
        "--label-seed",
        "of the draw of the labelled cases (default: that of --seed, so that each seed has other cases)",
        metavar="N",
        parse=whole_number,
        axis=int,
        record="config.label_seed",
    )
    corpora: tuple[str, ...] = _option(
        (),
        "--corpus",
        "what generic mode pre-trains on, also several: `harness list corpora`, or a folder of scans; with its intensities",
        metavar="NAME|DIR[=LOW,HIGH|percentiles|zscore]",
    )
    settings: tuple[str, ...] = _option(
        (),
        "--set",
        "method.*, backbone.*, task.*, pretrain.*, finetune.*, evaluate.*; for instance pretrain.steps=200",
        metavar="KEY=VALUE",
    )
    tune: str = _option(
        "",
        "--tune",
        "fine-tune with each setting of a grid, choose on validation cases, then test: finetune.lr=1e-3,3e-3",
        metavar="GRID",
        axis=str,
        record="config.tune",
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
        "the task's folder or the one that contains it, or `phantom` for made-up data (default: $HARNESS_DATA, else a phantom)",
        metavar="DIR",
        parse=data_folder,
        environment="HARNESS_DATA",
    )
    allow_overlap: bool = _option(
        False, "--allow-overlap", "pre-train although scans are test cases; every table says so"
    )
    skip_bad: bool = _option(False, "--skip-bad", "leave out scans of a corpus that cannot be used, counted")
    save_predictions: bool = _option(False, "--save-predictions", "write the test cases' label maps as NIfTI")
    execution: Execution = DEFAULT_EXECUTION
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
            raise UserError(
                f"--label-fraction {self.label_fraction:g} is not a share of the labels: give a number above 0 and at most 1"
            )
        if self.shots < 0:
            raise UserError(f"--shots {self.shots} is not a number of cases: give 1 or more")
        if self.shots and self.label_fraction != 1:
            raise UserError(f"--shots {self.shots} with --label-fraction {self.label_fraction:g}: give one of them")
        if self.tune and not self.tune.strip():
            raise UserError(
                "--tune is blank: give settings to try, for instance finetune.lr=1e-3,3e-3, or leave it out"
            )
        _check_choices(self)


def field_of(name: str) -> Field[Any]:
    """The dataclass field of that name, of `Request` or of `Execution`."""
    return next(each for kind in (Request, Execution) for each in fields(kind) if each.name == name)


def command(request: Request) -> list[str]:
    """The command line that starts this run, as a list of arguments that begins with `harness run`."""
    arguments = ["harness", "run"]
    for declared in fields(Request):
        if declared.name == "execution":
            for inner in fields(Execution):
                arguments += _arguments(inner, getattr(request.execution, inner.name))
        else:
            arguments += _arguments(declared, getattr(request, declared.name))
    return arguments


def _arguments(declared: Field[Any], value: Any) -> list[str]:
    """The command line arguments that give `value` to a field; none for a default that need not be stated."""
    option: Option = declared.metadata["option"]
    if isinstance(value, tuple):
        return [word for text in value for word in _words(option.flag, text)]
    if isinstance(value, bool):
        return [option.flag] if value else []
    if value == declared.default and not option.always:
        return []
    return _words(option.flag, _digits(value) if isinstance(value, float) else str(value))


def _words(flag: str, text: str) -> list[str]:
    """A flag and its value. A value that begins with a dash must stand in the same word, or it is taken for a flag."""
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _digits(value: float) -> str:
    """The fewest digits that give the same number again."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)


def recorded_fields(record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of the request that made a record: field name -> value, for the fields whose `Option.record` is in it."""
    values = {}
    for name, option in options(Request):
        value: Any = record
        for key in option.record.split(".") if option.record else ():
            value = value.get(key) if isinstance(value, Mapping) else None
        if option.record and value is not None:
            if option.axis is int and not isinstance(value, int):
                raise UserError(
                    f"the record's {option.record} is {str(value)[:40]!r}, which is no whole number: is it damaged?"
                )
            values[name] = option.axis(value) if option.axis else value
    return values
