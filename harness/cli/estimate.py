"""`harness estimate`: hours, memory and disk of a run or sweep."""

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from harness.cli.options import add_request_options, argument, request_of
from harness.config.request import Request, positive
from harness.system.console import progress, say
from harness.system.errors import UserError


def add_parser(commands: Any) -> None:
    """The options of `harness estimate`."""
    parser = commands.add_parser(
        "estimate", help="hours, memory and disk of a run or sweep, from a few measured steps", allow_abbrev=False
    )
    parser.add_argument("--sweep", type=Path, metavar="FILE.toml", help="all cells of a sweep file, see sweeps/")
    parser.add_argument("--jobs", type=argument(positive), default=1, metavar="N", help="of the sweep (default: 1)")
    add_request_options(parser, required=False)
    parser.set_defaults(preset="")
    parser.add_argument("--json", action="store_true", help="print the estimates as one JSON document")
    parser.set_defaults(command=estimate)


def estimate(arguments: argparse.Namespace) -> int:
    """Print what runs will take before they start. Returns the exit status."""
    preset = arguments.preset  # of a sweep: replaces those of the file
    arguments.preset = preset or Request.preset
    if arguments.sweep is None:
        if not arguments.method or not arguments.task:
            raise UserError("estimate needs --method and --task, or --sweep FILE: give them")
        requests = [request_of(arguments)]
    else:
        if arguments.method or arguments.task:
            raise UserError("a sweep file names methods and tasks: leave out --method and --task")
        from harness.sweeps.cells import read

        base = replace(request_of(arguments), method="", task="")
        requests = [cell.request for cell in read(arguments.sweep, base, preset)]
    return print_estimates(requests, arguments.jobs, arguments.json, alone=arguments.sweep is None)


def print_estimates(requests: Sequence[Request], jobs: int, as_json: bool = False, alone: bool = False) -> int:
    """Print a table of what each run takes. Returns the exit status: 2 where a run has no estimate.

    Args:
        jobs: runs at a time.
        alone: raise the UserError of a run that cannot start, instead of printing it among the others.
    """
    from harness.costs.estimate import Estimator, machine, render

    estimator, estimates, problems = Estimator(), [], []
    for request in progress(requests, "estimate", visible=len(requests) > 1):
        try:
            estimates.append(estimator.estimate(request))
        except UserError as error:
            if alone:
                raise
            problems.append(str(error))
    for problem in problems:
        say(f"cannot run: {problem}")
    if as_json:
        print(json.dumps([asdict(estimate) for estimate in estimates], indent=1))
    elif estimates:
        print(f"\n{render(estimates, jobs)}\n\non {machine()}, by a few steps of each stage")
    return 2 if problems or any(estimate.problem for estimate in estimates) else 0
