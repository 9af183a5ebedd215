"""`harness runs`: list the runs of a folder, and remove files that are no longer needed."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness.cli.options import Parser, add_options
from harness.system.errors import UserError


def add_parser(commands: Any) -> None:
    """The options of `harness runs` and its verbs."""
    group = commands.add_parser("runs", help="what is in a runs folder, and what can go", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    listing = verbs.add_parser("list", help="all runs, and where each of them is", allow_abbrev=False)
    listing.add_argument("--json", action="store_true")
    listing.set_defaults(command=list_runs)
    collect = verbs.add_parser("gc", help="remove what finished stages no longer need", allow_abbrev=False)
    collect.add_argument("--yes", action="store_true", help="without asking")
    collect.set_defaults(command=garbage_collect)
    for parser in (listing, collect):
        add_options(parser, "runs")


def garbage_collect(arguments: argparse.Namespace) -> None:
    """Show what finished stages no longer need, and remove it with --yes or after a confirmation."""
    from harness.runs import cleanup

    _existing(arguments.runs)
    leftovers = cleanup.removable(arguments.runs)
    for leftover in leftovers:
        print(f"{leftover.size / 2**20:8.1f} MiB  {leftover.path}: {leftover.why}")
    mebibytes = sum(leftover.size for leftover in leftovers) / 2**20
    if not leftovers:
        print("nothing to remove: no finished stage has checkpoints left")
        return
    print(f"{mebibytes:8.1f} MiB in all", flush=True)
    confirmed = arguments.yes
    if not confirmed and sys.stdin.isatty():
        confirmed = input("remove them? [y/N] ").strip().lower() in ("y", "yes")
    if not confirmed:
        print("nothing was removed; --yes removes it")
        return
    cleanup.remove(tuple(leftover.path for leftover in leftovers))
    print(f"removed {mebibytes:.1f} MiB")


def list_runs(arguments: argparse.Namespace) -> None:
    """Print all runs of a folder with their progress, and the process that works on each."""
    from harness.runs.status import stage_and_step
    from harness.system.locks import holders
    from leaderboards.text import align

    runs = _existing(arguments.runs)
    owners = {lock.parent: owner for lock, owner in holders(runs)}
    rows = []
    for folder in sorted(
        {path.parent for path in runs.glob("*/config.json")} | {path.parent for path in runs.glob("*/record.json")}
    ):
        if (folder / "record.json").exists():
            state = "finished"
        else:
            stage, count = stage_and_step(folder)
            state = f"{stage}, {count} {'cases' if stage == 'evaluate' else 'steps'}" if stage else "begun"
        owner = owners.get(folder)
        rows.append({"run": folder.name, "state": state, "at_work": str(owner) if owner else ""})
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(
            *align(
                [
                    ["run", "where it is", "at work"],
                    *([row["run"], row["state"], row["at_work"] or "-"] for row in rows),
                ]
            ),
            sep="\n",
        )
    else:
        print(f"no runs in {runs}")


def _existing(runs: Path) -> Path:
    """The runs folder. Raises UserError where it does not exist."""
    if not runs.is_dir():
        raise UserError(f"the runs folder {runs} does not exist: give another with --runs or HARNESS_RUNS")
    return runs
