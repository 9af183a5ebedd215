"""Many runs from one file: a matrix of methods, backbones, tasks, label fractions, seeds and settings."""

import multiprocessing
import os
import sys
import time
import tomllib
import traceback
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from harness.errors import UserError, unknown
from harness.files import digest, expand
from harness.planning import Request, locate, plan
from harness.progress import say
from harness.run import Finished, run

AXES = {
    "method": str,
    "backbone": str,
    "task": str,
    "preset": str,
    "mode": str,
    "protocol": str,
    "split": str,
    "seed": int,
    "label_fraction": float,
}
KEYS = (*AXES, "settings", "data", "corpus")
PHANTOM = "phantom"


@dataclass(frozen=True)
class Cell:
    """One run of a sweep; `shares` names the pre-training that it may share with others."""

    request: Request
    shares: str = ""

    def __str__(self) -> str:
        request = self.request
        fraction = f" {request.label_fraction:.0%} of the labels" if request.label_fraction < 1 else ""
        settings = f" {{{', '.join(request.settings)}}}" if request.settings else ""
        split = f" split {request.split}" if request.split != "fixed" else ""
        corpora = f" on {'+'.join(request.corpora)}" if request.corpora else ""
        protocol = f" {request.protocol}" if request.protocol != "finetune" else ""
        name = f"{request.method} {request.backbone} {request.task} {request.preset} seed {request.seed}"
        return f"{name}{protocol}{fraction}{split}{corpora}{settings}"


@dataclass(frozen=True)
class Outcome:
    """What became of a cell: a folder, or the reason why there is none."""

    cell: Cell
    folder: Path | None
    problem: str
    seconds: float


def read(path: Path, base: Request) -> list[Cell]:
    """The cells of a sweep file, in its order, each once.

    The file holds `[[matrix]]` tables, whose keys may be single values or lists, and `[defaults]` for all of them:
    method, backbone, task, preset, mode, protocol, split, seed, label_fraction, `settings` (a table of `--set` values, or a
    list of them), `corpus` (a name or folder, a list of them, or a list of such lists, each of which is pre-trained on together)
    and `data` (a folder, relative to the file; or "phantom"). `base` has what the command line gave.

    Raises:
        UserError: not TOML, unknown keys, values of the wrong type, or no method or task.
    """
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, RecursionError, tomllib.TOMLDecodeError) as error:
        raise UserError(f"{path} cannot be read as a sweep file: {error}") from None
    for key in content:
        if key not in ("description", "defaults", "matrix"):
            raise unknown(f"key in {path},", key, ("description", "defaults", "matrix"))
    defaults, blocks = content.get("defaults", {}), content.get("matrix", [{}])
    if not isinstance(defaults, dict) or not isinstance(blocks, list) or not all(isinstance(b, dict) for b in blocks):
        raise UserError(
            f"{path}: [defaults] is a table and [[matrix]] a list of tables: write them with these brackets"
        )
    cells = [Cell(request) for block in blocks for request in _expand(path, defaults, block, base)]
    return list(dict.fromkeys(cells))


def _expand(path: Path, defaults: dict[str, Any], block: dict[str, Any], base: Request) -> Iterator[Request]:
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
        for value in axes[key]:
            if not value or isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
                if key == "seed" and value == 0 and not isinstance(value, bool):
                    continue
                raise UserError(f"{path}: {key} = {value!r} is not a {kind.__name__}: give one, or a list of them")
    for settings in _settings(path, defaults.get("settings", {}), block.get("settings", {})):
        for *values, corpora in product(*axes.values(), _corpora(path, merged.get("corpus"), base.corpora)):
            request = replace(base, **dict(zip(axes, values, strict=True)), settings=(*base.settings, *settings))
            yield replace(request, data=_data(path, merged.get("data"), base.data), corpora=corpora)


def _settings(path: Path, common: Any, own: Any) -> list[tuple[str, ...]]:
    found = []
    for table in own if isinstance(own, list) else [own]:
        if not isinstance(common, dict) or not isinstance(table, dict):
            raise UserError(f'{path}: settings are tables of --set values, for instance {{"method.mask_ratio" = 0.6}}')
        found.append(tuple(f"{key}={_text(value)}" for key, value in (common | table).items()))
    return found


