"""Verbs that read and write files of results: validate, import, publish, panels."""

import argparse
import sys
from pathlib import Path

from harness.cli.leaderboard.records import finish, load, named_run, reported_rows
from harness.cli.output import terminal_width
from harness.system.errors import UserError, unknown

DEFINITIONS = ("evaluate.hd95", "evaluate.empty", "evaluate.tolerance")
"""The settings that imported results are scored with."""


def check(arguments: argparse.Namespace) -> int:
    """Validate records, CSVs and sites from anywhere; print what is wrong. Returns the exit status."""
    from leaderboards import records, validate
    from leaderboards.text import counted, printable

    problems: list[str] = []
    files = [file for path in arguments.files for file in _files_to_check(path)]
    folders = [folder for path in files if not _is_board(path) for folder in _run_folders(path)]
    runs, _ = records.load_runs(dict.fromkeys(folder.parent for folder in folders))
    # Runs of the same ids in the runs folder would be taken for a conflict.
    own, _ = records.load_runs([arguments.runs] if arguments.runs.is_dir() else [])
    runs += [run for run in own if run.run_id not in {each.run_id for each in runs}]
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
    from harness.data.splits import parse_fold
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
    fold = parse_fold(request.split)
    split = fold.canonical if fold else request.split  # as runs record it, with which folds are pooled
    folder = imported.import_results(arguments.source, data, split, settings, origin, request.runs)
    run = records.load_run(folder)
    print(table.render(board.gather([run]), width=terminal_width()))
    print("\nfiles:", *(f"  {folder / name}" for name in ("cases.csv", "record.json")), sep="\n")


def publish(arguments: argparse.Namespace) -> int:
    """Write the static site. Returns the exit status."""
    from leaderboards import website
    from leaderboards.text import counted, printable

    runs, problems = load(arguments)
    reported = reported_rows(runs) if arguments.with_reported else None
    try:
        pages = website.publish(
            runs,
            arguments.out,
            title=arguments.title,
            note=arguments.note,
            pictures=arguments.pictures,
            reported=reported,
        )
    except website.PublishError as error:
        raise UserError(str(error)) from None
    print(f"{counted(len(runs), 'run')}, {counted(pages, 'page')}:\n  {arguments.out / 'index.html'}")
    real = [run for run in runs if run.record["data"]["source"] == "real" and (run.folder / "figures").is_dir()]
    if arguments.pictures and real:
        licences = sorted({str(run.record["data"].get("licence", "unknown")) for run in real})
        shown = "; ".join(printable(licence) for licence in licences)
        print(
            f"it has pictures of real scans (licence: {shown}); --without-scans leaves them out. Every site names its cases"
        )
    return finish(problems)


def panels(arguments: argparse.Namespace) -> int:
    """Draw cases side by side, as several runs segment them. Returns the exit status."""
    from harness.evaluation.panels import draw

    runs, problems = load(arguments)
    selected = []
    for name in arguments.names:
        run = named_run(name, runs)
        if run is None:
            raise unknown("run", name, [run.run_id for run in runs])
        selected.append(run)
    if arguments.out.suffix not in (".png", ".svg"):
        raise UserError(f"--out {arguments.out}: figures are written as .png or .svg: give such a name")
    cases = draw(selected, arguments.data, arguments.out, arguments.cases, arguments.plugins, arguments.runs)
    print(f"{', '.join(cases)}:\n  {arguments.out}")
    return finish(problems)


def _files_to_check(path: Path) -> list[Path]:
    """The paths to check: the runs and the table of a published site, else the path itself."""
    if not path.exists():
        raise UserError(f"{path} does not exist: give a record.json, a run folder, a folder of runs, a CSV or a site")
    from leaderboards.website import is_site

    return [path / "runs", path / "leaderboard.csv"] if is_site(path) else [path]


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
