"""Text for terminals, CSV, Markdown and LaTeX: aligned columns, and escapes for everything that would act as a command."""

import html
import re
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len

# Characters that start a formula in spreadsheets, with their full-width forms.
FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")

UNKNOWN = "unknown"
"""Cell of the column `n_test_seen` where nobody knows what the weights were trained on."""


def seen_text(number: int | None) -> int | str:
    """A number of test cases that were trained on, for a table cell."""
    return UNKNOWN if number is None else number


def align(lines: Sequence[Sequence[str]], right: Sequence[int] = ()) -> list[str]:
    """Lines of text with aligned columns; wide characters count as two.

    Args:
        lines: rows with equally many texts.
        right: indices of the columns that are aligned on the right.
    """
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(
            _padded(text, width, index in right) for index, (text, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def fit(rows: Sequence[Sequence[str]], leave_out: Sequence[str], width: int) -> tuple[list[list[str]], list[str]]:
    """Rows that fit a width once aligned, as far as columns may be left out; and the headings that are left out.

    Args:
        rows: equally many texts each; the first row has the headings.
        leave_out: headings of the columns that may be left out, the first one first.
        width: characters.
    """
    fitted, gone = [list(row) for row in rows], []
    for heading in leave_out:
        if max(map(cell_len, align(fitted))) <= width:
            break
        if heading in fitted[0]:
            gone.append(heading)
            at = fitted[0].index(heading)
            fitted = [row[:at] + row[at + 1 :] for row in fitted]
    return fitted, gone


def counted(number: int, thing: str) -> str:
    """A number of things in words: `1 run`, `2 runs`."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def printable(text: str) -> str:
    """One line without control characters, so that no name moves a terminal's cursor or breaks a comment."""
    return "".join(character if character.isprintable() else " " for character in text)


def escape_cell(text: Any) -> Any:
    """The value of a CSV cell, escaped so that no spreadsheet takes it for a formula; other types than text stay unchanged.

    A text that starts with an apostrophe gets a second one, so that different texts stay different.
    """
    risky = isinstance(text, str) and (text.lstrip(" ").startswith(FORMULA) or text.startswith(("'", *FORMULA)))
    return f"'{text}" if risky else text


def escape_markdown(text: Any) -> str:
    """Text that Markdown shows unchanged, in one line."""
    return re.sub(r"([\\`*_{}\[\]|~#])", r"\\\1", html.escape(printable(str(text)), quote=False))


def escape_latex(text: Any) -> str:
    """Text that LaTeX sets unchanged."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(
        special.get(character, f"\\{character}" if character in "&%$#_{}" else character)
        for character in printable(str(text))
    )


def _padded(text: str, width: int, right: bool) -> str:
    """The text with blanks up to `width`, at its right end or, for `right`, before it."""
    blank = " " * (width - cell_len(text))
    return blank + text if right else text + blank
