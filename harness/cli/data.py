"""`harness data`: check, preprocess or fetch data, or write a phantom."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.cli.options import Parser, add_options, argument
from harness.config.request import whole_number
from harness.system.errors import UserError, unknown
from harness.system.files import printable, write_atomic

if TYPE_CHECKING:
    from harness.api.task import ImageSet, Task
    from harness.data.check import CheckedCase
    from harness.data.corpus import Corpus

DATA = {
    "check": "the folder of the data or the one that contains it (default: $HARNESS_DATA)",
    "prepare": "",
    "fetch": "where to put it (default: $HARNESS_DATA, else here)",
}
"""Help of `--data` per verb; the one of a run where it is empty."""


def add_parser(commands: Any) -> None:
    """The options of `harness data` and its verbs."""
    group = commands.add_parser("data", help="check, prepare, fetch or make up data", allow_abbrev=False)
    verbs = group.add_subparsers(required=True, metavar="VERB", parser_class=Parser)
    for verb, text, command in (
        ("check", "open and check every file of a task or corpus, and write a report", check),
        ("prepare", "fill the cache that runs read from, and verify what is there", prepare),
        ("fetch", "bring a public data set, or say where to register for it", fetch),
        ("phantom", "write a phantom in the exact layout of a task or corpus", phantom),
    ):
        parser = verbs.add_parser(verb, help=text, allow_abbrev=False)
        parser.add_argument("task", metavar="TASK", help="a task, a corpus, or a folder of either kind")
        add_options(parser, "plugins")
        if verb == "phantom":
            parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new or empty folder")
            parser.add_argument("--cases", type=int, metavar="N", help="default: the task's own number")
            parser.add_argument("--seed", type=argument(whole_number), default=0, metavar="N")
        else:
            add_options(parser, "data", text=DATA[verb])
        if verb in ("check", "prepare"):
            add_options(parser, "runs")
        if verb == "check":
            parser.add_argument(
                "--report", type=Path, metavar="HTML", help="default: checks/TASK.html in the runs folder"
            )
        if verb == "fetch":
            parser.add_argument(
                "--url", metavar="URL", help="another address of the same archive; its MD5 sum must be right"
            )
            parser.add_argument("--keep", action="store_true", help="keep the archive after unpacking it")
        parser.set_defaults(command=command)


def check(arguments: argparse.Namespace) -> int:
    """Open every file, print the problems and write the report. Returns exit status 2 where a problem would spoil a run."""
    from harness.api.registry import Registry
    from harness.data.check import SPOILS, check_cases, problems_of, report_path
    from harness.data.check_report import render_report

    if arguments.data is None and Registry(arguments.plugins).task_folder(arguments.task) is None:
        raise UserError("no data to check: give --data DIR or set HARNESS_DATA")
    images, root = _image_set(arguments)
    cases = images.cases(root)
    checked = check_cases(images, cases)
    groups = problems_of(checked)
    for (weight, kind), problems in groups.items():
        print(f"{kind} ({weight}, {len(problems)}):")
        print(*(f"  {printable(problem.case)}: {printable(problem.text)}" for problem in problems), sep="\n")
    bad = {problem.case for (weight, _), problems in groups.items() for problem in problems if weight == SPOILS}
    number = f"{len(cases)} case{'s' if len(cases) != 1 else ''}"
    if any(case.patient for case in cases):
        number += f" of {len({case.patient or (case.id,) for case in cases})} patients"
    summary = f"{number}{_split(images, root, checked)}; {len(bad)} with a problem that spoils a run"
    report = arguments.report or report_path(arguments.runs, images.name)
    write_atomic(report, render_report(images, str(root), checked, summary))
    print(f"{summary}\nreport:\n  {report}")
    return 2 if bad else 0


def _split(images: "Task | Corpus", root: Path, checked: "list[CheckedCase]") -> str:
    """How a run would split the usable cases, in words; empty for a corpus, or where no case is usable."""
    from harness.api.task import Task
    from harness.data.duplicates import duplicate_pairs
    from harness.data.phantom import is_phantom
    from harness.data.splits import split_cases

    usable = [(result.case, result.signature) for result in checked if result.signature is not None]
    if not isinstance(images, Task) or not usable:
        return ""
    task = replace(images, test_ids=None) if is_phantom(root) else images
    try:
        alike = duplicate_pairs([signature for _, signature in usable])
        split = split_cases(task, [case for case, _ in usable], same=[(i, j) for i, j, _ in alike])
    except UserError as error:
        return f", which cannot be split ({error})"
    return f", {len(split.train)} for training and {len(split.test)} for testing"


def prepare(arguments: argparse.Namespace) -> None:
    """Fill the cache of preprocessed volumes; volumes that are there already are compared with their digests."""
    from harness.data.inventory import digest_cases, fingerprint
    from harness.data.volumes import preprocess_cases
    from harness.runs.locate import writable_folder

    writable_folder(arguments.runs)
    cache = arguments.runs / "cache"
    images, root = _image_set(arguments)
    cases = images.cases(root)
    digests, bad = digest_cases(cases, cache)
    volumes = preprocess_cases(images, [case for case in cases if case.id in digests], digests, cache, verify=True)
    if bad:
        raise UserError(f"{next(iter(bad.values()))} ({len(bad)} of {len(cases)} cases; the others are prepared)")
    print(f"{len(volumes)} cases prepared in {volumes[0].stem.parent}, fingerprint {fingerprint(digests)}")


def fetch(arguments: argparse.Namespace) -> int:
    """Download and unpack a public archive. Returns the exit status.

    Raises:
        UserError: an unknown name; or data that needs a registration: the message says where, and how to unpack it.
    """
    from harness.api.registry import Registry
    from harness.api.task import Task
    from harness.data.download import fetch as download

    registry = Registry(arguments.plugins)
    names = registry.names("task") + registry.names("corpus")
    if arguments.task not in names:
        raise unknown("task or corpus", arguments.task, names)
    images: ImageSet = registry.load("task" if arguments.task in registry.names("task") else "corpus", arguments.task)
    archive = images.archive() if isinstance(images, Task) else None
    folder = Path(arguments.data or ".")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--data {folder} is no folder: give the folder that the data set is to be put in")
    if archive is None:
        raise UserError(
            f"{images.name} cannot be fetched, its owners ask for a registration: {images.registration}; then unpack it so "
            f"that {folder} holds {images.layout}"
        )
    unpacked = download(replace(archive, url=arguments.url or archive.url), folder, keep=arguments.keep)
    print(f"{images.name} is in\n  {unpacked}\nnext: harness data check {images.name} --data {folder}")
    return 0


def phantom(arguments: argparse.Namespace) -> None:
    """Write a phantom in the layout of a task or corpus."""
    from harness.api.registry import Registry
    from harness.api.task import Task
    from harness.data.phantom import CORPUS_CASES, write_phantom

    registry = Registry(arguments.plugins)
    name = arguments.task
    images = registry.load("corpus", name) if name in registry.names("corpus") else registry.task(name)
    number = arguments.cases
    if number is None:
        number = images.phantom_cases if isinstance(images, Task) else CORPUS_CASES
    least = 2 if isinstance(images, Task) else 1
    if number < least:
        why = "2 cases, one to train and one to test" if least == 2 else "1 scan"
        raise UserError(f"--cases {number}: a phantom of {images.name} needs at least {why}")
    write_phantom(images, arguments.out, number, arguments.seed)
    print(f"{number} phantom cases of {images.name} in {arguments.out}")


def _image_set(arguments: argparse.Namespace) -> "tuple[Task | Corpus, Path]":
    """The task or corpus that the arguments name, and its folder."""
    from harness.api.registry import Registry
    from harness.data.corpus import folder_corpus
    from harness.data.datasets import find_corpora, find_data

    registry, name = Registry(arguments.plugins), arguments.task
    data = None if arguments.data is None else Path(arguments.data)
    if name in registry.names("corpus"):
        ((corpus, root),) = find_corpora(registry, [name], None, data, arguments.runs)
        return corpus, root
    folder = registry.task_folder(name)
    if folder is not None and folder.is_dir() and not (folder / "dataset.json").exists():
        return folder_corpus(folder), folder
    task = registry.task(name)
    return task, find_data(task, folder or data, arguments.runs)
