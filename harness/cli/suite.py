"""`harness suite`: compare methods over several tasks, and report a verdict."""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.leaderboard.records import add_records, finish, load
from harness.cli.options import EXECUTION, Parser, add_options
from harness.cli.output import terminal_width
from harness.cli.sweep import add_launcher_options, base_request, run_cells
from harness.config.request import Request
from harness.system.errors import UserError

if TYPE_CHECKING:
    from harness.sweeps.suites import Suite
    from leaderboards.records import Run
    from leaderboards.suites.report import Report


def add_parser(commands: Any) -> None:
    """The options of `harness suite` and its verbs."""
    group = commands.add_parser("suite", help="methods over several tasks, and a verdict", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    running = verbs.add_parser("run", help="run what is missing, scratch included, then report", allow_abbrev=False)
    running.add_argument("--method", action="append", required=True, dest="methods", metavar="M", help="also several")
    add_options(running, "settings", text="method.* and pretrain.* of these methods; everything else is the suite's")
    add_launcher_options(running)
    add_options(running, "data", text="the folder that contains the data of the tasks (default: $HARNESS_DATA)")
    add_options(running, *EXECUTION, "runs")
    running.set_defaults(command=run)
    status = verbs.add_parser("status", help="which runs of the suite are there", allow_abbrev=False)
    report = verbs.add_parser("report", help="consensus ranks and claims, from records alone", allow_abbrev=False)
    report.add_argument("--out", type=Path, metavar="DIR", help="write report.md, CSVs and a figure there")
    report.add_argument(
        "--prior",
        type=float,
        metavar="DICE",
        help="standard deviation of the true differences, for the probability that a claim is false (default: 0.015)",
    )
    add_records(status, show_status)
    add_records(report, show_report)
    for parser in (running, status, report):
        parser.add_argument("suite", metavar="SUITE", help="`harness list suites`, or a file like them")
        add_options(parser, "plugins")


def run(arguments: argparse.Namespace) -> int:
    """Run the cells of a suite that have no record, and print the report. Returns exit status 2 where a run is missing."""
    from harness.sweeps.suites import OF_THE_METHOD, read_suite

    for pair in arguments.settings:
        if not pair.startswith(OF_THE_METHOD):
            raise UserError(
                f"--set {pair}: the suite fixes it; allowed are method.* and pretrain.*, which are a method's own"
            )
    suite = read_suite(arguments.suite, base_request(arguments))
    if arguments.data is None and suite.on_real_data:
        raise UserError(f"suite {suite.name} needs real data: give its folder with --data or HARNESS_DATA")
    cells = suite.cells(arguments.methods, arguments.settings)
    notes = arguments.runs / "sweeps" / suite.name

    def report(runs: "Sequence[Run]") -> None:
        """Print the verdict, if anything was run."""
        if runs:
            print(_report(suite.name, runs).text(terminal_width()))

    return run_cells(cells, arguments, notes, report)


def show_status(arguments: argparse.Namespace) -> int:
    """Print how many of the suite's runs each method has, per task. Returns the exit status."""
    from leaderboards.text import align, printable

    suite = _suite(arguments)
    runs, problems = load(arguments)
    due = Counter(_column(request) for request in suite.requests)
    done: dict[str, dict[str, set[Request]]] = {}
    for run in runs:
        if (request := suite.request_of(run.record)) is not None:
            own = done.setdefault(f"{run.method} ({run.backbone})", defaultdict(set))
            own[_column(request)].add(request)  # runs of one seed by two versions are one
    lines = [
        ["method", *due],
        *([name, *(f"{len(own[key])}/{due[key]}" for key in due)] for name, own in sorted(done.items())),
    ]
    print(*map(printable, align(lines)), sep="\n")
    if not done:
        print(f"no run of {suite.name} yet: `harness suite run {suite.name} --method M` makes them")
    return finish(problems)


def show_report(arguments: argparse.Namespace) -> int:
    """Print the verdict from the records of a suite, others' included. Returns the exit status."""
    from leaderboards.text import counted

    suite = _suite(arguments)
    if arguments.prior is not None and not 0 < arguments.prior < 1:
        raise UserError(f"--prior {arguments.prior:g} is no standard deviation of Dice: give a number between 0 and 1")
    runs, problems = load(arguments)
    members = [run for run in runs if suite.request_of(run.record) is not None]
    if not members:
        raise UserError(
            f"none of {counted(len(runs), 'run')} belongs to {suite.name}: `harness suite run {suite.name} --method M` makes some"
        )
    report = _report(suite.name, members, arguments.prior)
    print(report.text(terminal_width()))
    if arguments.out:
        print("\nfiles:", *(f"  {path}" for path in report.write(arguments.out)), sep="\n")
    return finish(problems)


def _suite(arguments: argparse.Namespace) -> "Suite":
    """The suite, for reading records."""
    from harness.sweeps.suites import read_suite

    return read_suite(arguments.suite, Request(runs=arguments.runs, plugins=tuple(arguments.plugins)))


def _report(name: str, runs: "Sequence[Run]", prior: float | None = None) -> "Report":
    """The report over the tables of these runs."""
    from leaderboards.suites.claims import PRIOR
    from leaderboards.suites.report import Report, tables_of_methods

    return Report(name, tables_of_methods(runs), PRIOR if prior is None else prior)


def _column(request: Request) -> str:
    """The heading of a request's column in the status: task, labels and whatever else may differ within a suite."""
    labels = f" {request.shots} cases" if request.shots else f" {100 * request.label_fraction:g} %"
    protocol = f" {request.protocol}" if request.protocol != "finetune" else ""
    return f"{request.task} {request.backbone}{labels}{protocol}"
