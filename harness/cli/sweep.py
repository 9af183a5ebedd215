"""`harness sweep`: many runs from one file."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.estimate import print_estimates
from harness.cli.options import EXECUTION, add_options, argument, execution_of
from harness.cli.output import terminal_width
from harness.config.request import Request, positive
from harness.system.console import say
from harness.system.errors import UserError
from harness.system.signals import Interrupted

if TYPE_CHECKING:
    from harness.sweeps.cells import Outcome, PlannedCell, SweepCell
    from harness.sweeps.job import Launcher
    from leaderboards.records import Run


def add_parser(commands: Any) -> None:
    """The options of `harness sweep`."""
    parser = commands.add_parser("sweep", help="many runs from one file", allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE.toml", help="see sweeps/ for examples")
    add_launcher_options(parser)
    parser.add_argument("--preset", default="", metavar="P", help="instead of the presets that the file names")
    add_options(parser, *EXECUTION, "data", "runs", "plugins")
    parser.set_defaults(command=sweep)


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """The options that say where and how many cells run."""
    parser.add_argument("--jobs", type=argument(positive), default=1, metavar="N", help="runs at a time (default: 1)")
    parser.add_argument(
        "--launcher",
        default="local",
        choices=["local", "slurm"],
        help="where they run (default: local, on this machine)",
    )
    parser.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of submitit: partition, timeout_min, mem_gb, cpus_per_task, gpus_per_node, ...; also several",
    )
    parser.add_argument(
        "--processes", type=argument(positive), default=1, metavar="N", help="that share each run (default: 1)"
    )
    parser.add_argument("--retry", action="store_true", help="run again what failed in an earlier run of this file")
    parser.add_argument("--dry-run", action="store_true", help="list the cells; run none")
    parser.add_argument(
        "--estimate",
        action="store_true",
        help="with --dry-run, measure what each cell takes, by a few steps of each stage",
    )


def sweep(arguments: argparse.Namespace) -> int:
    """Read a sweep file, run its cells and print their table. Returns exit status 2 where a cell has no record in the end."""
    from harness.sweeps import cells
    from leaderboards import board, table

    sweep_cells = cells.read(arguments.file, base_request(arguments), arguments.preset)
    csv = arguments.runs / "sweeps" / f"{arguments.file.stem}.csv"

    def report(runs: "Sequence[Run]") -> None:
        """Write and print the table of the sweep."""
        tables = board.gather(runs)
        table.write(table.build(tables), csv)
        print(f"\n{table.render(tables, width=terminal_width())}\n\nleaderboard of this sweep:\n  {csv}")

    return run_cells(sweep_cells, arguments, csv.with_suffix(""), report)


def base_request(arguments: argparse.Namespace) -> Request:
    """What a file of cells leaves to the command line. Raises UserError for a tracker that cannot be used."""
    plugins, execution = tuple(arguments.plugins), execution_of(arguments)
    return Request(data=arguments.data, runs=arguments.runs, plugins=plugins, execution=execution)


def run_cells(
    sweep_cells: "Sequence[SweepCell]",
    arguments: argparse.Namespace,
    notes: Path,
    report: "Callable[[Sequence[Run]], None]",
) -> int:
    """Run the cells that have no record, as the launcher options say. Returns exit status 2 where one has none in the end.

    Args:
        notes: folder for the logs of the jobs and the notes about cells that failed.
        report: is called with the finished runs, unless it is a dry run.
    """
    from harness.sweeps import cells
    from harness.sweeps.live_table import watch

    if arguments.estimate and not arguments.dry_run:
        raise UserError("--estimate is for --dry-run: add it, or leave --estimate out")
    # Build the launcher first: an error in its options should come before phantoms are written and data is read.
    launcher = None if arguments.dry_run else _launcher(arguments, notes)
    todo, outcomes = cells.select_cells(sweep_cells, notes, arguments.retry)
    _print_sorted(len(sweep_cells), todo, outcomes)
    if launcher is None:
        print(*(f"  to run: {planned.cell}" for planned in todo), sep="\n", flush=True)
        status = (
            print_estimates([planned.cell.request for planned in todo], arguments.jobs) if arguments.estimate else 0
        )
        return 2 if any(outcome.folder is None for outcome in outcomes) else status
    try:
        outcomes += watch(todo, launcher) if todo else []
    except (Interrupted, KeyboardInterrupt) as error:
        raise Interrupted(f"{error or 'Ctrl-C'}: {launcher.stop()}") from None
    runs, problems = _load(dict.fromkeys(outcome.folder for outcome in outcomes if outcome.folder is not None))
    report(runs)
    for problem in problems:
        print(f"harness: error: {problem}", file=sys.stderr)
    failed = [outcome for outcome in outcomes if outcome.folder is None]
    for outcome in failed:
        print(f"harness: error: no record of {outcome.cell}: {outcome.problem}", file=sys.stderr)
    if failed:
        say("--retry runs what failed once more")
    return 2 if failed or problems else 0


def _load(folders: Iterable[Path]) -> "tuple[list[Run], list[str]]":
    """The runs of these folders; and one line for each whose files were removed or changed since it was finished."""
    from leaderboards import records

    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(records.load_run(folder))
        except records.RecordError as error:
            problems.append(f"{error}; restore it, or remove {folder} and give the command again")
    return runs, problems


def _launcher(arguments: argparse.Namespace, notes: Path) -> "Launcher":
    """The launcher that the options name. Raises UserError where it cannot be used."""
    from harness.sweeps.local import Local
    from harness.sweeps.slurm import Slurm

    if arguments.launcher == "local":
        if arguments.slurm:
            raise UserError(f"--slurm {arguments.slurm[0]} is for --launcher slurm: add it, or leave --slurm out")
        return Local(notes, arguments.processes, arguments.jobs)
    pairs = [pair.partition("=") for pair in arguments.slurm]
    for key, sign, value in pairs:
        if not (key and sign and value):
            raise UserError(f"--slurm {key}{sign}{value} is not of the form KEY=VALUE, for instance partition=gpu")
    return Slurm(notes, arguments.processes, arguments.jobs, {key.strip(): value for key, _, value in pairs})


def _print_sorted(number: int, todo: "Sequence[PlannedCell]", outcomes: "Sequence[Outcome]") -> None:
    """Print how many cells are finished, to run, failed before or cannot run, and the reasons."""
    finished = sum(outcome.folder is not None for outcome in outcomes)
    failed = [outcome for outcome in outcomes if outcome.before]
    refused = [outcome for outcome in outcomes if outcome.folder is None and not outcome.before]
    before = f", {len(failed)} that failed before (--retry runs them again)" if failed else ""
    print(
        f"{number} cells: {finished} finished before, {len(todo)} to run{before}, {len(refused)} that cannot run",
        flush=True,
    )
    for kind, group in (("failed before", failed), ("cannot run", refused)):
        for outcome in group:
            print(f"  {kind}: {outcome.cell}: {outcome.problem}", flush=True)
