"""What `harness profile` and `harness estimate` do."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

from harness.actions import request_of
from harness.errors import UserError
from harness.planning import Request, writable
from harness.suites import ROUNDS, suite_path


def profile(arguments: argparse.Namespace) -> int:
    """Time steps side by side; a table, a CSV and a figure."""
    if arguments.suite:
        arguments.sweep = suite_path(arguments.suite)
    requests = list(_requests(arguments))
    from harness import profiling, subject
    from leaderboards import profiles

    variants = arguments.compare or [""]
    # A sweep lists fine-tuned controls too; they have no step of pre-training to time.
    cells, left_out = [], []
    for request in requests:
        try:
            cells += [subject.resolve_cell(request, arguments.stage, variant) for variant in variants]
        except UserError as error:
            if arguments.sweep is None:
                raise
            left_out.append(str(error))
    if not cells:
        raise UserError(f"{arguments.sweep} has nothing to profile: {left_out[0]}")
    for problem in left_out:
        print(f"left out: {problem}", file=sys.stderr)
    out = arguments.out or writable(arguments.runs) / "profiles" / f"{_name(arguments)}.csv"
    _check_out(out)
    rounds = arguments.rounds or (ROUNDS if arguments.suite else 5)
    found, rates = profiling.measure(cells, rounds, short=bool(arguments.suite))
    rows = profiling.summarise(found, rates)
    profiles.write(rows, out)
    profiles.draw(rows, out)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"\n{profiles.render(rows)}\n\n{out}\n{out.with_suffix('.png')}")
    return 0 if any(not row["problem"] for row in rows) else 2


def estimate(arguments: argparse.Namespace) -> int:
    """What runs will take, as a table, before they start."""
    if arguments.sweep is None:
        if not arguments.method or not arguments.task:
            raise UserError("estimate needs --method and --task, or --sweep FILE: give them")
        requests = [request_of(arguments)]
    else:
        if arguments.method or arguments.task:
            raise UserError("a sweep file names methods and tasks: leave out --method and --task")
        from harness import sweep

        base = replace(request_of(arguments), method="", task="")
        requests = [cell.request for cell in sweep.read(arguments.sweep, base)]
    return print_estimates(requests, arguments.jobs, arguments.json, alone=arguments.sweep is None)


def print_estimates(requests: Sequence[Request], jobs: int, as_json: bool = False, alone: bool = False) -> int:
    """A table of what each of them takes. `alone`: what cannot run is an error, and not one of several lines."""
    from harness import estimating
    from harness.progress import progress, say

    estimator, found, problems = estimating.Estimator(), [], []
    for request in progress(requests, "estimate", shown=len(requests) > 1):
        try:
            found.append(estimator.estimate(request))
        except UserError as error:
            if alone:
                raise
            problems.append(str(error))
    for problem in problems:
        say(f"cannot run: {problem}")
    if as_json:
        print(json.dumps([asdict(each) for each in found], indent=1))
    elif found:
        print(f"\n{estimating.render(found, jobs)}\n\non {estimating.machine()}, by a few steps of each stage")
    return 2 if problems or any(each.problem for each in found) else 0


def _requests(arguments: argparse.Namespace) -> Iterator[Request]:
    """The product of what the command line lists, on top of each cell of a sweep or of the named method."""
    base = Request(
        method="",
        task=arguments.task or "",
        preset=arguments.preset,
        runs=arguments.runs,
        settings=tuple(arguments.settings),
        plugins=tuple(arguments.plugins),
    )
    if arguments.sweep is not None:
        if arguments.methods or arguments.task or arguments.backbones:
            raise UserError(
                "a sweep file names methods, backbones and tasks: leave out --method, --backbone and --task"
            )
        from harness import sweep

        chosen = [cell.request for cell in sweep.read(arguments.sweep, base)]
    else:
        if not arguments.methods or not arguments.task:
            raise UserError("profile needs --method and --task, or --sweep FILE: give them")
        pairs = product(arguments.methods, arguments.backbones or ["unet"])
        chosen = [replace(base, method=method, backbone=backbone) for method, backbone in pairs]
    axes: list[list[str | None]] = [
        [f"{arguments.stage}.{key}={value}" for value in values] or [None]
        for key, values in (
            ("crop", arguments.crops),
            ("batch_size", arguments.batches),
            ("precision", arguments.precisions),
        )
    ]
    for request in chosen:
        for settings in product(*axes):
            yield replace(request, settings=(*request.settings, *(each for each in settings if each)))


def _name(arguments: argparse.Namespace) -> str:
    if arguments.sweep is not None:
        return str(arguments.sweep.stem)
    return "-".join([*arguments.methods, *(arguments.backbones or ["unet"]), Path(arguments.task).name])


def _check_out(out: Path) -> None:
    if out.suffix != ".csv":
        raise UserError(f"--out {out}: a profile is a table: give a name that ends in .csv")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file")
    writable(out.parent)
