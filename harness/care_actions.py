"""`harness doctor` and `harness runs`: what is wrong, what there is, and what can go."""

import argparse
import json
import sys
from pathlib import Path

from harness import doctor
from harness.errors import UserError
from harness.locks import holders
from harness.sweep_actions import where
from leaderboards.table import align


def examine(arguments: argparse.Namespace) -> int:
    """Findings as they come; status 2 where something fails and was not mended."""
    found, failed = [], 0
    for finding in doctor.examine(arguments.runs, tuple(arguments.plugins)):
        mended = bool(arguments.fix and finding.fix)
        if mended:
            doctor.remove(finding.fix)
        failed += finding.status == "FAIL" and not mended
        done = f"; removed {len(finding.fix)}" if mended else ""
        hint = "; --fix removes them" if finding.fix and not arguments.fix else ""
        found.append({"status": finding.status, "what": finding.what, "detail": finding.detail, "mended": mended})
        if not arguments.json:
            print(f"{finding.status:<5} {finding.what}: {finding.detail}{done}{hint}", flush=True)
    if arguments.json:
        print(json.dumps(found, indent=1))
    if failed:
        print(f"harness: error: {failed} findings above are to be mended", file=sys.stderr)
    return 2 if failed else 0


def collect(arguments: argparse.Namespace) -> None:
    """Show what finished runs no longer need, and remove it once that is wanted."""
    _existing(arguments.runs)
    found = doctor.removable(arguments.runs)
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
    doctor.remove(tuple(each.path for each in found))
    print(f"removed {total:.1f} MiB")


def listed(arguments: argparse.Namespace) -> None:
    """All runs of a folder, and where each of them is."""
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
