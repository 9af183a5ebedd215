"""The table of a sweep at work: where each cell is."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.runs.status import where
from harness.sweeps import job, schedule
from harness.sweeps.cells import Outcome, Planned, SweepCell

SHOWN = 30  # rows of the live table


def watch(todo: Sequence[Planned], launcher: job.Launcher) -> list[Outcome]:
    """Outcomes of all cells; meanwhile a live table on a terminal, a line per outcome elsewhere."""
    found: list[Outcome] = []
    with _shown(todo, found):
        for outcome in schedule.execute(todo, launcher):
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
        name = str(SweepCell(replace(each.cell.request, settings=own)))
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
