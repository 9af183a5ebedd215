"""Many runs from one file: a matrix of methods, backbones, tasks, label fractions, seeds and settings."""

import time
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

from harness.config.presets import read_preset
from harness.config.request import PHANTOM, Request, options
from harness.runs.locate import locate
from harness.runs.plan import RunPlan, plan
from harness.system.errors import UserError, unknown
from harness.system.files import digest, expand, read_json

MOST_CELLS = 10_000
LARGEST = 2**20  # bytes of a sweep file, at most
AXES = {name: option.axis for name, option in options(Request) if option.axis is not None}
KEYS = (*AXES, "settings", "data", "corpus")


@dataclass(frozen=True)
class SweepCell:
    """One run of a sweep."""

    request: Request

    def __str__(self) -> str:
        request = self.request
        fraction = f" {100 * request.label_fraction:g}% of the labels" if request.label_fraction < 1 else ""
        shots = f" {request.shots} labelled cases" if request.shots else ""
        drawn = f" label seed {request.label_seed}" if request.label_seed is not None else ""
        settings = f" {{{', '.join(request.settings)}}}" if request.settings else ""
        split = f" split {request.split}" if request.split != "fixed" else ""
        corpora = f" on {'+'.join(request.corpora)}" if request.corpora else ""
        protocol = f" {request.protocol}" if request.protocol != "finetune" else ""
        tuned = f" tuned over {{{request.tune}}}" if request.tune else ""
        moved = f" transfer {request.transfer}" if request.transfer != "method" else ""
        name = f"{request.method} {request.backbone} {request.task} {request.preset} seed {request.seed}"
        return f"{name}{protocol}{moved}{fraction}{shots}{drawn}{split}{corpora}{settings}{tuned}"

    @property
    def name(self) -> str:
        """The cell's name in the names of files."""
        request = self.request
        task = Path(request.task).name
        # Two cells may differ only in their data, or in digits of the label fraction that are not shown.
        key = digest([str(self), request.label_fraction, str(request.data)])[:6]
        return f"{task}-{request.method}-{request.backbone}-{request.preset}-s{request.seed}-{key}"


@dataclass(frozen=True)
class PlannedCell:
    """A cell that is to be run.

    Attributes:
        folder: the folder of its run.
        pretrain: folder of the pre-training, which cells may share; None where nothing is pre-trained.
        lengths: number of pre-training steps, of fine-tuning steps, and of test cases.
    """

    cell: SweepCell
    folder: Path
    pretrain: Path | None
    lengths: tuple[int, int, int]


@dataclass(frozen=True)
class Outcome:
    """The result of a cell.

    Attributes:
        folder: the folder of its finished run; None where there is none.
        problem: why there is no finished run; empty where there is one.
        seconds: time that the cell took in this sweep.
        before: whether it failed in an earlier sweep.
    """

    cell: SweepCell
    folder: Path | None
    problem: str
    seconds: float
    before: bool = False


def read(path: Path, base: Request, preset: str = "") -> list[SweepCell]:
    """The cells of a sweep file, in the order of the file, without duplicates.

    The file holds `[[matrix]]` tables and a `[defaults]` table that applies to all of them. The value of a key is a single
    value or a list. The keys are method, backbone, task, preset, mode, protocol, transfer, split, seed, label_fraction,
    shots, label_seed, tune (a grid), and

    * `settings`: a table of `--set` values, or a list of such tables,
    * `corpus`: a name or folder, a list of them, or a list of lists, where each inner list is pre-trained on together,
    * `data`: a folder, relative to the file, or "phantom".

    Args:
        base: the request that the command line gave; a cell takes from it what the file leaves out.
        preset: replaces the presets of the file, unless it is empty.

    Raises:
        UserError: not TOML, unknown keys, values of the wrong type, no method or task, or an unknown preset.
    """
    if preset:
        read_preset(preset)
    try:
        if path.stat().st_size > LARGEST:
            raise UserError(f"{path} is larger than 1 MiB: a sweep file describes cells, it does not list them")
        content = tomllib.loads(path.read_text())
    # ValueError covers three cases: no TOML, no UTF-8, and a number of thousands of digits.
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as a sweep file: {error}") from None
    for key in content:
        if key not in ("description", "defaults", "matrix"):
            raise unknown(f"key in {path},", key, ("description", "defaults", "matrix"))
    defaults, blocks = content.get("defaults", {}), content.get("matrix", [{}])
    if not isinstance(defaults, dict) or not isinstance(blocks, list) or not all(isinstance(b, dict) for b in blocks):
        raise UserError(
            f"{path}: [defaults] is a table and [[matrix]] a list of tables: write them with these brackets"
        )
    cells: dict[SweepCell, None] = {}
    for block in blocks:
        for request in _expand(path, defaults, block, base):
            cells[SweepCell(replace(request, preset=preset) if preset else request)] = None
            if len(cells) > MOST_CELLS:
                raise UserError(f"{path} describes more than {MOST_CELLS} runs: split it into several files")
    return list(cells)


