"""The options of `harness leaderboard` and its verbs."""

import argparse
from pathlib import Path
from typing import Any

from harness.cli.leaderboard.files import check, import_results, panels, publish
from harness.cli.leaderboard.records import add_records
from harness.cli.leaderboard.tables import build, cite, compare_two, efficiency, ranks
from harness.cli.options import Parser, add_options


def add_parser(commands: Any) -> None:
    """The options of `harness leaderboard` and its verbs."""
    group = commands.add_parser("leaderboard", help="tables from records", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    table = verbs.add_parser("build", help="one CSV and a table from all finished runs", allow_abbrev=False)
    table.add_argument(
        "--out",
        type=Path,
        action="append",
        metavar="FILE",
        help=".csv, .md or .tex, also several (default: leaderboard.csv in the runs folder; with --from: here)",
    )
    table.add_argument("--json", action="store_true")
    table.add_argument("--wide", action="store_true", help="every column, however wide the terminal is")
    _add_reported_option(table)
    pair = verbs.add_parser("compare", help="two methods, or two runs, case by case", allow_abbrev=False)
    pair.add_argument("first", metavar="A", help="a method as the tables name it, or a run id")
    pair.add_argument("second", metavar="B")
    pair.add_argument("--out", type=Path, metavar="CSV", help="every case and target")
    ranking = verbs.add_parser("ranks", help="how often each method holds each rank", allow_abbrev=False)
    curve = verbs.add_parser("efficiency", help="Dice over labels or steps, and its area", allow_abbrev=False)
    curve.add_argument(
        "--over",
        default="label_fraction",
        metavar="label_fraction|pretrain.steps|finetune.steps",
        help="what the curves are drawn over (default: label_fraction)",
    )
    validation = verbs.add_parser("validate", help="check records and CSVs from anywhere", allow_abbrev=False)
    validation.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="CSVs, records, run folders, folders of runs, sites"
    )
    add_options(validation, "runs")
    validation.set_defaults(command=check)
    citing = verbs.add_parser("cite", help="BibTeX for everything that the runs used", allow_abbrev=False)
    add_options(citing, "plugins")
    for parser, command in (
        *((table, build), (pair, compare_two), (ranking, ranks), (curve, efficiency)),
        (citing, cite),
    ):
        add_records(parser, command)
    _add_publish(verbs)
    _add_panels(verbs)
    _add_import(verbs)


def _add_publish(verbs: Any) -> None:
    """The options of `publish`."""
    site = verbs.add_parser("publish", help="a static site that opens from disk", allow_abbrev=False)
    site.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, or one published before")
    site.add_argument("--title", default="Leaderboard", metavar="TEXT")
    site.add_argument("--note", type=Path, metavar="FILE", help="a text that stands above the tables")
    site.add_argument(
        "--without-scans",
        action="store_false",
        dest="pictures",
        help="leave out pictures of scans, where the licence of the data forbids to pass them on",
    )
    _add_reported_option(site)
    add_records(site, publish)


def _add_panels(verbs: Any) -> None:
    """The options of `panels`."""
    figure = verbs.add_parser("panels", help="cases side by side, as several runs segment them", allow_abbrev=False)
    figure.add_argument("names", nargs="+", metavar="RUN", help="run ids; runs that kept their predictions")
    figure.add_argument("--case", action="append", default=[], metavar="CASE", dest="cases", help="default: three")
    figure.add_argument("--out", type=Path, required=True, metavar="PNG|SVG")
    add_options(figure, "data", "plugins")
    add_records(figure, panels)


def _add_import(verbs: Any) -> None:
    """The options of `import`."""
    text = "results of other software, scored here or taken from nnU-Net's summary.json"
    importing = verbs.add_parser("import", help=text, allow_abbrev=False)
    importing.add_argument(
        "source", type=Path, metavar="DIR", help="a folder of label maps named as the test cases, or a summary.json"
    )
    importing.add_argument("--method", required=True, metavar="NAME", help="the software, as tables should name it")
    importing.add_argument("--backbone", default="-", metavar="NAME", help="its network")
    importing.add_argument("--note", default="", metavar="TEXT", help="what a reader of the table must know")
    add_options(importing, "task", "data", "split", "runs", "plugins")
    add_options(importing, "seed", text="under which the table lists these results (default: 0)")
    add_options(importing, "settings", text="evaluate.hd95, .empty or .tolerance, as in the runs beside it")
    importing.set_defaults(command=import_results)


def _add_reported_option(parser: argparse.ArgumentParser) -> None:
    """The option that adds the results which papers report."""
    parser.add_argument(
        "--with-reported",
        action="store_true",
        help="show what papers report for these tasks beside the measured rows, never ranked with them",
    )
