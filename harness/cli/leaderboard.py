"""`harness leaderboard`: tables, statistics and web pages of finished runs."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.options import Parser, add_options
from harness.cli.output import terminal_width
from harness.system.console import say
from harness.system.errors import UserError, unknown

if TYPE_CHECKING:
    import pandas as pd

    from leaderboards.records import Run

DEFINITIONS = ("evaluate.hd95", "evaluate.empty", "evaluate.tolerance")
"""The settings that imported results are scored with."""

Command = Callable[[argparse.Namespace], int]


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
        help=".csv, .md or .tex, also several (default: leaderboard.csv in the runs folder)",
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
        _add_records(parser, command)
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
    _add_records(site, publish)


def _add_panels(verbs: Any) -> None:
    """The options of `panels`."""
    figure = verbs.add_parser("panels", help="cases side by side, as several runs segment them", allow_abbrev=False)
    figure.add_argument("names", nargs="+", metavar="RUN", help="run ids; runs that kept their predictions")
    figure.add_argument("--case", action="append", default=[], metavar="CASE", dest="cases", help="default: three")
    figure.add_argument("--out", type=Path, required=True, metavar="PNG|SVG")
    add_options(figure, "data", "plugins")
    _add_records(figure, panels)


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
    add_options(importing, "task", "data", "split", "seed", "runs", "plugins")
    add_options(importing, "settings", text="evaluate.hd95, .empty or .tolerance, as in the runs beside it")
    importing.set_defaults(command=import_results)


def _add_records(parser: argparse.ArgumentParser, command: Command) -> None:
    """The options that say where records come from; `command` is called with them."""
    add_options(parser, "runs")
    parser.add_argument(
        "--from",
        action="append",
        type=Path,
        metavar="DIR",
        dest="folders",
        help="a folder of runs to merge, also several, of other labs too (default: the runs folder)",
    )
    parser.add_argument(
        "--only-verified",
        action="store_true",
        help="leave out runs that were trained on test cases, and runs of which nobody knows",
    )
    parser.set_defaults(command=command)


def _add_reported_option(parser: argparse.ArgumentParser) -> None:
    """The option that adds the results which papers report."""
    parser.add_argument(
        "--with-reported",
        action="store_true",
        help="show what papers report for these tasks beside the measured rows, never ranked with them",
    )


def build(arguments: argparse.Namespace) -> int:
    """Write all finished runs to files, and print the table. Returns the exit status."""
    import pandas as pd

    from leaderboards import board, table
    from leaderboards.text import counted

    runs, problems = load(arguments)
    tables = board.gather(runs)
    frame, reported_rows = table.build(tables), None
    if arguments.with_reported:
        reported_rows = _reported(runs)
        frame = pd.concat([frame, reported_rows], ignore_index=True) if len(reported_rows) else frame
    paths = arguments.out or [(Path() if arguments.folders else arguments.runs) / "leaderboard.csv"]
    for path in paths:
        try:
            table.write(frame, path)
        except table.EndingError as error:
            raise UserError(f"--out {path}: {error}: give a name that ends so") from None
    if arguments.json:
        print(frame.to_json(orient="records", indent=1))
    else:
        width = None if arguments.wide else terminal_width()
        print(
            f"{table.render(tables, reported_rows, width)}\n\n{counted(len(runs), 'run')}, {counted(len(frame), 'row')}:"
        )
        print(*(f"  {path}" for path in paths), sep="\n")
    return _finish(problems)


def compare_two(arguments: argparse.Namespace) -> int:
    """Compare two methods in every table that has both, or two runs, case by case. Returns the exit status."""
    import pandas as pd

    from leaderboards import board, compare
    from leaderboards.text import escape_cell

    runs, problems = load(arguments)
    if arguments.first == arguments.second:
        raise UserError(f"{arguments.first} is compared with itself: give two methods, or two runs")
    single = [_named_run(name, runs) for name in (arguments.first, arguments.second)]
    try:
        if single[0] is not None and single[1] is not None:
            comparisons = [compare.compare_runs(single[0], single[1])]
        else:
            methods = sorted({run.method for run in runs})
            for name in (arguments.first, arguments.second):
                if name not in methods:
                    raise unknown("method among these runs", name, methods)
            comparisons = compare.compare_methods(board.gather(runs), arguments.first, arguments.second)
    except board.NotComparableError as error:
        raise UserError(
            f"{error}: compare results that share all of it, `harness leaderboard build` shows which do"
        ) from None
    print(*map(_lines, comparisons), sep="\n\n")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        frames = [
            comparison.cases.assign(table=comparison.title, a=comparison.names[0], b=comparison.names[1])
            for comparison in comparisons
        ]
        cases = pd.concat(frames, ignore_index=True)
        for column in ("case", "target", "table", "a", "b"):
            cases[column] = cases[column].map(escape_cell)
        cases.to_csv(arguments.out, index=False, float_format="%.6g")
        print(f"\nevery case:\n  {arguments.out}")
    return _finish(problems)


def ranks(arguments: argparse.Namespace) -> int:
    """Print how often each method holds each rank among the resamples. Returns the exit status."""
    from leaderboards import board
    from leaderboards.text import align, printable

    runs, problems = load(arguments)
    for table in board.gather(runs):
        if len(table.groups) < 2:
            continue
        stability = table.stability
        if stability is None:
            print(f"{printable(table.title)}\nno ranks: rows of one seed, whose luck cannot be told from the method\n")
            continue
        # Controls have no rank, and rows of one seed have no share (NaN, which differs from itself).
        ranked = {
            index: rank
            for index, rank in enumerate(table.ranks())
            if rank is not None and stability.shares[index, 0] == stability.shares[index, 0]
        }
        order = sorted(ranked, key=lambda index: ranked[index])
        num_ranks = min(len(order), 12)
        lines = [["method", "backbone", *(f"#{rank + 1}" for rank in range(num_ranks))]]
        for index in order[:50]:
            group = table.groups[index]
            shares = [f"{share:.0%}" for share in stability.shares[index, :num_ranks]]
            lines.append([group.method, group.backbone, *shares])
        print(*map(printable, [table.title, *align(lines)]), sep="\n")
        print(f"Kendall's tau between resampled ranks and these: {stability.tau:.2f}\n")
    return _finish(problems)


def efficiency(arguments: argparse.Namespace) -> int:
    """Print Dice over label fractions or steps and the area under the curve. Returns the exit status."""
    from leaderboards import board, curves

    if arguments.over not in curves.AXES:
        raise unknown("value of --over", arguments.over, curves.AXES)
    runs, problems = load(arguments)
    curve_sets = curves.find(board.gather(runs), arguments.over)
    if not curve_sets:
        example = "--label-fraction 0.1" if arguments.over == "label_fraction" else f"--set {arguments.over}=1000"
        raise UserError(
            f"no method was run at two {curves.AXES[arguments.over].values} or more: run it with `{example}` as well"
        )
    print(*map(_lines, curve_sets), sep="\n\n")
    return _finish(problems)


def check(arguments: argparse.Namespace) -> int:
    """Validate records, CSVs and sites from anywhere; print what is wrong. Returns the exit status."""
    from leaderboards import records, validate
    from leaderboards.text import counted, printable

    problems: list[str] = []
    files = [file for path in arguments.files for file in _files_to_check(path)]
    folders = [folder for path in files if not _is_board(path) for folder in _run_folders(path)]
    parents = {folder.parent for folder in folders} | {arguments.runs}
    runs, _ = records.load_runs(parent for parent in parents if parent.is_dir())
    for path in files:
        if _is_board(path):
            file_problems, recomputed = validate.check_csv(path, runs)
            print(f"{path}: {'NOT VALID' if file_problems else 'valid'}{f', {recomputed}' if recomputed else ''}")
        else:
            path_folders = _run_folders(path)
            file_problems = [problem for folder in path_folders for problem in validate.check_run(folder)]
            file_problems += (
                [] if path_folders else [f"{path}: no record.json in it: an unfinished run, or no folder of runs"]
            )
            state = counted(len(file_problems), "problem") if file_problems else "valid"
            print(f"{path}: {counted(len(path_folders), 'run')}, {state}")
        problems += file_problems
    for problem in problems:
        print(f"harness: error: {printable(problem)}", file=sys.stderr)
    return 2 if problems else 0


def import_results(arguments: argparse.Namespace) -> None:
    """Write a run folder with the results of other software, and print their table."""
    from harness.api.settings import build
    from harness.config.request import Request
    from harness.config.resolve import parse_overrides
    from harness.config.schema import Evaluate
    from harness.data.datasets import open_task
    from harness.runs import imported
    from harness.runs.locate import locate
    from leaderboards import board, records, table

    if not arguments.source.exists():
        raise UserError(f"{arguments.source} does not exist: give a folder of label maps or a {records.SUMMARY}")
    for option in ("method", "backbone", "note"):
        text = getattr(arguments, option)
        if not text.isprintable() or len(text) > 1000 or (option != "note" and not text.strip()):
            raise UserError(
                f"--{option} {text[:40]!r} cannot stand in a table: give printable text, at most 1000 characters"
            )
    overrides = parse_overrides(arguments.settings)
    for key in overrides:
        if key not in DEFINITIONS:
            raise UserError(f"--set {key}: nothing is trained or predicted; allowed are {', '.join(DEFINITIONS)}")
    settings = build(Evaluate, {key.removeprefix("evaluate."): text for key, text in overrides.items()}, "evaluate")
    if not arguments.task:
        raise UserError("--task is missing: give the task whose test cases these are, `harness list tasks`")
    request = Request(
        method="scratch",
        task=arguments.task,
        data=arguments.data,
        split=arguments.split,
        runs=arguments.runs,
        plugins=tuple(arguments.plugins),
    )
    _, task, root, _ = locate(request)
    data = open_task(task, root, request.runs / "cache", request.split)
    origin = imported.Origin(arguments.method, arguments.backbone, arguments.seed, arguments.note)
    folder = imported.import_results(arguments.source, data, request.split, settings, origin, request.runs)
    run = records.load_run(folder)
    print(table.render(board.gather([run]), width=terminal_width()))
    print("\nfiles:", *(f"  {folder / name}" for name in ("cases.csv", "record.json")), sep="\n")


def publish(arguments: argparse.Namespace) -> int:
    """Write the static site. Returns the exit status."""
    from leaderboards import website
    from leaderboards.text import counted

    runs, problems = load(arguments)
    reported_rows = _reported(runs) if arguments.with_reported else None
    try:
        pages = website.publish(
            runs,
            arguments.out,
            title=arguments.title,
            note=arguments.note,
            pictures=arguments.pictures,
            reported=reported_rows,
        )
    except website.PublishError as error:
        raise UserError(str(error)) from None
    print(f"{counted(len(runs), 'run')}, {counted(pages, 'page')}:\n  {arguments.out / 'index.html'}")
    return _finish(problems)


def panels(arguments: argparse.Namespace) -> int:
    """Draw cases side by side, as several runs segment them. Returns the exit status."""
    from harness.evaluation.panels import draw

    runs, problems = load(arguments)
    selected = []
    for name in arguments.names:
        run = _named_run(name, runs)
        if run is None:
            raise unknown("run", name, [run.run_id for run in runs])
        selected.append(run)
    if arguments.out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {arguments.out}: figures are written as .png or .svg: give such a name")
    cases = draw(selected, arguments.data, arguments.out, arguments.cases, arguments.plugins, arguments.runs)
    print(f"{', '.join(cases)}:\n  {arguments.out}")
    return _finish(problems)


def load(arguments: argparse.Namespace) -> "tuple[list[Run], list[str]]":
    """The runs of all given folders, and what is wrong with records. Raises UserError where there is no run."""
    from leaderboards import records

    folders = arguments.folders or [arguments.runs]
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give the folder that holds the runs, with --runs or by name")
    runs, problems = records.load_runs(folders)
    if not runs and not problems:
        raise UserError(f"no finished run in {', '.join(map(str, folders))}: `harness run` makes one")
    return (_verified(runs) if arguments.only_verified else runs), problems


def cite(arguments: argparse.Namespace) -> int:
    """Print BibTeX for everything that the runs used. Returns the exit status."""
    from harness.api.registry import Registry
    from leaderboards.cite import cite as entries

    runs, problems = load(arguments)
    print(entries(runs, Registry(arguments.plugins).citation))
    return _finish(problems)


def _verified(runs: "list[Run]") -> "list[Run]":
    """The runs of which it is known that no test case was trained on; the number of the others is printed."""
    verified = [run for run in runs if run.num_test_seen == 0]
    unknown = sum(run.num_test_seen is None for run in runs)
    known = len(runs) - len(verified) - unknown
    if known or unknown:
        say(
            f"--only-verified leaves out {known} runs that were trained on test cases, and {unknown} of which nobody knows"
        )
    return verified


def _lines(result: object) -> str:
    """The text of a result, without characters that would move a terminal's cursor."""
    from leaderboards.text import printable

    return "\n".join(map(printable, str(result).splitlines()))


