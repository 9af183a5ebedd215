"""Finished runs as the leaderboard sees them: the record, and Dice, HD95 and surface Dice per case.

Records come from anywhere, so nothing in them is believed before it is checked: types, ranges, names that become files.
"""

import csv
import gc
import io
import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
LARGEST = 64 * 2**20
"""Bytes of a record or of a table of cases; the largest real ones are a thousandth of it."""

TEXT = ("method", "backbone", "task", "task_version", "mode", "protocol", "preset", "metric_policy")
NEEDED = ("run_id", *TEXT, "overrides", "label_fraction", "seed", "data", "metrics", "timing")
STATUS = ("scored", "missed", "spurious", "empty")
MEASURED = ("dice", "hd95_mm", "surface_dice")
SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}")
SHARED = ("task", "data", "preset", "mode", "protocol", "label_fraction", "metric_policy", "test_cases")
"""What two runs must have in common to share a table, in the order of `Run.table`."""


class RecordError(Exception):
    """A record that cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        targets: in the task's order.
        dice, hd95, surface_dice: (cases, targets); NaN where a case has no value for a target.
        missed: (cases, targets), the reference is there and the prediction is not.
    """

    folder: Path
    record: dict[str, Any]
    cases: tuple[str, ...]
    targets: tuple[str, ...]
    dice: NDArray[np.float64]
    hd95: NDArray[np.float64]
    surface_dice: NDArray[np.float64]
    missed: NDArray[np.bool_]

    @cached_property
    def table(self) -> tuple[Any, ...]:
        """What must be equal for two runs to share a table, see `SHARED`."""
        record = self.record
        data = record["data"]
        return (
            record["task"] if record["task_version"] == "1" else f"{record['task']}@{record['task_version']}",
            f"{data['source']}:{data['fingerprint'][:8]}",
            _label(record["preset"], self._overrides, ("split", "task", "pretrain", "finetune", "evaluate")),
            record["mode"],
            record["protocol"],
            float(record["label_fraction"]),
            record["metric_policy"],
            self.cases,
        )

    @property
    def run_id(self) -> str:
        """Name of the run, unique by all that determines its result."""
        return str(self.record["run_id"])

    @property
    def seed(self) -> int:
        """Of all randomness in the run."""
        return int(self.record["seed"])

    @property
    def num_test_seen(self) -> int:
        """Test cases that were trained or pre-trained on: 0 in an honest run."""
        return int(self.record["data"].get("n_test_seen", 0))

    @property
    def phantom(self) -> bool:
        """Whether the data was made up."""
        return bool(self.record["data"]["source"] != "real")

    @property
    def _overrides(self) -> dict[str, str]:
        split = self.record["data"].get("split", "fixed")
        return dict(self.record["overrides"]) | ({"split": split} if split != "fixed" else {})

    @cached_property
    def method(self) -> str:
        """Its name, with corpora and the settings that were changed; files by name and digest, not by path."""
        overrides = dict(self.record["overrides"])
        if corpora := self.record["data"].get("corpora"):
            overrides["method.corpus"] = "+".join(f"{each['name']}@{each['fingerprint']}" for each in corpora)
        for field, digest in self.record.get("files", {}).items():
            overrides[f"method.{field}"] = f"{PurePath(overrides.get(f'method.{field}', field)).name}@{digest[:8]}"
        return _label(self.record["method"], overrides, ("method",))

    @cached_property
    def backbone(self) -> str:
        """Its name, with the settings that were changed from the preset."""
        return _label(self.record["backbone"], self.record["overrides"], ("backbone",))