def _expand(path: Path, defaults: dict[str, Any], block: dict[str, Any], base: Request) -> Iterator[Request]:
    """The requests of one `[[matrix]]` table: the product of its lists. Raises UserError for a value that is not allowed."""
    for key in (*defaults, *block):
        if key not in KEYS:
            raise unknown(f"key of a matrix in {path},", key, KEYS)
    merged = defaults | block
    axes = {}
    for key, kind in AXES.items():
        values = merged.get(key, getattr(base, key))
        axes[key] = values if isinstance(values, list) else [values]
        if not axes[key]:
            raise UserError(
                f"{path}: {key} is an empty list, which leaves nothing to run: give a value or take the key out"
            )
        for value in axes[key] if key in merged or key in ("method", "task") else ():
            if isinstance(value, int) and abs(value) >= 2**63:
                raise UserError(f"{path}: {key} is a number of more than 63 bits: give a smaller one")
            if not value or isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                if key in ("seed", "label_seed") and value == 0 and not isinstance(value, bool):
                    continue
                raise UserError(
                    f"{path}: {key} = {_printable_value(value)} is not a {kind.__name__} that can be used: give one, or a list "
                    "of them"
                )
    if (number := prod(len(values) for values in axes.values())) > MOST_CELLS:
        raise UserError(f"{path}: a matrix of {number} runs, at most {MOST_CELLS} are allowed: take values out")
    for settings in _settings(path, defaults.get("settings", {}), block.get("settings", {})):
        for *values, corpora in product(*axes.values(), _corpora(path, merged.get("corpus"), base.corpora)):
            request = replace(base, **dict(zip(axes, values, strict=True)), settings=(*base.settings, *settings))
            yield replace(request, data=_data(path, merged.get("data"), base.data), corpora=corpora)


def _settings(path: Path, defaults: Any, tables: Any) -> list[tuple[str, ...]]:
    """One tuple of `key=value` pairs per table of `settings`, each on top of the settings of `[defaults]`."""
    pairs = []
    for table in tables if isinstance(tables, list) else [tables]:
        if not isinstance(defaults, dict) or not isinstance(table, dict):
            raise UserError(f'{path}: settings are tables of --set values, for instance {{"method.mask_ratio" = 0.6}}')
        pairs.append(tuple(f"{key}={_text(path, key, value)}" for key, value in (defaults | table).items()))
    return pairs


def _corpora(path: Path, value: Any, base: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One tuple of corpora per cell. A corpus with a slash is a folder relative to the file."""
    if value is None:
        return [base]
    groups = [item if isinstance(item, list) else [item] for item in (value if isinstance(value, list) else [value])]
    if not groups or not all(isinstance(name, str) and name for group in groups for name in group) or not all(groups):
        raise UserError(
            f"{path}: corpus = {_printable_value(value)}: give names or folders, a list of them, or a list of lists of them"
        )
    return [tuple(str(path.parent / expand(name)) if "/" in name else name for name in group) for group in groups]


def _printable_value(value: Any) -> str:
    """A value for a message. Python refuses to print numbers of thousands of digits."""
    try:
        return repr(value)[:80]
    except ValueError:
        return "a number of thousands of digits"


def _text(path: Path, key: str, value: Any) -> str:
    """The text of a `--set` value; the items of a list are separated by commas."""
    values = value if isinstance(value, list) else [value]
    for item in values:
        if not isinstance(item, str | int | float) or (isinstance(item, int) and abs(item) >= 2**63):
            raise UserError(f"{path}: settings: {key[:80]} is no text, number, yes or no, nor a list of them: give one")
    return ",".join(map(str, values))


def _data(path: Path, value: Any, base: Path | None) -> Path | None:
    """The data folder of a cell; None for a phantom."""
    if value is None:
        return base
    if not isinstance(value, str):
        raise UserError(f'{path}: data = {_printable_value(value)} is not a folder: give its name, or "{PHANTOM}"')
    try:
        return None if value == PHANTOM else path.parent / Path(value).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: data = {value!r}: {error} Give a folder") from None


def select_cells(
    cells: Sequence[SweepCell], notes: Path, retry: bool = False
) -> tuple[list[PlannedCell], list[Outcome]]:
    """Separate the cells that have to be run from those that are finished, failed before or cannot run.

    The phantoms that cells need are written here.

    Args:
        notes: folder with the notes of earlier sweeps about cells that failed.
        retry: run the cells again that failed in an earlier sweep.

    Returns:
        the cells to run, and the outcomes of the others.
    """
    todo: list[PlannedCell] = []
    outcomes = []
    for cell in cells:
        began = time.perf_counter()
        try:
            run_plan = plan(cell.request, *locate(cell.request))
        except (UserError, OSError) as error:
            outcomes.append(Outcome(cell, None, str(error), time.perf_counter() - began))
            continue
        runs = cell.request.runs
        folder, failed = runs / run_plan.run_id, read_json(notes / f"{cell.name}.failed.json")
        if (folder / "record.json").exists():
            outcomes.append(Outcome(cell, folder, "", 0.0))
        elif isinstance(failed, dict) and not retry:
            outcomes.append(Outcome(cell, None, str(failed.get("problem")), 0.0, before=True))
        else:
            todo.append(_planned(cell, run_plan, folder))
    return todo, outcomes


def _planned(cell: SweepCell, run_plan: RunPlan, folder: Path) -> PlannedCell:
    """The cell with its folders and lengths."""
    config, trains = run_plan.config, bool(run_plan.plugins.method.trains)
    pretrain_steps = config.pretrain.schedule(run_plan.num_pretrain)[0] if trains else 0
    finetune_steps, _ = config.finetune.schedule(len(run_plan.label_cases))
    pretrain = run_plan.pretrain_folder(cell.request.runs) if trains else None
    lengths = pretrain_steps, finetune_steps * max(1, len(run_plan.trials)), len(run_plan.test)
    return PlannedCell(cell, folder, pretrain, lengths)
