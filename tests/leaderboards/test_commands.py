"""`harness leaderboard`: build, merge, compare, ranks, efficiency, as a user calls them."""

import json

import pandas as pd
import pytest

from harness.cli.main import main
from tests.leaderboards.made import write_run


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1, 2):
        for fraction in (0.1, 0.5, 1.0):
            write_run(tmp_path / "runs", "scratch", seed, dice=0.6 + 0.2 * fraction, label_fraction=fraction)
            write_run(tmp_path / "runs", "better", seed, dice=0.7 + 0.15 * fraction, label_fraction=fraction)
    return tmp_path / "runs"


def called(capsys, *words, status=0):
    assert main([str(word) for word in words]) == status
    out, err = capsys.readouterr()
    if status == 2:
        assert all(line.startswith("harness: ") for line in err.splitlines())
    return out + err


def test_build_writes_every_format(runs, capsys, tmp_path):
    places = [tmp_path / f"board.{ending}" for ending in ("csv", "md", "tex")]
    said = called(capsys, "leaderboard", "build", "--runs", runs, *(w for place in places for w in ("--out", place)))
    assert "18 runs, 18 rows" in said
    assert all(place.stat().st_size > 500 for place in places)
    assert "due is .csv, .md, .tex" in called(
        capsys, "leaderboard", "build", "--runs", runs, "--out", tmp_path / "x.xls", status=2
    )


def test_folders_of_several_labs_are_merged(capsys, tmp_path):
    write_run(tmp_path / "a", "scratch")
    write_run(tmp_path / "b", "better")
    out = tmp_path / "board.csv"
    called(capsys, "leaderboard", "build", "--from", tmp_path / "a", "--from", tmp_path / "b", "--out", out)
    assert set(pd.read_csv(out)["method"]) == {"scratch", "better"}


def test_a_conflict_between_labs_is_named_and_nothing_is_overwritten(capsys, tmp_path):
    write_run(tmp_path / "a", "scratch")
    place = write_run(tmp_path / "b", "scratch")
    write_run(tmp_path / "b", "better")
    record = json.loads((place / "record.json").read_text()) | {"finished": "2027-01-01T00:00:00Z"}
    (place / "record.json").write_text(json.dumps(record))
    words = ["leaderboard", "build", "--from", tmp_path / "a", "--from", tmp_path / "b", "--out", tmp_path / "o.csv"]
    said = called(capsys, *words, status=2)
    assert "is also in" in said
    assert str(tmp_path / "a") in said
    assert set(pd.read_csv(tmp_path / "o.csv")["method"]) == {"better"}
    assert json.loads((place / "record.json").read_text()) == record


def test_compare_two_methods_case_by_case(runs, capsys, tmp_path):
    out = tmp_path / "cases.csv"
    said = called(capsys, "leaderboard", "compare", "better", "scratch", "--runs", runs, "--out", out)
    assert said.count("A = better (unet)") == 3
    frame = pd.read_csv(out)
    assert len(frame) == 3 * 8 * 3
    row = frame[(frame["case"] == "c3") & (frame["target"] == "a")].iloc[-1]
    assert row["difference"] == pytest.approx(row["dice_a"] - row["dice_b"])


def test_compare_refuses_what_differs_and_says_in_which_field(capsys, tmp_path):
    first = write_run(tmp_path, "scratch")
    second = write_run(tmp_path, "better", preset="paper")
    said = called(capsys, "leaderboard", "compare", first.name, second.name, "--runs", tmp_path, status=2)
    assert "differ in preset (demo and paper)" in said
    said = called(capsys, "leaderboard", "compare", "better", "scratch", "--runs", tmp_path, status=2)
    assert "share no table: they differ in preset" in said
    said = called(capsys, "leaderboard", "compare", "better", "worse", "--runs", tmp_path, status=2)
    assert "unknown method among these runs 'worse': known: better, scratch" in said
    said = called(capsys, "leaderboard", "compare", "beter", "scratch", "--runs", tmp_path, status=2)
    assert "did you mean 'better'?" in said
    assert "with itself" in called(capsys, "leaderboard", "compare", "a", "a", "--runs", tmp_path, status=2)


def test_compare_two_runs(capsys, tmp_path):
    first, second = write_run(tmp_path, "scratch"), write_run(tmp_path, "better", dice=0.9)
    said = called(capsys, "leaderboard", "compare", second.name, first, "--runs", tmp_path)
    assert "no p-value: one seed" in said
    assert "0.1000" in said


def test_ranks(runs, capsys):
    said = called(capsys, "leaderboard", "ranks", "--runs", runs)
    assert "Kendall's tau" in said
    assert "100%" in said


def test_efficiency(runs, capsys, tmp_path):
    said = called(capsys, "leaderboard", "efficiency", "--runs", runs)
    assert "area [95 % CI]" in said
    assert said.index("better (unet)") < said.index("scratch (unet)")
    write_run(tmp_path / "one", "scratch")
    assert "two label fractions" in called(capsys, "leaderboard", "efficiency", "--runs", tmp_path / "one", status=2)


def test_curves_over_other_fractions_are_not_compared(runs, capsys):
    write_run(runs, "short", label_fraction=0.1)
    write_run(runs, "short", label_fraction=0.5)
    assert "(other fractions: not comparable)" in called(capsys, "leaderboard", "efficiency", "--runs", runs)


def test_reported_results_stand_beside(capsys, tmp_path):
    write_run(tmp_path, task="btcv")
    said = called(capsys, "leaderboard", "build", "--runs", tmp_path, "--with-reported")
    assert "reported elsewhere" in said
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    assert set(frame["source"]) == {"measured", "reported"}
    assert frame.loc[frame["source"] == "reported", ["rank", "p_value_holm"]].isna().all().all()
    assert called(capsys, "leaderboard", "validate", tmp_path / "leaderboard.csv", "--runs", tmp_path)
    write_run(tmp_path / "other")
    assert "nothing is reported for t;" in called(
        capsys, "leaderboard", "build", "--runs", tmp_path / "other", "--with-reported"
    )


def test_a_folder_without_runs_is_named(capsys, tmp_path):
    assert "no finished run" in called(capsys, "leaderboard", "build", "--runs", tmp_path, status=2)
    assert "is not a folder" in called(capsys, "leaderboard", "build", "--runs", tmp_path / "x", status=2)
