"""`harness fetch-weights`: brings a file of published weights, or says where it is to be had."""

import argparse
from pathlib import Path
from typing import Any

from harness.cli.options import add_options
from harness.system.errors import UserError


def add_parser(commands: Any) -> None:
    """The options of `harness fetch-weights`."""
    parser = commands.add_parser(
        "fetch-weights", help="bring published weights, or say where they are", allow_abbrev=False
    )
    parser.add_argument("name", metavar="NAME", help="`harness list weights` names them")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="default: the present folder")
    parser.add_argument("--url", metavar="URL", help="another address of the same file")
    add_options(parser, "plugins")
    parser.set_defaults(command=fetch_weights)


def fetch_weights(arguments: argparse.Namespace) -> None:
    """Download the file, compare its digest, and print how to start from it."""
    from harness.api.registry import Registry
    from harness.data.download import download
    from harness.system.locks import held

    published = Registry(arguments.plugins).load("weights", arguments.name)
    url, path = arguments.url or published.url, arguments.out / Path(published.file).name
    start = f"harness run --method official --backbone {published.backbone} --set method.weights={path} --set "
    start += f"method.corpus={published.name}"
    start += "".join(f" --set backbone.{key}={value}" for key, value in published.settings.items())
    if not url:
        raise UserError(
            f"{published.name}: its publishers give no address that this could fetch from: get {published.file} by way of "
            f"{published.page}, then start with `{start} --task ...`"
        )
    arguments.out.mkdir(parents=True, exist_ok=True)
    with held(path, f"the download of {path}"):
        if path.exists():
            raise UserError(f"{path} is there already: remove it, or give another folder with --out")
        sha256 = download(url, path, "sha256", published.sha256)
    compared = "as expected" if published.sha256 else "not compared, since its publishers state none"
    print(f"{path}\nsha256 {sha256}, {compared}\nlicence: {published.licence}\n{start} --task ...")
