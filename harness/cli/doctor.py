"""`harness doctor`: check environment, device, disk, plugins and the runs folder for problems."""

import argparse
import json
import sys
from typing import Any

from harness.cli.options import add_options


def add_parser(commands: Any) -> None:
    """The options of `harness doctor`."""
    parser = commands.add_parser("doctor", help="what is wrong here, or will be", allow_abbrev=False)
    parser.add_argument("--fix", action="store_true", help="remove what a crash left, and what is damaged")
    add_options(parser, "runs", "plugins")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=examine)


def examine(arguments: argparse.Namespace) -> int:
    """Print each finding as soon as it is there. Returns exit status 2 where a check fails and is not mended."""
    from harness.runs import cleanup, doctor

    findings, failed = [], 0
    for finding in doctor.examine(arguments.runs, tuple(arguments.plugins)):
        mended = bool(arguments.fix and finding.fix)
        if mended:
            cleanup.remove(finding.fix)
        failed += finding.status == "FAIL" and not mended
        done = f"; removed {len(finding.fix)}" if mended else ""
        hint = "; --fix removes them" if finding.fix and not arguments.fix else ""
        findings.append({"status": finding.status, "what": finding.what, "detail": finding.detail, "mended": mended})
        if not arguments.json:
            print(f"{finding.status:<5} {finding.what}: {finding.detail}{done}{hint}", flush=True)
    if arguments.json:
        print(json.dumps(findings, indent=1))
    if failed:
        print(f"harness: error: {failed} findings above are to be mended", file=sys.stderr)
    return 2 if failed else 0
