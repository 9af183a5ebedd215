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
        choices=["monai", "safetensors", "onnx", "nnssl", "nnunet"],
        dest="kind",
        help="for MONAI's own network, as the run left them, as a graph, or for nnU-Net: encoder, or whole network",
    )
    parser.add_argument(
        "--stage",
        choices=["pretrain", "finetune"],
        default="pretrain",
        help="whose weights go to nnU-Net (default: pretrain); the other formats have those of fine-tuning",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new folder (default: ./RUN-FORMAT)")
    add_options(parser, "runs", "plugins")
    parser.set_defaults(command=export)


def export(arguments: argparse.Namespace) -> None:
    """Write the weights and the model card, and print their paths."""
    from harness.runs.status import find_run

    folder = find_run(arguments.run, arguments.runs)
    out, plugins = arguments.out or Path(f"{folder.resolve().name}-{arguments.kind}"), tuple(arguments.plugins)
    if arguments.kind in ("nnssl", "nnunet"):
        from harness.runs.export_nnssl import export_nnssl

        paths = export_nnssl(folder, arguments.kind, arguments.stage, out, plugins)
    else:
        from harness.runs.export import export as write

        paths = write(folder, arguments.kind, out, plugins)
    for path in paths:
        print(path)
