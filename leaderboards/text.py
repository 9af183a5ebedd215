"""Text for terminals, CSV, Markdown and LaTeX: columns aligned, and whatever could act as more than text escaped."""

import html
import re
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len

# What spreadsheets take for the beginning of a formula, wide forms included.
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")


def align(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Rows of equally many texts as lines, their columns below each other; wide characters count as two.

    Args:
        right: indices of columns that are aligned at their right end.
    """
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(_padded(text, w, n in right) for n, (text, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    ]


def printable(text: str) -> str:
    """One line without control characters, so that no name moves a terminal's cursor or breaks a comment."""
    return "".join(character if character.isprintable() else " " for character in text)


def escape_cell(text: Any) -> Any:
    """A cell of a CSV that no spreadsheet takes for a formula; what is no text is left as it is.

    A text that begins with an apostrophe gets a second one, so that no two texts become one.
    """
    risky = isinstance(text, str) and (text.lstrip(" ").startswith(FORMULA) or text.startswith(("'", *FORMULA)))
    return f"'{text}" if risky else text


def escape_markdown(text: Any) -> str:
    """Text that a line of Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", html.escape(printable(str(text)), quote=False))


def escape_latex(text: Any) -> str:
    """Text that LaTeX sets as it is."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(special.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in printable(str(text)))


def _padded(text: str, width: int, right: bool) -> str:
    blank = " " * (width - cell_len(text))
    return blank + text if right else text + blank
