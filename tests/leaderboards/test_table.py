"""Rows in files and in the terminal: what is counted, what is escaped."""

from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from markdown_it import MarkdownIt

from leaderboards import reported, table
from tests.leaderboards.made import built, called, tables, three_fractions, write_run


def test_empty_cases_are_left_out_and_counted(tmp_path):
    write_run(tmp_path)
    frame = built(tmp_path).set_index("target")
    assert frame.loc["a", "n_cases"] == 8
    assert frame.loc["b", "n_cases"] == 7
    assert frame.loc["b", "dice"] == pytest.approx(0.5)


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@x", "\t=1"])
def test_text_that_a_spreadsheet_would_run_is_escaped(tmp_path, name):
    write_run(tmp_path, name)
    table.write(built(tmp_path), tmp_path / "board.csv")
    assert set(pd.read_csv(tmp_path / "board.csv")["method"]) == {f"'{name}"}


def test_markdown_and_latex_escape_what_they_would_take_for_markup(tmp_path):
    write_run(tmp_path, "<script>a|b_c&d%{x}\\")
    frame = built(tmp_path)
    table.write(frame, tmp_path / "board.md")
    table.write(frame, tmp_path / "board.tex")
    assert r"&lt;script&gt;a\|b\_c&amp;d%\{x\}\\" in (tmp_path / "board.md").read_text()
    assert r"<script>a|b\_c\&d\%\{x\}\textbackslash{}" in (tmp_path / "board.tex").read_text()
    with pytest.raises(table.EndingError, match="give one of"):
        table.write(frame, tmp_path / "board.xlsx")


def test_warnings_stand_below_markdown_and_latex(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, final_soft_dice=0.9)
        write_run(tmp_path, "m_1", seed, final_soft_dice=0.1)
    paths = [tmp_path / "t.md", tmp_path / "t.tex"]
    called(capsys, "leaderboard", "build", "--runs", tmp_path, *(word for path in paths for word in ("--out", path)))
    called(capsys, "leaderboard", "publish", "--runs", tmp_path, "--out", tmp_path / "site")
    for path in (*paths, tmp_path / "site" / "leaderboard.md"):
        text = path.read_text()
        assert text.count("NOT CONVERGED: the fine-tuning of 1 of 2 rows") == 1
        assert text.count(r"m\_1 (unet): not converged (seeds 0, 1)") == 1


def test_a_name_does_not_move_the_terminals_cursor(tmp_path):
    write_run(tmp_path, "a\x1b[2Jb\nc")
    assert "\x1b" not in table.render(tables(tmp_path))


def test_a_planted_link_is_not_written_through(tmp_path):
    write_run(tmp_path / "runs")
    (tmp_path / "victim").write_text("whole")
    for name in (".board.csv.partial", "board.csv"):
        (tmp_path / name).symlink_to(tmp_path / "victim")
    table.write(table.build(tables(tmp_path / "runs")), tmp_path / "board.csv")
    assert (tmp_path / "victim").read_text() == "whole"


@pytest.fixture
def runs(tmp_path):
    return three_fractions(tmp_path / "runs")


def test_build_writes_every_format(runs, capsys, tmp_path):
    places = [tmp_path / f"board.{ending}" for ending in ("csv", "md", "tex")]
    said = called(capsys, "leaderboard", "build", "--runs", runs, *(w for place in places for w in ("--out", place)))
    assert "18 runs, 18 rows" in said
    assert all(place.stat().st_size > 500 for place in places)
    assert "give one of .csv, .md, .tex" in called(
        capsys, "leaderboard", "build", "--runs", runs, "--out", tmp_path / "x.xls", status=2
    )


def test_the_columns_are_those_of_the_contract_and_new_ones_come_after_them():
    """Readers of older files and newer ones count on names and places."""
    contract = [
        *("task", "data", "preset", "mode", "protocol", "label_fraction", "method", "backbone", "n_seeds", "target"),
        *("dice", "dice_ci_low", "dice_ci_high", "hd95_mm", "hd95_ci_low", "hd95_ci_high", "n_cases", "n_missed"),
        *("delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high", "p_value_holm", "rank", "step_ms_p50"),
        *("pretrain_seconds", "source", "run_ids", "n_test_seen", "surface_dice", "surface_dice_ci_low"),
        *("surface_dice_ci_high", "surface_tolerance_mm", "metric_policy", "note"),
    ]
    assert list(table.COLUMNS)[: len(contract)] == contract


def test_a_csv_is_read_back_as_it_was(tmp_path):
    """Six digits, and every digit of the numbers that tell rows apart."""
    for seed in (0, 1):
        write_run(tmp_path / "runs", "scratch", seed, label_fraction=1 / 3)
        write_run(tmp_path / "runs", "m", seed, dice=0.9, label_fraction=1 / 3)
    frame = built(tmp_path / "runs")
    table.write(frame, tmp_path / "board.csv")
    read = pd.read_csv(tmp_path / "board.csv", dtype={"data": str})
    assert list(read) == list(frame)
    assert (read["label_fraction"] == 1 / 3).all()
    for column in frame:
        if pd.api.types.is_numeric_dtype(read[column]):
            np.testing.assert_allclose(read[column], frame[column].astype(float), rtol=5e-6)
        else:
            assert read[column].fillna("").tolist() == frame[column].fillna("").tolist()


def test_values_are_those_of_the_runs_tables_in_pandas(tmp_path):
    places = [write_run(tmp_path, "m", seed, dice=dice) for seed, dice in ((0, 0.7), (1, 0.9))]
    frames = pd.concat([pd.read_csv(place / "cases.csv") for place in places])
    rows = built(tmp_path).set_index("target")
    for column in ("dice", "hd95_mm", "surface_dice"):
        means = frames.groupby("target")[column].mean()
        assert rows.loc[["a", "b"], column].tolist() == pytest.approx(means.tolist())
        assert rows.loc["average", column] == pytest.approx(means.mean())
    assert rows["run_ids"].str.split().map(sorted).tolist() == [sorted(place.name for place in places)] * 3
    assert (rows["n_seeds"] == 2).all()


