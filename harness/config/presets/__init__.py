"""The presets that ship with the harness. Each one is a TOML file."""

import tomllib
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any

from harness.system.errors import unknown


def preset_names() -> list[str]:
    """The sorted names of the shipped presets."""
    folder = resources.files("harness.config.presets")
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@cache
def read_preset(name: str) -> dict[str, Any]:
    """The content of a preset: its `description`, and a table per section of settings.

    `extends` names a preset whose values hold where this one has none, `shots` a number of labelled cases.

    Raises:
        UserError: there is no preset of that name.
    """
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    return tomllib.loads((resources.files("harness.config.presets") / f"{name}.toml").read_text())


def lineage(name: str) -> list[str]:
    """The presets that make up a preset: those that it extends, from the last one on, and itself."""
    base = read_preset(name).get("extends")
    return [*(lineage(base) if base else []), name]


def settings_of(name: str) -> Iterator[tuple[str, str, Any]]:
    """The settings that a preset itself has: section, field, value."""
    for section, fields in read_preset(name).items():
        if isinstance(fields, dict):
            for field, value in fields.items():
                yield section, field, value
