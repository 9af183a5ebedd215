"""`harness show`: one finished run."""

import argparse
import json
from typing import TYPE_CHECKING, Any

from harness.cli.options import add_options
from harness.cli.output import as_lines
from harness.cli.run import table_of
from harness.system.errors import UserError

if TYPE_CHECKING:
    from leaderboards.records import Run

SECTIONS = (
    "run_id",
    "config",
    "data",
    "transfer",
    "timing",
    "memory",
    "computed_with",
    "environment",
    "metric_policy",
)


def add_parser(commands: Any) -> None:
    """The options of `harness show`."""
    parser = commands.add_parser("show", help="a finished run", allow_abbrev=False)
    parser.add_argument("run", metavar="RUN", help="run id, its beginning, or a run folder")
    add_options(parser, "runs")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=show)


def _scores(run: "Run") -> list[str]:
    """The run's own scores, a line per target."""
    from leaderboards.text import align

    rows = [["run " + run.run_id, "Dice", "HD95, mm", "surface Dice"]]
    for target, means in run.record["metrics"].items():
        values = [(means.get("dice"), ".4f"), (means.get("hd95"), ".2f"), (means.get("surface_dice"), ".4f")]
        rows.append([target, *("-" if value is None else format(value, form) for value, form in values)])
    return [*align(rows), ""]


def show(arguments: argparse.Namespace) -> None:
    """Print the tables of a finished run, with the runs beside it that share them, and its record."""
    from harness.runs.status import find_run
    from leaderboards import board, records
    from leaderboards.text import printable

    try:
        run = records.load_run(find_run(arguments.run, arguments.runs))
    except records.RecordError as error:
        raise UserError(str(error)) from None
    if arguments.json:
        print(json.dumps(run.record, indent=1))
        return
    # A run that conflicts with another one of its name is not among those beside it.
    beside, _ = records.load_runs([run.folder.parent])
    is_there = any(each.run_id == run.run_id for each in beside)
    print(*map(printable, _scores(run)), sep="\n")
    print(table_of(board.gather(beside if is_there else [run]), run.folder))
    lines = as_lines({name: run.record.get(name) for name in SECTIONS}).splitlines()
    print(*map(printable, lines), sep="\n")
