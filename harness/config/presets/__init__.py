"""The presets that ship with the harness. Each one is a TOML file."""

import tomllib
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

    Raises:
        UserError: there is no preset of that name.
    """
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    return tomllib.loads((resources.files("harness.config.presets") / f"{name}.toml").read_text())
