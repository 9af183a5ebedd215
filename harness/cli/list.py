"""`harness list`: plugins and presets, without importing torch."""

import argparse
import json
from typing import Any

from harness.cli.options import add_options
from harness.cli.output import inline
from harness.system.errors import unknown


def add_parser(commands: Any) -> None:
    """The options of `harness list`."""
    parser = commands.add_parser(
        "list", help="methods, backbones, tasks, published weights, presets", allow_abbrev=False
    )
    parser.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help="methods, backbones, tasks, corpora, weights or presets; all if left out",
    )
    add_options(parser, "plugins")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=list_plugins)


def list_plugins(arguments: argparse.Namespace) -> None:
    """Print the name, the description and the properties of each plugin."""
    from harness.api.registry import PLURAL, Registry
    from harness.config.presets import preset_names, read_preset

    registry = Registry(arguments.plugins)
    kinds = [*PLURAL.values(), "presets"]
    if arguments.kind is not None and arguments.kind not in kinds:
        raise unknown("kind to list", arguments.kind, kinds)
    rows_of = {}
    for kind in kinds if arguments.kind is None else [arguments.kind]:
        if kind == "presets":
            rows_of[kind] = [{"name": name, **read_preset(name)} for name in preset_names()]
        else:
            rows_of[kind] = registry.describe(next(singular for singular, plural in PLURAL.items() if plural == kind))
    if arguments.json:
        print(json.dumps(rows_of, indent=1))
        return
    for kind, rows in rows_of.items():
        print(f"{kind}:")
        for row in rows:
            print(f"  {row['name']}: {row['description']}")
            properties = {key: value for key, value in row.items() if key not in ("name", "description", "origin")}
            for key, value in properties.items():
                if value not in ("", [], (), {}) or key in ("trains", "needs"):
                    print(f"      {key}: {inline(value) or 'nothing'}")
