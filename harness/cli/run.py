"""`harness run`: pre-train, fine-tune, evaluate, record."""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.options import EXECUTION, add_options, add_request_options, request_of
from harness.cli.output import as_lines, terminal_width
from harness.system.console import is_first_process

if TYPE_CHECKING:
    from harness.config.request import Request
    from harness.runs.finished import FinishedRun
    from leaderboards.board import Table


def add_parser(commands: Any) -> None:
    """The options of `harness run`."""
    parser = commands.add_parser("run", help="pre-train, fine-tune, evaluate, record", allow_abbrev=False)
    add_request_options(parser, required=True)
    add_options(parser, "save_predictions", *EXECUTION, "until")
    parser.add_argument("--dry-run", action="store_true", help="resolve and check everything, compute nothing")
    parser.add_argument("--json", action="store_true", help="print the record as one JSON document")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> None:
    """Carry out one run, then print its table and its files."""
    request = request_of(arguments)
    if arguments.dry_run:
        _dry_run(request, arguments.json)
        return
    if request.execution.until:
        from harness.runs.execute import pretrain_only

        print(f"pre-trained:\n  {pretrain_only(request)}")
        return
    finished = carry_out(request)
    if not is_first_process():
        return
    if arguments.json:
        print(json.dumps(finished.record, indent=1))
        return
    _print_tables(request, finished)


def carry_out(request: "Request") -> "FinishedRun":
    """Carry out the run. A finished run that answered the same request is returned at once, without importing torch."""
    from harness.runs.finished import finished_before

    finished = finished_before(request)
    if finished is not None:
        return finished
    from harness.runs.execute import run as execute

    return execute(request)


def _print_tables(request: "Request", finished: "FinishedRun") -> None:
    """Write the leaderboard of all runs; print the table of this run, and its files."""
    from leaderboards.text import counted

    tables, csv = write_leaderboard(request.runs)
    print(f"\n{table_of(tables, finished.folder)}\n")
    print("this run was finished before, nothing was computed" if finished.again else "files of this run:")
    predictions = finished.folder / "predictions"
    for path in sorted(
        path for path in finished.folder.rglob("*") if path.is_file() and predictions not in path.parents
    ):
        print(f"  {path}")
    if predictions.is_dir():
        print(f"  {predictions}: {counted(len(list(predictions.iterdir())), 'label map')}")
    print(f"leaderboard of all runs:\n  {csv}")


def write_leaderboard(folder: Path) -> "tuple[list[Table], Path]":
    """Write the leaderboard of all runs in a folder. Returns its tables and its file."""
    from leaderboards import board, records, table

    runs, problems = records.load_runs([folder])
    for problem in problems:
        print(f"harness: left out of the table: {problem}", file=sys.stderr)
    tables, csv = board.gather(runs), folder / "leaderboard.csv"
    table.write(table.build(tables), csv)
    return tables, csv


def table_of(tables: "list[Table]", run_folder: Path) -> str:
    """The tables that a run belongs to, as text."""
    from leaderboards import board, table

    own = {
        board.without_mode(each.key)
        for each in tables
        if any(member.folder.name == run_folder.name for group in each.groups for member in group.members)
    }
    return table.render([each for each in tables if board.without_mode(each.key) in own], width=terminal_width())


def _dry_run(request: "Request", as_json: bool) -> None:
    """Print the resolved configuration and what the run would use; compute nothing."""
    from harness.config.grid import parse_grid
    from harness.runs.plan import plan_without_data

    config, plan = plan_without_data(request)
    made_up = "a PHANTOM, made up when it runs (real data: --data or HARNESS_DATA)"
    answer: dict[str, Any] = {"config": config.model_dump(mode="json"), "data": made_up}
    if trials := parse_grid(request.tune):
        answer["trials"] = trials
    if plan is not None:
        answer["config"] = plan.config.model_dump(mode="json")
        answer["data"] = f"{len(plan.train)} training cases ({len(plan.label_cases)} with labels used), "
        answer["data"] += f"{len(plan.validation)} for validation, " if plan.validation else ""
        answer["data"] += f"{len(plan.test)} test cases, fingerprint {plan.data.fingerprint}"
        answer["pretrain_on"] = f"{plan.num_pretrain} scans" if plan.plugins.method.trains else "nothing"
        answer["run_id"] = plan.run_id
        answer["finished"] = (request.runs / plan.run_id / "record.json").exists()
    print(json.dumps(answer, indent=1) if as_json else as_lines(answer))
