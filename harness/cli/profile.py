"""`harness profile`: the cost of a training step."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from harness.cli.options import add_options, argument
from harness.config.request import Request, positive
from harness.system.errors import UserError


def add_parser(commands: Any) -> None:
    """The options of `harness profile`."""
    parser = commands.add_parser("profile", help="what a training step costs", allow_abbrev=False)
    cells = parser.add_mutually_exclusive_group()
    cells.add_argument("--sweep", type=Path, metavar="FILE.toml", help="the cells of a sweep file, see sweeps/")
    cells.add_argument(
        "--suite", metavar="NAME", help="the cells that NAME stands for: `paper` (minutes on a GPU) or `options`"
    )
    for name, many, metavar, text in (
        ("method", "methods", "M", "`harness list methods`"),
        ("backbone", "backbones", "B", "`harness list backbones` (default: unet)"),
        ("crop", "crops", "X,Y,Z", "extent of a crop (default: the preset's)"),
        ("batch", "batches", "N", "crops per step (default: the preset's)"),
        ("precision", "precisions", "fp32|bf16", "default: auto"),
    ):
        parser.add_argument(
            f"--{name}", action="append", default=[], metavar=metavar, dest=many, help=f"{text}; also several"
        )
    add_options(parser, "task", text="gives channels, crop and batch: `harness list tasks`")
    add_options(parser, "preset")
    parser.set_defaults(preset="")
    parser.add_argument("--stage", default="pretrain", choices=["pretrain", "finetune"])
    parser.add_argument(
        "--compare",
        nargs="+",
        metavar="VARIANT",
        help="settings that the method has a name for, side by side, for instance whole partial",
    )
    parser.add_argument(
        "--rounds", type=argument(positive), metavar="N", help="of all cells in turn (default: 5, of a suite 3)"
    )
    add_options(parser, "settings", text="as in `harness run`")
    parser.add_argument("--out", type=Path, metavar="CSV", help="default: profiles/NAME.csv in the runs folder")
    add_options(parser, "runs", "plugins")
    parser.add_argument("--json", action="store_true", help="print the rows as one JSON document")
    parser.set_defaults(command=profile)


def profile(arguments: argparse.Namespace) -> int:
    """Time steps side by side; print a table, and write a CSV and a figure. Returns the exit status."""
    from harness.costs.suites import ROUNDS, suite_path

    if arguments.suite:
        arguments.sweep = suite_path(arguments.suite)
    requests = list(_requests(arguments))
    from harness.costs.profile import measure, summarise
    from harness.costs.trial import resolve_trial
    from harness.runs.locate import writable_folder
    from leaderboards import profiles

    variants = arguments.compare or [""]
    # A sweep also lists controls that are only fine-tuned; they have no pre-training step to time.
    trials, left_out = [], []
    for request in requests:
        try:
            trials += [resolve_trial(request, arguments.stage, variant) for variant in variants]
        except UserError as error:
            if arguments.sweep is None:
                raise
            left_out.append(str(error))
    if not trials:
        raise UserError(f"{arguments.sweep} has nothing to profile: {left_out[0]}")
    for problem in left_out:
        print(f"left out: {problem}", file=sys.stderr)
    out = arguments.out or writable_folder(arguments.runs) / "profiles" / f"{_name(arguments)}.csv"
    _check_out(out)
    rounds = arguments.rounds or (ROUNDS if arguments.suite else 5)
    results, rates = measure(trials, rounds, short=bool(arguments.suite))
    rows = summarise(results, rates)
    profiles.write(rows, out)
    profiles.draw(rows, out)
    if arguments.json:
        print(json.dumps(rows, indent=1))
        return 0
    print(f"\n{profiles.render(rows)}\n\n{out}\n{out.with_suffix('.png')}")
    return 0 if any(not row["problem"] for row in rows) else 2


def _requests(arguments: argparse.Namespace) -> Iterator[Request]:
    """The requests to profile: the product of the values on the command line, for each cell of a sweep or each method."""
    base = Request(
        task=arguments.task,
        preset=arguments.preset or Request.preset,
        runs=arguments.runs,
        settings=tuple(arguments.settings),
        plugins=tuple(arguments.plugins),
    )
    if arguments.sweep is not None:
        if arguments.methods or arguments.task or arguments.backbones:
            raise UserError(
                "a sweep file names methods, backbones and tasks: leave out --method, --backbone and --task"
            )
        from harness.sweeps.cells import read

        requests = [cell.request for cell in read(arguments.sweep, base, arguments.preset)]
    else:
        if not arguments.methods or not arguments.task:
            raise UserError("profile needs --method and --task, or --sweep FILE: give them")
        pairs = product(arguments.methods, arguments.backbones or ["unet"])
        requests = [replace(base, method=method, backbone=backbone) for method, backbone in pairs]
    axes: list[list[str | None]] = [
        [f"{arguments.stage}.{key}={value}" for value in values] or [None]
        for key, values in (
            ("crop", arguments.crops),
            ("batch_size", arguments.batches),
            ("precision", arguments.precisions),
        )
    ]
    for request in requests:
        for settings in product(*axes):
            yield replace(request, settings=(*request.settings, *(pair for pair in settings if pair)))


def _name(arguments: argparse.Namespace) -> str:
    """The name of the CSV, without its ending."""
    if arguments.sweep is not None:
        return str(arguments.sweep.stem)
    return "-".join([*arguments.methods, *(arguments.backbones or ["unet"]), Path(arguments.task).name])


def _check_out(out: Path) -> None:
    """Raises UserError where the CSV cannot be written there."""
    if out.suffix != ".csv":
        raise UserError(f"--out {out}: a profile is a table: give a name that ends in .csv")
    if out.is_dir():
        raise UserError(f"--out {out} is a folder: give a file")
    from harness.runs.locate import writable_folder

    writable_folder(out.parent)
