"""Nested values as lines of text, and the width of the terminal."""

import shutil
import sys
from typing import Any


def as_lines(values: dict[str, Any], indent: int = 0) -> str:
    """Nested values as text, one value per line; inner dictionaries are indented."""
    pad, lines = " " * indent, []
    for key, item in values.items():
        if isinstance(item, dict) and item and any(isinstance(inner, dict) for inner in item.values()):
            lines += [f"{pad}{key}:", as_lines(item, indent + 2)]
        else:
            lines.append(f"{pad}{key}: {inline(item)}")
    return "\n".join(lines)


def terminal_width() -> int | None:
    """Characters in a line of the terminal; None where the output goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def inline(value: Any) -> str:
    """A value as one line; a list of more than 160 characters is cut."""
    if isinstance(value, dict):
        return ", ".join(f"{key}={inline(item)}" for key, item in value.items())
    if isinstance(value, list | tuple):
        text = ", ".join(map(inline, value))
        return text if len(text) <= 160 else f"{len(value)} entries, {text[:120]} ..."
    return str(value)
