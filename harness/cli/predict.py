"""`harness predict`: segment new images with a finished run."""

import argparse
import sys
from pathlib import Path
from typing import Any

from harness.cli.options import add_options
from harness.system.errors import UserError
from harness.system.files import printable


def add_parser(commands: Any) -> None:
    """The options of `harness predict`."""
    parser = commands.add_parser("predict", help="segment new images with a finished run", allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="RUN", help="run id, its beginning, or a run folder")
    parser.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="IN ... OUT",
        help="an image, or one per channel in the task's order, and the file to write; or a folder and a folder",
    )
    add_options(parser, "runs", "plugins")
    parser.set_defaults(command=predict)


def predict(arguments: argparse.Namespace) -> int:
    """Segment the images, print the files that were written, and list those that could not be. Returns the exit status."""
    *inputs, output = arguments.paths
    if not inputs:
        raise UserError(f"predict needs images and where to write: it got {output} only; give IN ... OUT")
    from harness.runs.status import find_run

    folder = find_run(arguments.run, arguments.runs)
    from harness.runs.predict import predict_images

    written, problems = predict_images(folder, inputs, output, arguments.plugins)
    for path in written:
        print(path)
    for problem in problems:
        print(f"harness: error: {printable(problem)}", file=sys.stderr)
    return 2 if problems else 0