def _finish(problems: Sequence[str]) -> int:
    """Print what is wrong with records that were left out. Returns the exit status."""
    from leaderboards.text import printable

    for problem in problems:
        print(f"harness: error: left out: {printable(problem)}", file=sys.stderr)
    return 2 if problems else 0


def _reported(runs: "Sequence[Run]") -> "pd.DataFrame":
    """The rows that papers report for the tasks of the runs; empty, with a message, where there are none."""
    from leaderboards import reported

    tasks = sorted({str(run.record["task"]) for run in runs})
    rows = reported.rows(tasks)
    if rows.empty:
        print(
            f"harness: nothing is reported for {', '.join(tasks)}; there is for {', '.join(reported.known_tasks())}",
            file=sys.stderr,
        )
    return rows


def _named_run(name: str, runs: "Sequence[Run]") -> "Run | None":
    """The run with this id, this folder, or an id that begins with `name`; None where no run or several runs match."""
    exact = [run for run in runs if run.run_id == name or run.folder == Path(name).resolve()]
    matches = exact or [run for run in runs if run.run_id.startswith(name)]
    return matches[0] if len(matches) == 1 else None


def _files_to_check(path: Path) -> list[Path]:
    """The paths to check: the runs and the table of a published site, else the path itself."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a record.json, a run folder, a folder of runs, a CSV or a site")
    site = path.is_dir() and (path / "runs").is_dir() and (path / "leaderboard.csv").is_file()
    return [path / "runs", path / "leaderboard.csv"] if site else [path]


def _is_board(path: Path) -> bool:
    """Whether the path is the CSV of a leaderboard."""
    return path.suffix == ".csv" and path.name != "cases.csv"


def _run_folders(path: Path) -> list[Path]:
    """The run folders that a path names: the folder of a record, a run folder, or those below a folder that have a record."""
    from leaderboards import records

    if path.name in ("record.json", "cases.csv"):
        return [path.parent]
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a record.json nor a .csv: give one of these, a run folder or a folder of runs"
        )
    return [path] if (path / "record.json").exists() else records.run_folders(path)
