"""`harness export`: the weights of a finished run in a format that other tools read."""

import argparse
from pathlib import Path
from typing import Any

from harness.cli.options import add_options


def add_parser(commands: Any) -> None:
    """The options of `harness export`."""
    parser = commands.add_parser("export", help="a finished run's weights, with a model card", allow_abbrev=False)
    parser.add_argument("--run", required=True, metavar="RUN", help="run id, its beginning, or a run folder")
    parser.add_argument(
        "--format",
        required=True,
        choices=["monai", "safetensors", "onnx"],
        dest="kind",
        help="for MONAI's own network, as the run left them, or as a graph",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: ./RUN-FORMAT)")
    add_options(parser, "runs", "plugins")
    parser.set_defaults(command=export)


def export(arguments: argparse.Namespace) -> None:
    """Write the weights and the model card, and print their paths."""
    from harness.runs.status import find_run

    folder = find_run(arguments.run, arguments.runs)
    from harness.runs.export import export as write

    out = arguments.out or Path(f"{folder.resolve().name}-{arguments.kind}")
    for path in write(folder, arguments.kind, out, tuple(arguments.plugins)):
        print(path)