def load_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All finished runs directly below `folders`, and one line for each record that cannot be used.

    Where one run id has two contents neither is used, since nothing tells which is right.
    """
    with _without_collector():
        return _load(folders)


@contextmanager
def _without_collector() -> Iterator[None]:
    """Thousands of records are millions of small objects, none of them garbage; looking for it takes a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _load(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    runs: dict[str, Run] = {}
    problems, conflicts = [], set()
    for folder in dict.fromkeys(folder.resolve() for folder in folders):
        for path in sorted(folder.glob("*/record.json")):
            try:
                run = load_run(path.parent)
            except RecordError as error:
                problems.append(str(error))
                continue
            other = runs.setdefault(run.run_id, run)
            if other is not run and not _same(run, other):
                conflicts.add(run.run_id)
                problems.append(
                    f"{path}: run {run.run_id} is also in {other.folder}, with other content; neither is used: remove one"
                )
    return [run for name, run in runs.items() if name not in conflicts], problems


def load_run(folder: Path) -> Run:
    """One run folder. Raises RecordError where the record or the cases are missing, foreign, incomplete or out of range."""
    path = folder / "record.json"
    record = read_record(path)
    try:
        targets = tuple(name for name in record["metrics"] if name != "average")
        cases, values, status = _read_cases(folder / "cases.csv", targets)
        run = Run(
            folder=folder,
            record=record,
            cases=cases,
            targets=targets,
            dice=values["dice"],
            hd95=values["hd95_mm"],
            surface_dice=values["surface_dice"],
            missed=status == STATUS.index("missed"),
        )
        _ = run.table, run.method, run.backbone
    except RecordError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        raise RecordError(f"{path}: cannot be read as a run ({type(error).__name__}: {_line(error)})") from None
    return run


def read_record(path: Path) -> dict[str, Any]:
    """The record of a run, with the fields that tables need. Raises RecordError where it is anything else."""
    try:
        text = _read(path)
        record = json.loads(text, parse_constant=_refuse)
    except (OSError, ValueError, RecursionError) as error:
        raise RecordError(f"{path}: cannot be read as a run record ({type(error).__name__}: {_line(error)})") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise RecordError(f"{path}: not a run record of schema {SCHEMA}")
    lacking = [name for name in NEEDED if name not in record]
    if lacking:
        raise RecordError(f"{path}: lacks {', '.join(lacking)}")
    for name, kind in (("overrides", dict), ("data", dict), ("metrics", dict), ("timing", dict)):
        if not isinstance(record[name], kind):
            raise RecordError(f"{path}: {name} is a {type(record[name]).__name__}, due is a table")
    for name in ("run_id", *TEXT):
        if not isinstance(record[name], str) or not 0 < len(record[name]) <= 1000:
            raise RecordError(f"{path}: {name} is {record[name]!r:.80}, due is text of 1 to 1000 characters")
    if not SAFE.fullmatch(record["run_id"]):
        raise RecordError(
            f"{path}: run_id is {record['run_id']!r:.80}, due are letters, digits, '.', '_', '-', '+', '='"
        )
    fraction, seed = record["label_fraction"], record["seed"]
    if not _is_number(fraction) or not 0 < fraction <= 1:
        raise RecordError(f"{path}: label_fraction is {fraction!r:.80}, due is a number in 0..1, without 0")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise RecordError(f"{path}: seed is {seed!r:.80}, due is a whole number of 0 or more")
    data = record["data"]
    if data.get("source") not in ("real", "phantom") or not isinstance(data.get("fingerprint"), str):
        raise RecordError(f"{path}: data has no source (real or phantom) or no fingerprint")
    return record


def _read_cases(path: Path, targets: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, NDArray[Any]], NDArray[Any]]:
    """Cases in the order of their names, values (cases, targets) per column, and the number of the status."""
    columns = _columns(path)
    names, numbers = columns["case"], {target: number for number, target in enumerate(targets)}
    cases = tuple(sorted(set(names)))
    order = {case: number for number, case in enumerate(cases)}
    try:
        column = np.array([numbers[target] for target in columns["target"]], dtype=int)
        status = np.array([STATUS.index(word) for word in columns["status"]], dtype=int)
    except (KeyError, ValueError) as error:
        raise RecordError(
            f"{path}: {_line(error)} is no target of the record or no status ({', '.join(STATUS)})"
        ) from None
    shape = len(cases), len(targets)
    place = np.array([order[name] for name in names], dtype=int) * len(targets) + column
    counts = np.bincount(place, minlength=len(cases) * len(targets))
    if not targets or not cases or (counts != 1).any():
        raise RecordError(
            f"{path}: due is one row per case and target, it has {len(names)} for {shape[0]} x {shape[1]}"
        )
    values = {}
    for name in MEASURED:
        values[name] = np.full(len(names), np.nan)
        if name in columns:
            cells = np.array([float(cell) if cell else math.nan for cell in columns[name]])
            if not np.isfinite(cells[[bool(cell) for cell in columns[name]]]).all():
                raise RecordError(f"{path}: {name} has a value that is not finite")
            values[name][place] = cells
        values[name] = values[name].reshape(shape)
    ordered = np.empty_like(status)
    ordered[place] = status
    _check_ranges(path, values, ordered.reshape(shape))
    return cases, values, ordered.reshape(shape)


