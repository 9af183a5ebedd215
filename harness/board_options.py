"""The `harness leaderboard` commands: tables from records, and what is checked and published of them."""

import argparse
from pathlib import Path
from typing import Any

from harness.options import add_data_option, add_plugin_option, add_runs_option, later


def add_leaderboard(commands: Any, parser_class: type[argparse.ArgumentParser]) -> None:
    group = commands.add_parser("leaderboard", help="tables from records", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=parser_class)
    build = verbs.add_parser("build", help="one CSV and a table from all finished runs", allow_abbrev=False)
    build.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help=".csv, .md or .tex, also several (default: leaderboard.csv in the runs folder)",
    )
    build.add_argument("--json", action="store_true")
    _add_reported_option(build)
    compare = verbs.add_parser("compare", help="two methods, or two runs, case by case", allow_abbrev=False)
    compare.add_argument("first", metavar="A", help="a method as the tables name it, or a run id")
    compare.add_argument("second", metavar="B")
    compare.add_argument("--out", type=Path, metavar="CSV", help="every case and target")
    ranks = verbs.add_parser("ranks", help="how often each method holds each rank", allow_abbrev=False)
    efficiency = verbs.add_parser("efficiency", help="Dice over label fractions, and its area", allow_abbrev=False)
    check = verbs.add_parser("validate", help="check records and CSVs from anywhere", allow_abbrev=False)
    check.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="CSVs, records, run folders, folders of runs, sites"
    )
    add_runs_option(check)
    check.set_defaults(command=later("board_actions", "check"))
    for parser, command in ((build, "build"), (compare, "compare_two"), (ranks, "ranks"), (efficiency, "efficiency")):
        _add_records(parser, command)
    _add_publish(verbs)
    _add_panels(verbs)


def _add_publish(verbs: Any) -> None:
    publish = verbs.add_parser("publish", help="a static site that opens from disk", allow_abbrev=False)
    publish.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one published before")
    publish.add_argument("--title", default="Leaderboard", metavar="TEXT")
    publish.add_argument("--note", type=Path, metavar="FILE", help="a text that stands above the tables")
    publish.add_argument(
        "--without-scans",
        action="store_false",
        dest="pictures",
        help="leave out pictures of scans, where the licence of the data forbids to pass them on",
    )
    _add_reported_option(publish)
    _add_records(publish, "publish")


def _add_panels(verbs: Any) -> None:
    panels = verbs.add_parser("panels", help="cases side by side, as several runs segment them", allow_abbrev=False)
    panels.add_argument("names", nargs="+", metavar="RUN", help="run ids; runs that kept their predictions")
    panels.add_argument("--case", action="append", default=[], metavar="CASE", dest="cases", help="default: three")
    panels.add_argument("--out", type=Path, required=True, metavar="PNG|SVG")
    add_data_option(panels)
    add_plugin_option(panels)
    _add_records(panels, "panels")


def _add_records(parser: argparse.ArgumentParser, command: str) -> None:
    """Where the records come from, and what is done with them."""
    add_runs_option(parser)
    parser.add_argument(
        "--from",
        action="append",
        type=Path,
        metavar="DIR",
        dest="folders",
        help="a folder of runs to merge, also several, of other labs too (default: the runs folder)",
    )
    parser.set_defaults(command=later("board_actions", command))


def _add_reported_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--with-reported",
        action="store_true",
        help="show what papers report for these tasks beside the measured rows, never ranked with them",
    )
