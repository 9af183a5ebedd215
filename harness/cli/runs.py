"""`harness runs`: what is in a runs folder, and what can go."""

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
    collect = verbs.add_parser("gc", help="remove checkpoints that finished runs no longer need", allow_abbrev=False)
    collect.add_argument("--yes", action="store_true", help="without asking")
    collect.set_defaults(command=garbage_collect)
    for parser in (listing, collect):
        add_options(parser, "runs")


def garbage_collect(arguments: argparse.Namespace) -> None:
    """Show what finished runs no longer need, and remove it once that is wanted."""
    from harness.runs import cleanup

    _existing(arguments.runs)
    found = cleanup.removable(arguments.runs)
    for each in found:
        print(f"{each.size / 2**20:8.1f} MiB  {each.path}: {each.why}")
    total = sum(each.size for each in found) / 2**20
    if not found:
        print("nothing to remove: no finished stage has checkpoints left")
        return
    print(f"{total:8.1f} MiB in all", flush=True)
    wanted = arguments.yes
    if not wanted and sys.stdin.isatty():
        wanted = input("remove them? [y/N] ").strip().lower() in ("y", "yes")
    if not wanted:
        print("nothing was removed; --yes removes it")
        return
    cleanup.remove(tuple(each.path for each in found))
    print(f"removed {total:.1f} MiB")


def list_runs(arguments: argparse.Namespace) -> None:
    """All runs of a folder, and where each of them is."""
    from harness.runs.status import where
    from harness.system.locks import holders
    from leaderboards.text import align

    runs = _existing(arguments.runs)
    at_work = {lock.parent: owner for lock, owner in holders(runs)}
    rows = []
    for folder in sorted(
        {path.parent for path in runs.glob("*/config.json")} | {p.parent for p in runs.glob("*/record.json")}
    ):
        if (folder / "record.json").exists():
            state = "finished"
        else:
            stage, number = where(folder)
            state = f"{stage}, {number} {'cases' if stage == 'evaluate' else 'steps'}" if stage else "begun"
        owner = at_work.get(folder)
        rows.append({"run": folder.name, "state": state, "at_work": str(owner) if owner else ""})
    if arguments.json:
        print(json.dumps(rows, indent=1))
    elif rows:
        print(
            *align([["run", "where it is", "at work"], *([r["run"], r["state"], r["at_work"] or "-"] for r in rows)]),
            sep="\n",
        )
    else:
        print(f"no runs in {runs}")


def _existing(runs: Path) -> Path:
    if not runs.is_dir():
        raise UserError(f"the runs folder {runs} does not exist: give another with --runs or HARNESS_RUNS")
    return runs
