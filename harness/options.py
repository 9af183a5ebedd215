"""Options that several commands have, and how a command is found once it is called."""

import argparse
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from harness.tracking import TRACKERS


def add_execution_options(run: argparse.ArgumentParser) -> None:
    """How a run is carried out; the same run goes on under other ones."""
    run.add_argument(
        "--checkpoint-minutes",
        type=minutes,
        default=10.0,
        metavar="M",
        help="between checkpoints of a training stage (default: 10)",
    )
    run.add_argument(
        "--micro-batches",
        type=positive,
        default=0,
        metavar="N",
        help="compute each batch in N parts one after the other, for the same result in less memory",
    )
    run.add_argument(
        "--on-nonfinite",
        default="stop",
        choices=["stop", "skip"],
        help="a loss or gradient that is not finite ends the run (default), or its step is left out and counted",
    )
    run.add_argument(
        "--tracker",
        action="append",
        default=[],
        choices=list(TRACKERS),
        dest="trackers",
        help="where the values of every step go as well, also several; a tracker's failure never stops a run",
    )


def add_data_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--data",
        type=Path,
        default=os.environ.get("HARNESS_DATA") or None,
        metavar="DIR",
        help="the task's folder or the one that contains it (default: $HARNESS_DATA, else a phantom)",
    )


def add_runs_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--runs",
        type=Path,
        default=os.environ.get("HARNESS_RUNS") or "runs",
        metavar="DIR",
        help="where runs and caches are kept (default: $HARNESS_RUNS, else ./runs)",
    )


def add_plugin_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plugin",
        action="append",
        default=[],
        metavar="FILE|MODULE",
        dest="plugins",
        help="Python file or module with methods, backbones or tasks of your own; its code is run",
    )


def later(module: str, name: str) -> Callable[[argparse.Namespace], int]:
    """The command of that name; what its module imports is imported when it is called."""

    def command(arguments: argparse.Namespace) -> int:
        status: int = getattr(import_module(f"harness.{module}"), name)(arguments)
        return status

    return command


def seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = -1.0
    if not 0 <= minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes, 0 or more")
    return minutes


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return int(text)
