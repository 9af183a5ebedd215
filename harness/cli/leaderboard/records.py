"""Where the runs of a table come from: the options that say it, and the runs themselves."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.cli.options import add_options
from harness.system.console import say
from harness.system.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from leaderboards.records import Run

Command = Callable[[argparse.Namespace], int]


def add_records(parser: argparse.ArgumentParser, command: Command) -> None:
    """The options that say where records come from; `command` is called with them."""
    add_options(parser, "runs")
    parser.add_argument(
        "--from",
        action="append",
        type=Path,
        metavar="DIR",
        dest="folders",
        help="a folder of runs to merge, also several, of other labs too (default: the runs folder)",
    )
    parser.add_argument(
        "--filter",
        action="append",
        default=[],
        dest="filters",
        metavar="FIELD=VALUE",
        help="only these runs: by method, backbone, task, preset, mode, protocol, label_fraction or seed; A,B for either, * for "
        "any text",
    )
    parser.add_argument(
        "--only-verified",
        action="store_true",
        help="leave out runs that were trained on test cases, and runs of which nobody knows",
    )
    parser.set_defaults(command=command)


def load(arguments: argparse.Namespace) -> "tuple[list[Run], list[str]]":
    """The runs of all given folders that the filters admit, and what is wrong with records. Raises UserError without a run."""
    from leaderboards.results import load as load_results
    from leaderboards.results import select

    results = load_results(*(arguments.folders or [arguments.runs]))
    runs = list(results.runs)
    for text in arguments.filters:
        field, _, values = text.partition("=")
        if not values:
            raise UserError(f"--filter {text} is not FIELD=VALUE: give for instance --filter method=hybridmim")
        runs = select(runs, field, values.split(","))
    return (_verified(runs) if arguments.only_verified else runs), list(results.problems)


def _verified(runs: "list[Run]") -> "list[Run]":
    """The runs of which it is known that no test case was trained on; the number of the others is printed."""
    verified = [run for run in runs if run.num_test_seen == 0]
    unknown = sum(run.num_test_seen is None for run in runs)
    known = len(runs) - len(verified) - unknown
    if known or unknown:
        say(
            f"--only-verified leaves out {known} runs that were trained on test cases, and {unknown} of which nobody knows"
        )
    return verified


def named_run(name: str, runs: "Sequence[Run]") -> "Run | None":
    """The run with this id, this folder, or an id that begins with `name`; None where no run or several runs match."""
    exact = [run for run in runs if run.run_id == name or run.folder == Path(name).resolve()]
    matches = exact or [run for run in runs if run.run_id.startswith(name)]
    return matches[0] if len(matches) == 1 else None


def as_text(result: object) -> str:
    """The text of a result, without characters that would move a terminal's cursor."""
    from leaderboards.text import printable

    return "\n".join(map(printable, str(result).splitlines()))


def finish(problems: Sequence[str]) -> int:
    """Print what is wrong with records that were left out. Returns the exit status."""
    from leaderboards.text import printable

    for problem in problems:
        print(f"harness: error: left out: {printable(problem)}", file=sys.stderr)
    return 2 if problems else 0


def reported_rows(runs: "Sequence[Run]") -> "pd.DataFrame":
    """The rows that papers report for the tasks of the runs; empty, with a message, where there are none."""
    from leaderboards import reported

    tasks = sorted({str(run.record["task"]) for run in runs})
    rows = reported.rows(tasks)
    if rows.empty:
        print(
            f"harness: nothing is reported for {', '.join(tasks)}; there is for {', '.join(reported.known_tasks())}",
            file=sys.stderr,
        )
    return rows
