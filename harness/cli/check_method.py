"""`harness check-method`: check a method against its contract."""

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from harness.cli.options import add_options
from harness.system.console import say
from harness.system.errors import UserError


def add_parser(commands: Any) -> None:
    """The options of `harness check-method`."""
    parser = commands.add_parser("check-method", help="does a method keep the contract?", allow_abbrev=False)
    parser.add_argument("method", metavar="NAME|FILE", help="an installed method, or a Python file with methods")
    parser.add_argument(
        "--backbone", action="append", metavar="B", dest="backbones", help="default: all that can serve"
    )
    add_options(parser, "settings", text="method.*, for instance method.noise=1")
    add_options(parser, "plugins")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=check_method)


def check_method(arguments: argparse.Namespace) -> int:
    """Run the conformance checks of a method, or of all methods in a file. Returns exit status 2 where one does not pass."""
    from harness.api.registry import Registry
    from harness.config.resolve import parse_overrides

    settings = parse_overrides(arguments.settings)
    for key in settings:
        if not key.startswith("method."):
            raise UserError(f"--set {key}: check-method takes method.* only; networks have a preset of their own here")
    is_file = arguments.method.endswith(".py")
    plugins = [*arguments.plugins, *([arguments.method] if is_file else [])]
    registry = Registry(plugins)
    origin = f"--plugin {arguments.method}"
    names = [name for name in registry.names("method") if registry.plugin("method", name).origin == origin]
    if is_file and not names:
        raise UserError(f"{arguments.method} defines no method: it needs a subclass of harness.Method with a `name`")
    names = names if is_file else [arguments.method]
    for name in names:
        registry.plugin("method", name)
    for backbone in arguments.backbones or ():
        registry.plugin("backbone", backbone)
    from harness import conformance

    method_settings = {key.partition(".")[2]: value for key, value in settings.items()}
    results_of = {}
    for name in names:
        results_of[name] = conformance.check_method(
            name, plugins, arguments.backbones, method_settings, done=_print_result
        )
        if not arguments.json:
            print(f"{name}:\n{conformance.report(results_of[name])}\n")
    if arguments.json:
        print(
            json.dumps({name: [asdict(result) for result in results] for name, results in results_of.items()}, indent=1)
        )
    served_results = {
        name: [result for result in results if result.status != "refused"] for name, results in results_of.items()
    }
    bad = [
        name
        for name, results in served_results.items()
        if not results or any(result.status == "FAIL" for result in results)
    ]
    if bad:
        print(f"harness: error: {', '.join(bad)}: not every check passes, see above", file=sys.stderr)
    return 2 if bad else 0


def _print_result(result: Any) -> None:
    """Print one result as soon as it is there."""
    say(f"{result.backbone}: {result.check}: {result.status}")
