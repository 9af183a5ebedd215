"""`harness list`: plugins, presets, protocols and settings. Without a name nothing imports torch."""

import argparse
import json
import textwrap
from collections.abc import Iterable
from typing import Any

from harness.cli.options import add_options
from harness.cli.output import inline
from harness.system.console import say_on_terminal
from harness.system.errors import unknown

PROTOCOLS = (
    ("finetune", "the whole network is trained on the labels"),
    ("frozen", "decoder and head are trained, the encoder keeps its pre-trained weights"),
    ("linear", "one 1x1x1 convolution on the features of the frozen encoder is trained, without a decoder"),
)
EVERY = "every_setting"
SECTIONS = ("pretrain", "finetune", "evaluate", "task")


def add_parser(commands: Any) -> None:
    """The options of `harness list`."""
    parser = commands.add_parser(
        "list", help="methods, backbones, tasks, weights, presets, and their settings", allow_abbrev=False
    )
    parser.add_argument(
        "kind",
        nargs="?",
        metavar="KIND",
        help="methods, backbones, tasks, corpora, weights, presets, suites, protocols or settings; all but settings if left out",
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="one of them, with every setting")
    add_options(parser, "plugins")
    parser.add_argument("--json", action="store_true")
    parser.set_defaults(command=list_plugins)


def list_plugins(arguments: argparse.Namespace) -> None:
    """Print the name, the description and the properties of each plugin; of a named one its settings too."""
    from harness.api.registry import PLURAL, Registry

    registry = Registry(arguments.plugins)
    kinds = [*PLURAL.values(), "presets", "suites", "protocols"]
    plural = {_singular(kind): kind for kind in kinds}
    kind = plural.get(arguments.kind, arguments.kind)
    if kind is not None and kind not in (*kinds, "settings"):
        raise unknown("kind to list", kind, [*kinds, "settings"])
    shown = kinds if kind is None else [kind]
    # Each is printed before the next is read.
    sections: Iterable[tuple[str, list[dict[str, Any]]]] = ((kind, _rows(registry, kind)) for kind in shown)
    if arguments.name is not None:
        names = {row["name"]: row for row in _rows(registry, kind)}
        if arguments.name not in names:
            raise unknown(_singular(kind), arguments.name, names)
        row = names[arguments.name]
        sections = [(kind, [row | {EVERY: row.get(EVERY, _settings(registry, kind, row))}])]
    if arguments.json:
        print(json.dumps(dict(sections), indent=1))
        return
    for heading, rows in sections:
        print(f"{heading}:", flush=True)
        for row in rows:
            _print(row)


def _rows(registry: Any, kind: str) -> list[dict[str, Any]]:
    """The rows of one kind: `name`, `description` and properties."""
    from harness.config.presets import preset_names, read_preset
    from harness.config.suites import describe_suite, suite_names

    if kind == "presets":
        return [{"name": name, **read_preset(name)} for name in preset_names()]
    if kind == "suites":
        return [{"name": name, "description": describe_suite(name)} for name in suite_names()]
    if kind == "protocols":
        return [{"name": name, "description": text} for name, text in PROTOCOLS]
    if kind == "settings":
        return [{"name": section, "description": "", EVERY: _of_section(section, {})} for section in SECTIONS]
    described: list[dict[str, Any]] = registry.describe(_singular(kind))
    return described


def _singular(kind: str) -> str:
    """One of a kind: `methods` -> `method`."""
    from harness.api.registry import PLURAL

    return next((one for one, many in PLURAL.items() if many == kind), kind.removesuffix("s"))


def _settings(registry: Any, kind: str, row: dict[str, Any]) -> list[dict[str, str]]:
    """Every setting of a named plugin or preset."""
    from harness.api.settings import describe_settings

    if kind in ("methods", "backbones"):
        say_on_terminal("loading PyTorch and MONAI ...")
        return describe_settings(registry.load(_singular(kind), row["name"]).Config, _singular(kind))
    if kind == "presets":
        return [each for section in SECTIONS[:3] for each in _of_section(section, row.get(section, {}))]
    return _of_section("task", {}) if kind == "tasks" else []


def _of_section(section: str, preset: dict[str, Any]) -> list[dict[str, str]]:
    """The settings of a section of every run; a preset's values stand for the defaults."""
    from harness.api.settings import Settings, as_written, describe_settings
    from harness.config import schema

    sections: tuple[type[Settings], ...] = (schema.Pretrain, schema.Finetune, schema.Evaluate, schema.TaskSettings)
    rows = describe_settings(sections[SECTIONS.index(section)], section)
    for row in rows:
        field = row["setting"].partition(".")[2]
        if field in preset:
            row["default"] = as_written(preset[field])
        elif row["default"] == "must be given":
            row["default"] = "by the preset"
    return rows


def _print(row: dict[str, Any]) -> None:
    """A row as text, its settings below it."""
    print(f"  {row['name']}: {row['description']}" if row["description"] else f"  {row['name']}")
    settings = row.get(EVERY, [])
    for key, value in row.items():
        if key in ("name", "description", "origin", EVERY):
            continue
        if value not in ("", [], (), {}) or key in ("trains", "needs"):
            print(f"      {key}: {inline(value) or 'nothing'}")
    if settings:
        print("      settings (--set SETTING=VALUE):")
    for each in settings:
        print(f"        {each['setting']} = {each['default']}    [{each['allowed']}]")
        print(*textwrap.wrap(each["description"], 110, initial_indent=" " * 12, subsequent_indent=" " * 12), sep="\n")
