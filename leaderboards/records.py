"""Finished runs for the leaderboard: the record, and Dice, HD95 and surface Dice per case.

Records may come from anywhere, so everything in them is checked before it is used: types, ranges, and names that become files.
"""

import csv
import gc
import io
import json
import math
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from harness.system.files import digest_file
from leaderboards.schema import Record

SCHEMA = 1
LARGEST = 64 * 2**20
"""Largest size in bytes of a record or a table of cases. The largest real files have a thousandth of it."""

SUMMARY = "summary.json"
"""The kind of imported results that have Dice alone (`harness.runs.imported`)."""

CONTROLS = {"scratch": "matched", "untrained": "negative"}
STATUS = ("scored", "missed", "spurious", "empty")
MEASURED = ("dice", "hd95_mm", "surface_dice")
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
LARGEST_MM = 1e6
SHARED = (
    *("task", "data", "preset", "mode", "protocol", "label_fraction"),
    *("label_subset", "metric_policy", "metric_definitions", "test_cases"),
)
"""What two runs must have in common to share a table, in the order of `Run.table`."""


class RecordError(Exception):
    """A record that cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Two versions of the rules say which runs share a table. Records name theirs (`rules`; 1 where they do not). Under rules 1,
    runs with another `pretrain.*` setting are in another table, and labelled cases are the first ones of a fixed order. Under
    rules 2, `pretrain.*` settings belong to the method, so that one control serves all of them, and labelled cases are drawn
    for each seed.

    Attributes:
        cases: their names, in alphabetical order.
        targets: in the task's order.
        dice, hd95, surface_dice: (cases, targets); HD95 in mm; NaN where a case has no value for a target.
        status: (cases, targets), indices into `STATUS`.
        folds: for pooled folds of a cross-validation, the fold of each case, from 0; empty for any other run.
        parts: the runs of the pooled folds, see `leaderboards.folds`; empty for any other run.
    """

    folder: Path
    record: dict[str, Any]
    cases: tuple[str, ...]
    targets: tuple[str, ...]
    dice: NDArray[np.float64]
    hd95: NDArray[np.float64]
    surface_dice: NDArray[np.float64]
    status: NDArray[np.int64]
    folds: tuple[int, ...] = ()
    parts: tuple["Run", ...] = ()

    @property
    def members(self) -> tuple["Run", ...]:
        """The runs that this one consists of: its folds, or itself."""
        return self.parts or (self,)

    @cached_property
    def table(self) -> tuple[Any, ...]:
        """The fields that must be equal for two runs to share a table, in the order of `SHARED`."""
        return self.table_without("")

    def table_without(self, setting: str) -> tuple[Any, ...]:
        """As `table`, but equal too for runs that differ in one changed setting, for instance `finetune.steps`."""
        record = self.record
        overrides = {key: value for key, value in self._overrides.items() if key != setting}
        data, definitions = record["data"], record.get("metric_definitions", {})
        return (
            record["task"] if record["task_version"] == "1" else f"{record['task']}@{record['task_version']}",
            f"{data['source']}:{data['fingerprint'][:8]}",
            _label(record["preset"], overrides, ("split", "task", *self._budget[0], "finetune", "evaluate")),
            record["mode"],
            record["protocol"] if self.tuning is None else f"{record['protocol']}, tuned({len(self.tuning['trials'])})",
            float(record["label_fraction"]),
            str(data.get("label_subset", "first")),
            record["metric_policy"],
            (definitions.get("hd95", "max-directed"), str(definitions.get("surface_dice_tolerance_mm"))),
            self.cases,
        )

    @property
    def run_id(self) -> str:
        """The run's name, which is unique for everything that determines its result."""
        return str(self.record["run_id"])

    @property
    def seed(self) -> int:
        """The seed of all randomness in the run."""
        return int(self.record["seed"])

    @property
    def num_test_seen(self) -> int | None:
        """Number of test cases that were trained or pre-trained on, as `num_test_seen`."""
        return num_test_seen(self.record)

    @property
    def missed(self) -> NDArray[np.bool_]:
        """Where the reference has a structure and the prediction does not, (cases, targets)."""
        return np.asarray(self.status == STATUS.index("missed"))

    @property
    def control(self) -> str:
        """What the run controls: "matched" (scratch), "positive" (labels in pre-training), "negative" (untrained), or empty."""
        if self.imported:
            return ""
        if self.record.get("uses_labels", False):
            return "positive"
        return CONTROLS.get(self.record["method"], "")

    @property
    def imported(self) -> dict[str, Any] | None:
        """For results of other software: what they were imported from, and the user's note; None for a run."""
        return self.record.get("imported")

    @property
    def tuning(self) -> dict[str, Any] | None:
        """Grid, trials and choice of a run whose fine-tuning was tuned; None for any other run."""
        return self.record.get("tuning")

    @property
    def chosen(self) -> str:
        """The settings that tuning chose; empty where nothing was tuned."""
        if self.tuning is None:
            return ""
        settings = self.tuning["trials"][self.tuning["chosen"]]["settings"]
        return ", ".join(f"{key.removeprefix('finetune.')}={value}" for key, value in settings.items())

    @property
    def kwh(self) -> float | None:
        """Energy of pre-training, tuning and fine-tuning in kWh; None where it is not known for all of it."""
        stages = ["finetune", *(each for each in ("pretrain", "tune") if each in self.record["timing"]["seconds"])]
        parts = [self.record.get("energy", {}).get(f"{stage}_kwh") for stage in stages]
        return None if None in parts else float(sum(parts))

    @property
    def gpu_hours(self) -> float | None:
        """Hours of pre-training and fine-tuning times the number of GPUs; None where no GPU was used."""
        seconds, hours = self.record["timing"]["seconds"], []
        for stage, names in (("pretrain", ("pretrain", "method_prepare")), ("finetune", ("finetune", "tune"))):
            used = self.record.get("computed_with", {}).get(stage) or {}
            if str(used.get("device")).startswith("cuda"):
                hours.append(sum(seconds.get(name, 0.0) for name in names) * used.get("processes", 1) / 3600)
        return sum(hours) if hours else None

    @property
    def peak_memory(self) -> float | None:
        """Peak memory in GiB, of the device if it has memory of its own, else of the process; None if it is not recorded."""
        stages = [stage or {} for stage in self.record.get("memory", {}).values()]
        host, device = ([stage.get(f"{owner}_peak_gib") for stage in stages] for owner in ("host", "device"))
        return max(filter(None, device), default=max(filter(None, host), default=None))

    @property
    def phantom(self) -> bool:
        """Whether the data is a phantom."""
        return bool(self.record["data"]["source"] != "real")

    @property
    def _budget(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The section of the pre-training settings, if it belongs to the table; and if it belongs to the method."""
        return (("pretrain",), ()) if self.record.get("rules", 1) == 1 else ((), ("pretrain",))

    @property
    def _overrides(self) -> dict[str, str]:
        """The changed settings, with the split where it is not the fixed one, and the values of settings that were tuned."""
        split = self.record["data"].get("split", "fixed")
        tried: dict[str, str] = {}
        for word in self.tuning["grid"].split() if self.tuning else ():
            key, _, values = word.partition("=")
            tried[key] = values.replace(",", "|")
        return dict(self.record["overrides"]) | tried | ({"split": split} if split != "fixed" else {})

    @cached_property
    def method(self) -> str:
        """The method's name with its corpora and changed settings; a file is given by name and digest, not by path.

        Imported results say so in their name, so that no other software passes for a method of ours.
        """
        return f"{self.record['method']} (imported)" if self.imported else self.method_without("")

    def method_without(self, setting: str) -> str:
        """As `method`, but without one changed setting, for instance `pretrain.steps`."""
        overrides = {key: value for key, value in self.record["overrides"].items() if key != setting}
        if corpora := self.record["data"].get("corpora"):
            overrides["method.corpus"] = "+".join(f"{corpus['name']}@{corpus['fingerprint']}" for corpus in corpora)
        requested = self.record.get("transfer", {}).get("requested", "method")
        if requested != "method":
            overrides["method.transfer"] = requested
        for field, digest in self.record.get("files", {}).items():
            overrides[f"method.{field}"] = f"{PurePath(overrides.get(f'method.{field}', field)).name}@{digest[:8]}"
        own_first = dict(sorted(overrides.items(), key=lambda pair: not pair[0].startswith("method.")))
        return _label(self.record["method"], own_first, ("method", *self._budget[1]))

    @cached_property
    def backbone(self) -> str:
        """The backbone's name with the settings that were changed from the preset."""
        return _label(self.record["backbone"], self.record["overrides"], ("backbone",))


def num_test_seen(record: Mapping[str, Any]) -> int | None:
    """Number of test cases that were trained or pre-trained on: 0 in an honest run; None if nobody knows.

    Nobody knows for weights from a file whose lineage the record does not have.
    """
    stated: int | None = record["data"]["n_test_seen"]
    without_lineage = bool(record.get("files")) and record.get("lineage") is None
    return None if without_lineage and not stated else stated


def load_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All finished runs directly below `folders`, and one line for each record that cannot be used.

    Where two runs have the same id and different contents, neither is used, since nothing tells which one is right.
    """
    with _without_collector():
        return _load(folders)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Switch the garbage collector off meanwhile.

    Thousands of records are millions of small objects, none of them garbage; looking for garbage takes a third of the time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _load(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """As `load_runs`."""
    runs: dict[str, Run] = {}
    problems, conflicts = [], set()
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        for run_folder in run_folders(folder):
            try:
                run = load_run(run_folder)
            except RecordError as error:
                problems.append(str(error))
                continue
            other = runs.setdefault(run.run_id, run)
            if other is not run and not _same(run, other):
                conflicts.add(run.run_id)
                problems.append(
                    f"{run_folder}: run {run.run_id} is also in {other.folder}, with other content; neither is used: remove one"
                )
    return [run for name, run in runs.items() if name not in conflicts], problems


def run_folders(folder: Path) -> list[Path]:
    """The folders directly below that have a record. A record that is a broken link counts, so that it is reported."""
    return sorted(path for path in folder.iterdir() if os.path.lexists(path / "record.json"))


def load_run(folder: Path, check_digest: bool = True) -> Run:
    """Load one run folder.

    Args:
        check_digest: whether to refuse cases that are not those of the record, by their digest.

    Raises:
        RecordError: record or cases are missing, foreign, incomplete, out of range, or were changed after the run.
    """
    path = folder / "record.json"
    record = read_record(path)
    try:
        targets = tuple(name for name in record["metrics"] if name != "average")
        if not all(map(str.isprintable, targets)):
            raise RecordError(f"{path}: a target's name has characters that cannot be printed")
        cases, values, status = _read_cases(folder / "cases.csv", targets)
        dice_only = (record.get("imported") or {}).get("kind") == SUMMARY
        _check_ranges(folder / "cases.csv", values, status, str(record["metric_policy"]), dice_only)
        run = Run(
            folder=folder,
            record=record,
            cases=cases,
            targets=targets,
            dice=values["dice"],
            hd95=values["hd95_mm"],
            surface_dice=values["surface_dice"],
            status=status,
        )
        _ = run.table, run.method, run.backbone
        digests = record.get("digests")
        stated = digests.get("cases.csv") if isinstance(digests, dict) else None
        if check_digest and stated is not None and digest_file(folder / "cases.csv") != stated:
            raise RecordError(
                f"{folder / 'cases.csv'}: changed after the run, its digest is not the record's; it is left out: restore the "
                "file, or run it again"
            )
    except RecordError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise RecordError(f"{path}: cannot be read as a run ({type(error).__name__}: {_line(error)})") from None
    return run


def read_record(path: Path) -> dict[str, Any]:
    """Read and check the record of a run. Raises RecordError where it lacks a field that tables need, or is no record."""
    try:
        text = _read(path)
        record = json.loads(text, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as a run record ({type(error).__name__}: {_line(error)})") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise RecordError(f"{path}: not a run record of schema {SCHEMA}")
    try:
        if SURROGATE.search(text):  # half a surrogate pair cannot be encoded as UTF-8
            json.dumps(record, ensure_ascii=False).encode()
        Record.model_validate(record)
    except (ValidationError, UnicodeEncodeError) as error:
        raise RecordError(f"{path}: {_first_problem(error)}") from None
    return record


def _first_problem(error: ValidationError | UnicodeEncodeError) -> str:
    """The first problem of a record, in one line."""
    if isinstance(error, UnicodeEncodeError):
        return "holds half a character, which no file can hold"
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    return (
        f"{field}: {problem['msg']} (it is {problem['input']!r:.80})"
        if problem["type"] != "missing"
        else f"lacks {field}"
    )


def _read_cases(path: Path, targets: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, NDArray[Any]], NDArray[Any]]:
    """The content of cases.csv.

    Returns:
        the names of the cases in alphabetical order; column -> values (cases, targets); indices into `STATUS`, (cases, targets).
    """
    columns = _columns(path)
    names, numbers = columns["case"], {target: number for number, target in enumerate(targets)}
    cases = tuple(sorted(set(names)))
    if not all(case and case.isprintable() and len(case) <= 1000 for case in cases):
        raise RecordError(
            f"{path}: a case has no name, one that cannot be printed, or one of more than 1000 characters"
        )
    order = {case: number for number, case in enumerate(cases)}
    try:
        column = np.array([numbers[target] for target in columns["target"]], dtype=int)
        status = np.array([STATUS.index(word) for word in columns["status"]], dtype=int)
    except (KeyError, ValueError) as error:
        raise RecordError(
            f"{path}: {_line(error)} is no target of the record or no status ({', '.join(STATUS)})"
        ) from None
    shape = len(cases), len(targets)
    positions = np.array([order[name] for name in names], dtype=int) * len(targets) + column
    counts = np.bincount(positions, minlength=len(cases) * len(targets))
    if not targets or not cases or (counts != 1).any():
        raise RecordError(
            f"{path}: each case and target needs one row, it has {len(names)} for {shape[0]} x {shape[1]}"
        )
    values = {}
    for name in MEASURED:
        values[name] = np.full(len(names), np.nan)
        if name in columns:
            digits = "".join(columns[name])
            # `float` also accepts underscores, spaces, and digits of other scripts.
            if not digits.isascii() or "_" in digits or " " in digits:
                raise RecordError(f"{path}: {name} has a value that is no plain number")
            floats = np.array([float(text) if text else math.nan for text in columns[name]])
            if not np.isfinite(floats[[bool(text) for text in columns[name]]]).all():
                raise RecordError(f"{path}: {name} has a value that is not finite")
            values[name][positions] = floats
        values[name] = values[name].reshape(shape)
    ordered = np.empty_like(status)
    ordered[positions] = status
    return cases, values, ordered.reshape(shape)


def _columns(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV as text. Raises RecordError for rows of different lengths or missing columns."""
    text = _read(path).replace("\r\n", "\n").removesuffix("\n")
    if '"' in text:
        rows = list(csv.reader(io.StringIO(text), strict=True))
        header, texts, widths = rows[0], [cell for row in rows[1:] for cell in row], {len(row) for row in rows}
    else:  # the harness writes quotes only where a name has a comma; this is several times faster
        lines = text.split("\n")
        widths = {line.count(",") + 1 for line in lines}
        header, texts = lines[0].split(","), ",".join(lines[1:]).split(",") if len(lines) > 1 else []
    if widths != {len(header)} or not texts:
        raise RecordError(f"{path}: rows of {', '.join(map(str, sorted(widths)))} cells: is it truncated?")
    lacking = [name for name in ("case", "target", "status", "dice", "hd95_mm") if name not in header]
    if lacking or len(set(header)) < len(header):
        raise RecordError(f"{path}: its header is {','.join(header)[:120]!r}, it needs case,target,status,dice,hd95_mm")
    return {name: texts[number :: len(header)] for number, name in enumerate(header)}


def _check_ranges(
    path: Path, values: dict[str, NDArray[Any]], status: NDArray[Any], policy: str, dice_only: bool
) -> None:
    """Raises RecordError where a value is out of range or does not fit its status under the metric policy.

    Args:
        dice_only: whether there are no distances, because they were imported from a summary that has none.
    """
    dice, hd95, surface = (values[name] for name in MEASURED)
    scored, one_sided, empty = status == 0, (status == 1) | (status == 2), status == 3
    perfect = policy.startswith("empty-is-perfect")
    wrong = {
        "dice or surface_dice leaves 0..1": (dice < 0) | (dice > 1) | (surface < 0) | (surface > 1),
        f"hd95_mm leaves 0..{LARGEST_MM:g}": (hd95 < 0) | (hd95 > LARGEST_MM),
        "a case that was scored has no Dice or no HD95": scored & (np.isnan(dice) | (np.isnan(hd95) & (not dice_only))),
        "a result that was imported without distances has some": ~np.isnan(hd95 + surface) & dice_only,
        "a Dice of 1 has an HD95 above 0": scored & (dice == 1) & (hd95 > 0),
        "a structure that was missed or made up has a Dice other than 0": one_sided & ~(dice == 0),
        "a structure that was missed or made up has an HD95 of 0, or a surface Dice": one_sided
        & ((hd95 == 0) | (surface > 0)),
        f"a case without the structure has values, which {policy} does not give": empty
        & ~(np.isnan(dice) & np.isnan(hd95))
        & (not perfect),
        f"a case without the structure has no Dice, which {policy} gives": empty & np.isnan(dice) & perfect,
        "some scored cases have a surface Dice and others have none": scored
        & np.isnan(surface)
        & ~np.isnan(surface[scored]).all(),
    }
    for problem, where in wrong.items():
        if where.any():
            raise RecordError(f"{path}: {problem} ({int(where.sum())} of {where.size})")


def _read(path: Path) -> str:
    """The text of a file. Raises RecordError where it is no regular file or is too large."""
    if not stat.S_ISREG(path.stat().st_mode):  # reading a pipe might wait without end
        raise RecordError(f"{path}: is no regular file")
    with path.open(encoding="utf-8") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise RecordError(f"{path}: more than the {LARGEST} bytes that are read")
    return text


def _refuse(constant: str) -> float:
    """Raises ValueError: NaN and Infinity are no JSON."""
    raise ValueError(f"{constant} is no JSON")


def _same(first: Run, second: Run) -> bool:
    """Whether two runs are equal, except for their folders."""
    for field in fields(Run):
        if field.name == "folder":
            continue
        first_value, second_value = getattr(first, field.name), getattr(second, field.name)
        equal = (
            np.array_equal(first_value, second_value, equal_nan=first_value.dtype.kind == "f")
            if isinstance(first_value, np.ndarray)
            else first_value == second_value
        )
        if not equal:
            return False
    return True


def _line(error: BaseException) -> str:
    """The message of an error as one line of at most 160 characters."""
    return " ".join(str(error).split())[:160]


def _label(name: str, overrides: dict[str, str], sections: tuple[str, ...]) -> str:
    """A name with the settings of these sections that were changed, in braces. Those of a plugin itself have no prefix."""
    changed = [
        f"{key.removeprefix('method.').removeprefix('backbone.')}={value}"
        for key, value in overrides.items()
        if key.partition(".")[0] in sections
    ]
    return f"{name}{{{', '.join(changed)}}}" if changed else name
