"""`harness sweep`: all cells of a file, where they are, and their table."""

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness import jobs, sweep
from harness.actions import execution_of
from harness.cost_actions import print_estimates
from harness.errors import UserError
from harness.execution import Interrupted
from harness.files import below
from harness.planning import Request
from harness.progress import say
from harness.sweep import Cell, Outcome, Planned
from harness.tracking import check_trackers
from leaderboards import board, records, table

SHOWN = 30  # rows of the live table


def run(arguments: argparse.Namespace) -> int:
    """Read, sort out, run, show. Status 2 where a cell has no record in the end."""
    how = execution_of(arguments)
    check_trackers(how.trackers)
    # Method and task stand in the file; these are not names that anything has.
    base = Request(
        method="", task="", data=arguments.data, runs=arguments.runs, plugins=tuple(arguments.plugins), how=how
    )
    cells = sweep.read(arguments.file, base)
    notes = arguments.runs / "sweeps" / arguments.file.stem
    # A launcher that cannot be had is known before phantoms are written and data is read.
    launcher = None if arguments.dry_run else _launcher(arguments, notes)
    todo, outcomes = sweep.sort_out(cells, notes, arguments.retry)
    _say_sorted(len(cells), todo, outcomes)
    if launcher is None:
        print(*(f"  to run: {each.cell}" for each in todo), sep="\n", flush=True)
        print_estimates([each.cell.request for each in todo], arguments.jobs)
        return 2 if any(outcome.folder is None for outcome in outcomes) else 0
    try:
        outcomes += _watch(todo, launcher) if todo else []
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(f"{error or 'Ctrl-C'}: {launcher.stop()}") from None
    return _report(outcomes, arguments.runs / "sweeps" / f"{arguments.file.stem}.csv")


def _launcher(arguments: argparse.Namespace, notes: Path) -> jobs.Launcher:
    if arguments.launcher == "local":
        if arguments.slurm:
            raise UserError(f"--slurm {arguments.slurm[0]} is for --launcher slurm: add it, or leave --slurm out")
        return jobs.Local(notes, arguments.processes, arguments.jobs)
    pairs = [pair.partition("=") for pair in arguments.slurm]
    for key, sign, value in pairs:
        if not (key and sign and value):
            raise UserError(f"--slurm {key}{sign}{value} is not of the form KEY=VALUE, for instance partition=gpu")
    return jobs.Slurm(notes, arguments.processes, arguments.jobs, {key.strip(): value for key, _, value in pairs})


def _say_sorted(number: int, todo: Sequence[Planned], outcomes: Sequence[Outcome]) -> None:
    finished = sum(outcome.folder is not None for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.before]
    refused = [outcome for outcome in outcomes if outcome.folder is None and not outcome.before]
    before = f", {len(failed)} that failed before (--retry runs them again)" if failed else ""
    print(
        f"{number} cells: {finished} finished before, {len(todo)} to run{before}, {len(refused)} that cannot run",
        flush=True,
    )
    for kind, some in (("failed before", failed), ("cannot run", refused)):
        for outcome in some:
            print(f"  {kind}: {outcome.cell}: {outcome.problem}", flush=True)


def _watch(todo: Sequence[Planned], launcher: jobs.Launcher) -> list[Outcome]:
    """Outcomes of all cells; meanwhile a live table on a terminal, a line per outcome elsewhere."""
    found: list[Outcome] = []
    with _shown(todo, found):
        for outcome in jobs.execute(todo, launcher):
            if outcome is not None:
                found.append(outcome)
                text = f"{outcome.problem or 'done'}: {outcome.cell}, {outcome.seconds:.0f} s"
                print(f"[{len(found)}/{len(todo)}] {text}", flush=True)
    return found


@contextmanager
def _shown(todo: Sequence[Planned], found: Sequence[Outcome]) -> Iterator[None]:
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Live(console=console, get_renderable=lambda: _table(todo, found), refresh_per_second=1, transient=True):
        yield


def _table(todo: Sequence[Planned], found: Sequence[Outcome]) -> Table:
    """Where each cell is; those at work first, those that wait last."""
    known = {outcome.cell: outcome for outcome in found}
    common = set.intersection(*(set(each.cell.request.settings) for each in todo))
    rows = []
    for each in todo:
        outcome = known.get(each.cell)
        where = ("failed: " + outcome.problem if outcome.problem else "done") if outcome else progress_of(each)
        rank = 2 if outcome else (1 if where == "waiting" else 0)
        own = tuple(pair for pair in each.cell.request.settings if pair not in common)
        name = str(Cell(replace(each.cell.request, settings=own)))
        rows.append(
            (rank, Text(name, overflow="ellipsis", no_wrap=True), Text(where, overflow="ellipsis", no_wrap=True))
        )
    rows.sort(key=lambda row: row[0])
    hidden = f", {len(rows) - SHOWN} not shown" if len(rows) > SHOWN else ""
    shown = Table("cell", "where it is", title=f"{len(found)} of {len(todo)} done{hidden}")
    for _, text, state in rows[:SHOWN]:
        shown.add_row(text, state)
    return shown


def progress_of(planned: Planned) -> str:
    """Where a cell is, by the files that it has written."""
    first, second, cases = planned.lengths
    stage, number = where(planned.folder)
    if stage == "evaluate":
        return f"evaluating, {number} of {cases} cases"
    if stage == "finetune":
        return f"fine-tuning, step {number} of {second}"
    if planned.pretrain is not None and not (planned.pretrain / "stage.json").exists():
        _, number = where(planned.pretrain)
        return f"pre-training, step {number} of {first}" if number else "waiting"
    return "waiting"


def where(folder: Path) -> tuple[str, int]:
    """The stage of a run or pre-training and its last step; once it is fine-tuned, `evaluate` and the cases scored."""
    if (folder / "finetune.json").exists():
        return "evaluate", len(below(folder / "evaluation", "*.npz"))
    try:
        with (folder / "history.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole = file.read().rpartition(b"\n")[0]
        last = json.loads(whole.rpartition(b"\n")[2])
        return str(last["stage"]), int(last["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0


def _report(outcomes: Sequence[Outcome], csv: Path) -> int:
    runs = [records.load_run(outcome.folder) for outcome in outcomes if outcome.folder is not None]
    tables = board.gather(runs)
    table.write(table.build(tables), csv)
    print(f"\n{table.render(tables)}\n\nleaderboard of this sweep:\n  {csv}")
    failed = [outcome for outcome in outcomes if outcome.folder is None]
    for outcome in failed:
        print(f"harness: error: no record of {outcome.cell}: {outcome.problem}", file=sys.stderr)
    if failed:
        say("harness sweep --retry runs what failed once more")
    return 2 if failed else 0
