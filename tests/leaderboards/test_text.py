"""Text that stays text in terminals, spreadsheets, Markdown and LaTeX."""

import csv
import html
import io
import re

import pytest
from markdown_it import MarkdownIt

from leaderboards.text import align, escape_cell, escape_latex, escape_markdown, printable

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import example, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

# Letters, marks of every language here, white space and what is invisible.
TEXT = st.text(st.one_of(st.sampled_from("\\`*_{}[]()|~#+-=@!<>&$%^'\" \t\r\n\x1b＝＋－＠肝a1"), st.characters()))
QUICK = settings(max_examples=200, deadline=None, derandomize=True, database=None)
FORMULA = "=+-@\t\r\n＝＋－＠"


def test_columns_begin_below_each_other_and_numbers_end_there():
    lines = align([["", "Dice"], ["scratch", "0.8"], ["m", "10.25"]], right=[1])
    assert lines == ["          Dice", "scratch    0.8", "m        10.25"]
    assert align([["a", "b"], ["ccc", ""]]) == ["a    b", "ccc"]


def test_wide_characters_take_two_places():
    """In a terminal the bar stands in one column though the texts have one and two characters."""
    assert align([["肝", "|"], ["ab", "|"], ["c", "|"]]) == ["肝  |", "ab  |", "c   |"]


def test_lines_of_unequal_length_are_refused():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        align([["a", "b"], ["c"]])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\x1b[2Jb", "a [2Jb"),
        ("a\nb\tc\r", "a b c "),
        ("left\u202eright\u200b", "left right "),
        ("\x00\x7f\x9b", "   "),
        ("é 肝 ✓", "é 肝 ✓"),
    ],
)
def test_what_is_not_printed_becomes_a_blank(text, shown):
    assert printable(text) == shown


@QUICK
@given(TEXT)
@example("  =1")
@example("'=1")
def test_no_cell_is_a_formula_and_none_is_lost(text):
    """In the spreadsheet the text is read back by taking one apostrophe away where it begins with one."""
    file = io.StringIO()
    csv.writer(file).writerow([escape_cell(text)])
    ((cell,),) = csv.reader(io.StringIO(file.getvalue(), newline=""))
    assert not cell.startswith(tuple(FORMULA))
    assert not cell.lstrip(" ").startswith(tuple(FORMULA))
    assert (cell[1:] if cell.startswith("'") else cell) == text


@pytest.mark.parametrize("value", [-1, -0.5, None, True])
def test_numbers_are_no_text_and_stay_as_they_are(value):
    assert escape_cell(value) is value


@QUICK
@given(TEXT)
@example("**a** _b_ `c` [d](e) ![f](g) <h> &amp; ~~i~~ |j| # k")
def test_a_markdown_reader_shows_the_text_as_it_was(text):
    text = " ".join(text.split())  # Markdown itself takes blanks at the ends and in rows together
    reader = MarkdownIt("commonmark").enable(["table", "strikethrough"])
    shown = reader.renderInline(escape_markdown(text))
    assert " ".join(html.unescape(shown).split()) == " ".join(printable(text).split())
    assert not re.search(r"<(?!br)", shown)


@QUICK
@given(TEXT)
@example("a|b\\")
def test_a_cell_of_a_markdown_table_does_not_end_early(text):
    reader = MarkdownIt("commonmark").enable("table")
    shown = reader.render(f"| a | b |\n|---|---|\n| {escape_markdown(text)} | last |\n")
    cells = re.findall(r"<td>(.*?)</td>", shown, flags=re.DOTALL)
    assert len(cells) == 2
    assert " ".join(html.unescape(cells[0]).split()) == " ".join(printable(text).split())
    assert cells[1] == "last"


@QUICK
@given(TEXT)
@example(r"50% of $x_1^2$ & {a} ~ #1 \n")
def test_latex_sets_the_text_as_it_was(text):
    """Read back as LaTeX reads it: commands for three characters, a backslash before seven, nothing else special."""
    special = {r"\textbackslash{}": "\\", r"\textasciitilde{}": "~", r"\textasciicircum{}": "^"}
    tokens = re.compile(r"\\text\w+\{\}|\\[&%$#_{}]|[^\\&%$#_{}~^]")
    written, read, place = escape_latex(text), [], 0
    while place < len(written):
        token = tokens.match(written, place)
        assert token, written[place:]
        read.append(special.get(token[0], token[0][-1]))
        place = token.end()
    assert "".join(read) == printable(text)
