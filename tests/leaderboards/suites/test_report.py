"""The report of a suite as text and as files."""

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from leaderboards import records
from leaderboards.suites.report import Report, tables_of_methods
from tests.leaderboards.made import tables, write_dice, write_run
from tests.leaderboards.suites.test_consensus import suite_of


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return Report("made-v1", suite_of(tmp_path_factory.mktemp("runs")))


def test_the_text_has_the_tables_the_consensus_and_what_it_is_worth(report):
    text = report.text()
    assert text.count("vs scratch [95 % CI]") == 3
    lines = text[text.index("made-v1: consensus over 3 tables") :].splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["better", "scratch", "worse"]
    assert "3 tasks: the ranks say little about other tasks" in text
    assert "Friedman p = 0.0498" in text
    assert "(unet)" not in "\n".join(lines[2:5])  # all rows share the backbone


def test_the_terminal_is_not_overrun(report):
    text = report.text(80)
    assert max(map(len, text.splitlines())) <= 80
    assert "left out, as the terminal is narrow" in text


def test_wins_and_losses_are_significant_differences_from_scratch(report):
    frame = report.consensus_frame().set_index("method")
    tested = [claim for claim in report.against_scratch if claim.p < 0.05]
    assert frame.loc["better", "wins"] == sum(claim.first == "better (unet)" for claim in tested)
    assert frame.loc["worse", "losses"] == sum(claim.second == "worse (unet)" for claim in tested)
    assert frame.loc["better", "wins"] + frame.loc["worse", "losses"] > 0
    assert frame.loc["better", "losses"] == frame.loc["worse", "wins"] == 0
    assert np.isnan(frame.loc["scratch", "wins"])
    assert frame.loc["worse", "delta_dice_vs_scratch"] < 0 < frame.loc["better", "delta_dice_vs_scratch"]
    assert frame.loc["worse", "delta_ci_low"] < frame.loc["worse", "delta_dice_vs_scratch"]
    assert frame.loc["worse", "probability_not_better"] > 0.9 > 0.1 > frame.loc["better", "probability_not_better"]
    assert frame.loc["scratch", "hours"] == pytest.approx(9 * 66 / 3600)  # as `made.timing` says


def test_the_files_hold_the_same_numbers(report, tmp_path):
    paths = report.write(tmp_path)
    assert {path.name for path in paths} == {
        *("report.md", "tables.csv", "consensus.csv", "claims.csv"),
        *("critical_difference.png", "critical_difference.svg"),
    }
    claims = pd.read_csv(tmp_path / "claims.csv")
    assert len(claims) == 3 * 3 + 3
    assert (claims["task"] == "all").sum() == 3
    assert claims["difference"].tolist() == pytest.approx([claim.difference for claim in report.pairs], abs=1e-6)
    consensus = pd.read_csv(tmp_path / "consensus.csv")
    assert consensus["mean_rank"].tolist() == pytest.approx(report.consensus.mean_rank.tolist())
    text = (tmp_path / "report.md").read_text()
    assert "![Mean ranks, the best first: better 1.00" in text
    assert "(critical_difference.png)" in text
    with Image.open(tmp_path / "critical_difference.png") as picture:
        assert len(picture.getcolors(1 << 24)) > 10


def test_names_cannot_act_as_formulas_or_markup(tmp_path):
    names = ("scratch", "=cmd|' /c calc'!A1", "<b>|x")
    made = suite_of(tmp_path / "runs", tasks=2, methods=names)
    Report("made-v1", made).write(tmp_path / "out")
    cells = pd.read_csv(tmp_path / "out" / "claims.csv")[["first", "second"]].to_numpy().ravel()
    assert {cell for cell in cells if "cmd" in cell} == {"'=cmd|' /c calc'!A1"}
    assert "<b>" not in (tmp_path / "out" / "report.md").read_text()


def test_nothing_in_common_is_said(tmp_path):
    for seed in range(2):
        write_dice(tmp_path, "one", seed, np.full(8, 0.8), task="a")
        write_dice(tmp_path, "two", seed, np.full(8, 0.8), task="b")
    text = Report("made-v1", tables(tmp_path)).text()
    assert "made-v1: no method is in every table" in text
    assert "one is not in the consensus: no run for b" in text


def test_phantoms_are_named(tmp_path):
    for task in ("a", "b"):
        for method in ("scratch", "other"):
            write_dice(tmp_path, method, 0, np.full(8, 0.8), task=task, data={"source": "phantom"})
    text = Report("made-v1", tables(tmp_path)).text()
    assert "PHANTOM DATA in it" in text
    assert (
        "no intervals of the mean ranks: other (unet) on a: one seed, whose luck cannot be told from the method" in text
    )


def test_controls_of_generic_methods_make_no_table_of_their_own(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, rules=2)
        write_run(tmp_path, "m", seed, rules=2, mode="generic")
    write_run(tmp_path, "scratch", preset="paper", rules=2)  # nothing else is in its table
    runs, _ = records.load_runs([tmp_path])
    tables = tables_of_methods(runs)
    assert [(table.shared("mode"), len(table.groups)) for table in tables] == [("generic", 2), ("task-specific", 1)]


def test_what_is_written_has_the_warnings_of_the_tables(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs", "scratch", seed)
        write_run(tmp_path / "runs", "m", seed, final_soft_dice=0.1)
    runs, _ = records.load_runs([tmp_path / "runs"])
    Report("made-v1", tables_of_methods(runs)).write(tmp_path / "report")
    assert "NOT CONVERGED" in (tmp_path / "report" / "report.md").read_text()