def test_markdown_is_read_as_one_table_per_heading_with_its_cells(tmp_path):
    write_run(tmp_path, "a|b", dice=0.9)
    write_run(tmp_path, "scratch", dice=0.8)
    write_run(tmp_path, "scratch", dice=0.5, label_fraction=0.5)
    tokens = MarkdownIt("commonmark").enable("table").parse(table.markdown(built(tmp_path)))
    headings = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
    assert ["50% of the labels" in heading for heading in headings] == [True, False]
    assert sum(token.type == "table_open" for token in tokens) == 2
    shown = [
        "".join(child.content for child in after.children)
        for token, after in pairwise(tokens)
        if token.type == "td_open"
    ]
    lines = [shown[start : start + 11] for start in range(0, len(shown), 11)]
    assert [line[:4] for line in lines] == [
        ["1", "scratch", "unet", "1"],
        ["1", "a|b", "unet", "1"],
        ["2", "scratch", "unet", "1"],
    ]
    assert lines[1][10] == "103"  # 100 s of pre-training, 3 s of preparation
    headings = [
        "".join(child.content for child in after.children)
        for token, after in pairwise(tokens)
        if token.type == "th_open"
    ]
    assert headings[4:7] == ["Dice", "a", "b"]
    dice = built(tmp_path).set_index(["label_fraction", "method", "target"])["dice"]
    assert lines[1][5:7] == [f"{dice[1.0, 'a|b', target]:.4f}" for target in ("a", "b")]


def test_reported_rows_say_where_they_stand_so_that_no_two_are_the_same():
    frame = reported.rows(["btcv", "brats", "msd_liver"])
    for text, separator in ((table.markdown(frame), " | "), (table.latex(frame), " & ")):
        rows = [line for line in text.splitlines() if "hybridmim" in line]
        assert len(rows) == len(set(rows)) > 5
        assert all("Xing et al. 2023, HybridMIM" in row for row in rows)
        assert any("table I;" in row or "table I " in row for row in rows), rows[0]
        btcv = next(line for line in text.splitlines() if "spleen" in line and "liver" in line)
        assert btcv.count(separator) == 9 + 13  # ranks to costs, thirteen organs, where it stands


def test_the_best_average_stands_first_in_the_terminal(tmp_path):
    for method, dice in (("a", 0.6), ("b", 0.9), ("c", 0.75)):
        write_run(tmp_path, method, dice=dice)
    title, heading, *lines = table.render(tables(tmp_path)).splitlines()
    assert title.startswith("t, real:ffffffff")
    assert heading.split()[:2] == ["rank", "method"]
    assert [line.split()[:2] for line in lines[:3]] == [["1", "b"], ["2", "c"], ["3", "a"]]
    assert table.render([]) == "no finished runs"


def test_a_column_tells_of_test_cases_that_were_trained_on(tmp_path):
    write_run(tmp_path / "honest", "m")
    write_run(tmp_path / "other", "m", data={"n_test_seen": 2})
    headings = [table.render(tables(tmp_path / name)).splitlines()[1].split() for name in ("honest", "other")]
    assert ["seen" in heading for heading in headings] == [False, True]
    assert built(tmp_path / "other")["n_test_seen"].tolist() == [2, 2, 2]
    assert "TEST CASES WERE TRAINED OR PRE-TRAINED ON" in table.latex(built(tmp_path / "other"))


def test_a_share_of_the_headroom_stays_under_a_short_name(tmp_path):
    for seed in (0, 1, 2):
        for name, dice in (("scratch", 0.7), ("m", 0.75), ("supervised", 0.8)):
            more = {} if name == "scratch" else {"pretrain.steps": "3000", "pretrain.precision": "bf16"}
            more |= {"pretrain.lr": "0.1"} if name == "supervised" else {}
            write_run(tmp_path, name, seed, dice=dice, overrides=more, rules=2, uses_labels=name == "supervised")
    gathered = tables(tmp_path)
    whole, short = (table.render(gathered, width=width) for width in (None, 200))
    (share,) = {line for line in whole.splitlines() if " m{" in line}
    assert " 50% [" in share
    (share,) = {line for line in short.splitlines() if line.split()[1:2] == ["m"]}
    assert " 50% [" in share
    assert "(supervised{pretrain.lr=0.1} minus scratch)" in " ".join(short.split())


@pytest.mark.parametrize("width", [80, 100, 120, 400])
def test_a_table_fits_the_terminal(width, tmp_path):
    """Settings that all rows share go first, then columns; what is left out is said."""
    for seed in (0, 1, 2):
        for name, dice in (("scratch", 0.7), ("hybridmim", 0.75), ("volume_fusion", 0.8)):
            more = {} if name == "scratch" else {"pretrain.steps": "3000", "pretrain.precision": "bf16"}
            write_run(tmp_path, name, seed, dice=dice, overrides=more, rules=2)
    gathered = tables(tmp_path)
    whole, text = (table.render(gathered, width=each) for each in (None, width))
    rows = [line for line in text.splitlines() if line[:1].isdigit() or line.startswith("rank")]
    assert len(rows) == 4
    assert max(map(len, rows)) <= width
    assert "vs scratch" in text
    assert max(map(len, text.splitlines())) <= width
    if width == 400:
        assert text == whole
    else:
        said = " ".join(text.split())
        assert "left out, as the terminal is narrow (harness leaderboard build --wide shows all): ms/step" in said
        assert "3000" not in "".join(rows)
