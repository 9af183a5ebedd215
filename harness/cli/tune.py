"""`harness tune`: the same grid of fine-tuning settings for every method; chosen on validation cases, then tested."""

import argparse
import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from harness.cli.options import EXECUTION, REQUEST, add_options, request_of
from harness.cli.run import carry_out, table_of, write_leaderboard
from harness.system.console import is_first_process

if TYPE_CHECKING:
    from harness.runs.finished import FinishedRun

GRID = "finetune.lr=3e-4,1e-3,3e-3 finetune.layer_decay=1,0.5"


def add_parser(commands: Any) -> None:
    """The options of `harness tune`."""
    parser = commands.add_parser(
        "tune", help="tune fine-tuning, the same trials for every method, then test", allow_abbrev=False
    )
    parser.add_argument(
        "--method", action="append", required=True, metavar="M", dest="methods", help="also several, scratch among them"
    )
    parser.add_argument(
        "--grid", default=GRID, metavar="GRID", help=f"settings to try, each combination of them (default: {GRID})"
    )
    add_options(parser, *(name for name in REQUEST if name not in ("method", "tune")), *EXECUTION)
    for action in parser._actions:
        action.required = action.required or action.dest == "task"
    parser.add_argument("--json", action="store_true", help="print the trials of each method as one JSON document")
    parser.set_defaults(command=tune)


def tune(arguments: argparse.Namespace) -> None:
    """Tune each method, then print its trials and the tables."""
    base = request_of(arguments)
    requests = [replace(base, method=method, tune=arguments.grid) for method in dict.fromkeys(arguments.methods)]
    _check_all(requests)
    finished = {request.method: carry_out(request) for request in requests}
    if not is_first_process():
        return
    if arguments.json:
        print(json.dumps({method: run.record["tuning"] for method, run in finished.items()}, indent=1))
        return
    for method, run in finished.items():
        print(f"\n{_trials(method, run)}")
    tables, csv = write_leaderboard(base.runs)
    shown = {table_of(tables, run.folder): None for run in finished.values()}
    print(*(f"\n{text}" for text in shown), sep="\n")
    print(f"\nleaderboard of all runs:\n  {csv}")


def _check_all(requests: list[Any]) -> None:
    """Plan each run, so that an error in one of them comes before anything is computed. Raises UserError for it."""
    from harness.config.grid import parse_grid
    from harness.system.errors import UserError

    if not parse_grid(requests[0].tune):
        raise UserError("--grid is empty: name settings and values, for instance finetune.lr=1e-3,3e-3")
    from harness.runs.locate import locate
    from harness.runs.plan import plan

    for request in requests:
        plan(request, *locate(request))


def _trials(method: str, run: "FinishedRun") -> str:
    """The trials of a method as a table; a star marks the chosen one."""
    from leaderboards.text import align

    tuning = run.record["tuning"]
    lines = [["", *(key.removeprefix("finetune.") for key in tuning["trials"][0]["settings"]), "validation Dice"]]
    for index, trial in enumerate(tuning["trials"]):
        lines.append(["*" * (index == tuning["chosen"]), *trial["settings"].values(), f"{trial['dice']:.4f}"])
    number, cases = len(tuning["trials"]), len(run.record["validation"]["cases"])
    title = f"{method}: {number} trials, * is chosen on {cases} validation cases; no test case was used"
    return "\n".join([title, *align(lines)])
