"""Nested values as lines that a person reads."""

from harness.cli.output import as_lines, inline


def test_tables_of_tables_are_indented_and_flat_tables_are_one_line():
    values = {
        "run": "x",
        "config": {"pretrain": {"steps": 2, "crop": [32, 16, 8]}, "seed": 0},
        "digests": {"a": 1, "b": None},
        "none": {},
    }
    assert as_lines(values) == "\n".join(
        ["run: x", "config:", "  pretrain: steps=2, crop=32, 16, 8", "  seed: 0", "digests: a=1, b=None", "none: "]
    )


def test_a_long_list_is_cut_and_counted():
    short, long = list(range(20)), list(range(1000))
    assert inline(short) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19"
    assert inline(tuple(short)) == inline(short)
    text = inline(long)
    assert text.startswith("1000 entries, 0, 1, 2")
    assert text.endswith(" ...")
    assert len(text) < 160
    assert inline({"train": long}) == f"train={text}"