def _corpora(path: Path, named: Any, given: tuple[str, ...]) -> list[tuple[str, ...]]:
    """One tuple of corpora per cell; folders (with a slash) are relative to the file."""
    if named is None:
        return [given]
    sets = [each if isinstance(each, list) else [each] for each in (named if isinstance(named, list) else [named])]
    if not sets or not all(isinstance(one, str) and one for each in sets for one in each) or not all(sets):
        raise UserError(
            f"{path}: corpus = {named!r}: give names or folders, a list of them, or a list of lists of them"
        )
    return [tuple(str(path.parent / expand(one)) if "/" in one else one for one in each) for each in sets]


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _data(path: Path, named: Any, given: Path | None) -> Path | None:
    if named is None:
        return given
    if not isinstance(named, str):
        raise UserError(f'{path}: data = {named!r} is not a folder: give its name, or "{PHANTOM}"')
    try:
        return None if named == PHANTOM else path.parent / Path(named).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: data = {named!r}: {error} Give a folder") from None


def sort_out(cells: Sequence[Cell]) -> tuple[list[Cell], list[Outcome]]:
    """Cells to run, with what they share, and outcomes of those that are finished or cannot run. Phantoms are written."""
    todo, known = [], []
    for cell in cells:
        began = time.perf_counter()
        try:
            setting = plan(cell.request, *locate(cell.request))
        except UserError as error:
            known.append(Outcome(cell, None, str(error), time.perf_counter() - began))
            continue
        folder = cell.request.runs / setting.run_id
        if (folder / "record.json").exists():
            known.append(Outcome(cell, folder, "", 0.0))
        else:
            shares = setting.pretrain_key if setting.plugins.method.trains else setting.run_id
            todo.append(replace(cell, shares=shares))
    return todo, known


def execute(cells: Sequence[Cell], jobs: int, logs: Path) -> Iterator[Outcome]:
    """Run the cells, `jobs` at a time, each job in a process of its own; outcomes as they come.

    Of cells that share a pre-training the first runs alone, the others after it. A process that dies takes only its own
    cell with it.
    """
    groups: dict[str, list[Cell]] = defaultdict(list)
    for cell in cells:
        groups[cell.shares].append(cell)
    ready = [group.pop(0) for group in groups.values()]
    logs.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Spawned: torch's threads do not survive a fork. A pool for each job, since a process that dies breaks its pool.
    context, setup = multiprocessing.get_context("spawn"), (max(1, cores // jobs),)

    def new_pool() -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=context, initializer=_set_threads, initargs=setup)

    idle = [new_pool() for _ in range(jobs)]
    running: dict[Future[Outcome], tuple[Cell, ProcessPoolExecutor]] = {}
    try:
        while ready or running:
            while ready and idle:
                cell, pool = ready.pop(0), idle.pop()
                log = logs / f"{_name(cell)}.log"
                say(f"start: {cell}; its messages are in {log}")
                running[pool.submit(_work, cell, log)] = cell, pool
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, pool = running.pop(future)
                try:
                    outcome = future.result()
                except BrokenProcessPool:
                    outcome = Outcome(cell, None, "its process died (out of memory?); see its log", 0.0)
                    pool.shutdown()
                    pool = new_pool()
                idle.append(pool)
                ready += groups.pop(cell.shares, [])
                yield outcome
    finally:
        for pool in (*idle, *(pool for _, pool in running.values())):
            pool.shutdown(wait=False, cancel_futures=True)


def _work(cell: Cell, log: Path) -> Outcome:
    """In the job's process: run one cell, its messages into its log."""
    began = time.perf_counter()
    before = sys.stderr
    with log.open("w") as sys.stderr:
        try:
            finished: Finished = run(cell.request)
            return Outcome(cell, finished.folder, "", time.perf_counter() - began)
        except UserError as error:
            print(error, file=sys.stderr)
            return Outcome(cell, None, str(error), time.perf_counter() - began)
        # Whatever goes wrong in one cell is reported, and the others go on.
        except Exception as error:
            traceback.print_exc()
            return Outcome(cell, None, f"{type(error).__name__}: {error}; see {log}", time.perf_counter() - began)
        finally:
            sys.stderr = before


def _set_threads(number: int) -> None:
    import torch

    torch.set_num_threads(number)


def _name(cell: Cell) -> str:
    request = cell.request
    task = Path(request.task).name
    return f"{task}-{request.method}-{request.backbone}-{request.preset}-s{request.seed}-{digest(str(cell))[:6]}"