def _columns(path: Path) -> dict[str, list[str]]:
    """The columns of a CSV as text. Raises RecordError for ragged rows or lacking columns."""
    text = _read(path).replace("\r\n", "\n").removesuffix("\n")
    if '"' in text:
        rows = list(csv.reader(io.StringIO(text), strict=True))
        header, cells, widths = rows[0], [cell for row in rows[1:] for cell in row], {len(row) for row in rows}
    else:  # as the harness writes it, unless a name has a comma; several times faster
        lines = text.split("\n")
        widths = {line.count(",") + 1 for line in lines}
        header, cells = lines[0].split(","), ",".join(lines[1:]).split(",") if len(lines) > 1 else []
    if widths != {len(header)} or not cells:
        raise RecordError(f"{path}: rows of {', '.join(map(str, sorted(widths)))} cells: is it truncated?")
    lacking = [name for name in ("case", "target", "status", "dice", "hd95_mm") if name not in header]
    if lacking or len(set(header)) < len(header):
        raise RecordError(f"{path}: its header is {','.join(header)[:120]!r}, due are case,target,status,dice,hd95_mm")
    return {name: cells[number :: len(header)] for number, name in enumerate(header)}


def _check_ranges(path: Path, values: dict[str, NDArray[Any]], status: NDArray[Any]) -> None:
    for name in ("dice", "surface_dice"):
        if ((values[name] < 0) | (values[name] > 1)).any():
            raise RecordError(f"{path}: {name} leaves 0..1")
    if (values["hd95_mm"] < 0).any():
        raise RecordError(f"{path}: hd95_mm is negative")
    scored, one_sided = status == STATUS.index("scored"), (status == 1) | (status == 2)
    if np.isnan(values["dice"][scored | one_sided]).any() or np.isnan(values["hd95_mm"][scored]).any():
        raise RecordError(f"{path}: a case that was scored has no Dice or no HD95")
    if (values["dice"][one_sided] != 0).any():
        raise RecordError(f"{path}: a structure that was missed or made up has a Dice other than 0")


def _read(path: Path) -> str:
    if path.stat().st_size > LARGEST:
        raise RecordError(f"{path}: {path.stat().st_size} bytes, more than the {LARGEST} that are read")
    return path.read_text(encoding="utf-8")


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is no JSON")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _same(first: Run, second: Run) -> bool:
    for field in fields(Run):
        if field.name == "folder":
            continue
        mine, theirs = getattr(first, field.name), getattr(second, field.name)
        equal = (
            np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f")
            if isinstance(mine, np.ndarray)
            else mine == theirs
        )
        if not equal:
            return False
    return True


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160]


def _label(name: str, overrides: dict[str, str], sections: tuple[str, ...]) -> str:
    changed = [
        f"{key.partition('.')[2] if len(sections) == 1 else key}={value}"
        for key, value in overrides.items()
        if key.partition(".")[0] in sections
    ]
    return f"{name}{{{', '.join(changed)}}}" if changed else name
