"""A live table of a running sweep: the progress of each cell."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from harness.runs.status import stage_and_step
from harness.sweeps import job, schedule
from harness.sweeps.cells import Outcome, PlannedCell, SweepCell

SHOWN = 30  # rows of the live table


def watch(todo: Sequence[PlannedCell], launcher: job.Launcher) -> list[Outcome]:
    """Run the cells and return their outcomes. Prints a line per outcome; a terminal shows a live table as well."""
    outcomes: list[Outcome] = []
    with _live_table(todo, outcomes):
        for outcome in schedule.execute(todo, launcher):
            if outcome is not None:
                outcomes.append(outcome)
                text = f"{outcome.problem or 'done'}: {outcome.cell}, {outcome.seconds:.0f} s"
                print(f"[{len(outcomes)}/{len(todo)}] {text}", flush=True)
    return outcomes


@contextmanager
def _live_table(todo: Sequence[PlannedCell], outcomes: Sequence[Outcome]) -> Iterator[None]:
    """Show the live table meanwhile; nothing where stderr is not a terminal."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield
        return
    with Live(console=console, get_renderable=lambda: _table(todo, outcomes), refresh_per_second=1, transient=True):
        yield


def _table(todo: Sequence[PlannedCell], outcomes: Sequence[Outcome]) -> Table:
    """The table of all cells: first those that run, then those that wait, last those that ended."""
    outcome_of_cell = {outcome.cell: outcome for outcome in outcomes}
    common = set.intersection(*(set(planned.cell.request.settings) for planned in todo))
    rows = []
    for planned in todo:
        outcome = outcome_of_cell.get(planned.cell)
        progress = ("failed: " + outcome.problem if outcome.problem else "done") if outcome else progress_of(planned)
        rank = 2 if outcome else (1 if progress == "waiting" else 0)
        own = tuple(pair for pair in planned.cell.request.settings if pair not in common)
        name = str(SweepCell(replace(planned.cell.request, settings=own)))
        rows.append(
            (rank, Text(name, overflow="ellipsis", no_wrap=True), Text(progress, overflow="ellipsis", no_wrap=True))
        )
    rows.sort(key=lambda row: row[0])
    hidden = f", {len(rows) - SHOWN} not shown" if len(rows) > SHOWN else ""
    table = Table("cell", "where it is", title=f"{len(outcomes)} of {len(todo)} done{hidden}")
    for _, text, state in rows[:SHOWN]:
        table.add_row(text, state)
    return table


def progress_of(planned: PlannedCell) -> str:
    """The progress of a cell in words, read from the files that it has written."""
    pretrain_steps, finetune_steps, cases = planned.lengths
    stage, count = stage_and_step(planned.folder)
    if stage == "evaluate":
        return f"evaluating, {count} of {cases} cases"
    if stage == "finetune":
        return f"fine-tuning, step {count} of {finetune_steps}"
    if planned.pretrain is not None and not (planned.pretrain / "stage.json").exists():
        _, count = stage_and_step(planned.pretrain)
        return f"pre-training, step {count} of {pretrain_steps}" if count else "waiting"
    return "waiting"
