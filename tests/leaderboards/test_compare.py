"""Two methods, or two runs, case by case."""

import numpy as np
import pandas as pd
import pytest

from leaderboards import compare, records
from leaderboards.board import NotComparableError
from tests.leaderboards.made import called, sign, tables, three_fractions, write_run


@pytest.fixture
def runs(tmp_path):
    return three_fractions(tmp_path / "runs")


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


def test_settings_may_be_left_out_where_one_method_has_the_name(capsys, tmp_path):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "m", rules=2, overrides={"method.ratio": "0.6"})
    write_run(tmp_path, "scratch", rules=2)
    assert "A = m{ratio=0.6} (unet)" in called(capsys, "leaderboard", "compare", "m", "scratch", "--runs", tmp_path)
    write_run(tmp_path, "m", rules=2, overrides={"method.ratio": "0.7"})
    said = called(capsys, "leaderboard", "compare", "m", "scratch", "--runs", tmp_path, status=2)
    assert "'m' is 2 methods here: give one of 'm{ratio=0.6}', 'm{ratio=0.7}'" in said
    write_run(tmp_path, "m", rules=2)
    assert "A = m (unet)" in called(capsys, "leaderboard", "compare", "m", "scratch", "--runs", tmp_path)


def test_the_p_value_is_the_tables_before_its_correction(capsys, tmp_path):
    """The table pools the luck of its seeds over all rows, and with one method Holm corrects nothing."""
    for seed in range(3):
        write_run(tmp_path, "scratch", seed, 0.8 + 0.001 * seed)
        write_run(tmp_path, "m", seed, 0.83 - 0.02 * seed, final_soft_dice=0.1)
        write_run(tmp_path, "untrained", seed, 0.8 - 0.05 * seed)
    (table,) = tables(tmp_path)
    row = next(group for group in table.groups if group.method == "m")
    (comparison,) = compare.compare_methods([table], "m", "scratch")
    assert comparison.summary["p"].tolist() == pytest.approx(row.p.tolist(), nan_ok=True)
    assert "NOT CONVERGED" in called(capsys, "leaderboard", "compare", "m", "scratch", "--runs", tmp_path)
    assert "NOT CONVERGED" in called(capsys, "leaderboard", "ranks", "--runs", tmp_path)


def test_a_difference_over_fewer_seeds_is_said(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "scratch", seed)
    write_run(tmp_path, "m", 1)
    (table,) = tables(tmp_path)
    notes = {group.method: group.note for group in table.groups}
    assert notes["m"].endswith("vs scratch: over seed 1, which both have")
    assert notes["scratch"] == "the control"


def test_compare_two_runs(capsys, tmp_path):
    first, second = write_run(tmp_path, "scratch"), write_run(tmp_path, "better", dice=0.9)
    said = called(capsys, "leaderboard", "compare", second.name, first, "--runs", tmp_path)
    assert "no p-value: one seed" in said
    assert "0.1000" in said


def noisy(folder, method, seeds, dice, cases=12):
    """Runs whose cases differ by more than a shift."""
    for seed in seeds:
        place = write_run(folder, method, seed, dice=dice, cases=cases)
        frame = pd.read_csv(place / "cases.csv")
        rng = np.random.default_rng([seed, len(method)])
        scored = frame["status"] == "scored"
        frame.loc[scored, "dice"] = (frame["dice"] + rng.normal(0, 0.03, len(frame)))[scored].clip(0, 0.99).round(6)
        frame.loc[scored, "hd95_mm"] = rng.uniform(1, 9, len(frame)).round(4)[scored]
        frame.to_csv(place / "cases.csv", index=False)
        sign(place)


def read(folder, method, seeds):
    """`cases.csv` of a method's runs, the mean over seeds."""
    frames = [pd.read_csv(path / "cases.csv") for path in folder.glob(f"*-{method}-*") if read_seed(path) in seeds]
    assert len(frames) == len(seeds)
    return pd.concat(frames).groupby(["case", "target"])[["dice", "hd95_mm"]].mean()


def read_seed(path):
    return records.load_run(path).seed


def test_the_numbers_are_those_of_the_runs_own_tables_in_pandas(tmp_path):
    """Over the seeds that both have, whichever others there are."""
    noisy(tmp_path, "better", (0, 1, 2), 0.85)
    noisy(tmp_path, "scratch", (1, 2, 3), 0.8)
    (found,) = compare.compare_methods(tables(tmp_path), "better", "scratch")
    assert found.seeds == [1, 2]
    mine, theirs = (read(tmp_path, method, (1, 2)) for method in ("better", "scratch"))
    cases = found.cases[found.cases["target"] != "average"].set_index(["case", "target"]).sort_index()
    for column, wanted in (("dice_a", mine["dice"]), ("dice_b", theirs["dice"]), ("hd95_a", mine["hd95_mm"])):
        np.testing.assert_allclose(cases[column], wanted.sort_index(), rtol=1e-12)
    np.testing.assert_allclose(cases["difference"], (mine["dice"] - theirs["dice"]).sort_index(), rtol=1e-9)
    average = found.cases[found.cases["target"] == "average"].set_index("case").sort_index()
    np.testing.assert_allclose(average["dice_a"], mine["dice"].groupby("case").mean(), rtol=1e-12)
    summary = found.summary.set_index("target")
    for target in ("a", "b"):
        change = (mine["dice"] - theirs["dice"]).xs(target, level="target").dropna()
        row = summary.loc[target]
        assert row["difference"] == pytest.approx(change.mean())
        assert row["dice_b"] == pytest.approx(theirs["dice"].xs(target, level="target").mean())
        assert (row["wins"], row["ties"], row["losses"]) == ((change > 0).sum(), 0, (change < 0).sum())
        assert row["ci_low"] < row["difference"] < row["ci_high"]
    assert summary.loc["average", "difference"] == pytest.approx(summary.loc[["a", "b"], "difference"].mean())


def test_the_other_way_round_everything_has_the_other_sign(tmp_path):
    noisy(tmp_path, "better", (0, 1), 0.85)
    noisy(tmp_path, "scratch", (0, 1), 0.8)
    (one,), (other,) = (
        compare.compare_methods(tables(tmp_path), *pair) for pair in (("better", "scratch"), ("scratch", "better"))
    )
    np.testing.assert_allclose(one.cases["difference"], -other.cases["difference"])
    for mine, theirs in (("difference", "difference"), ("ci_low", "ci_high")):
        np.testing.assert_allclose(one.summary[mine], -other.summary[theirs], rtol=1e-6)
    assert one.summary["wins"].tolist() == other.summary["losses"].tolist()
    np.testing.assert_allclose(one.summary["p"], other.summary["p"])


def test_the_p_value_of_a_pair_is_not_corrected(tmp_path):
    """Eight cases that are all better by the same: twice 2 to the power of -8, however many methods the table has."""
    for seed in (0, 1):
        for number, method in enumerate(("scratch", "better", "third", "fourth")):
            write_run(tmp_path, method, seed, dice=0.6 + 0.1 * number)
    (found,) = compare.compare_methods(tables(tmp_path), "better", "scratch")
    assert found.summary.set_index("target").loc["a", "p"] == pytest.approx(2 / 2**8)
    assert "no correction" in found.note


def test_without_a_seed_in_common_there_is_nothing_to_compare(tmp_path):
    noisy(tmp_path, "better", (0, 1), 0.85)
    noisy(tmp_path, "scratch", (2, 3), 0.8)
    with pytest.raises(NotComparableError, match=r"better \(unet\) and scratch \(unet\) have no seed in common"):
        compare.compare_methods(tables(tmp_path), "better", "scratch")


def test_of_many_cases_the_five_that_lose_most_and_that_win_most_are_shown(tmp_path):
    noisy(tmp_path, "better", (0, 1), 0.82)
    noisy(tmp_path, "scratch", (0, 1), 0.8)
    (found,) = compare.compare_methods(tables(tmp_path), "better", "scratch")
    average = found.cases[found.cases["target"] == "average"].set_index("case")["difference"].sort_values()
    shown = str(found).partition("with the highest:\n")[2].partition("\n\n")[0].splitlines()[1:]
    assert [line.split()[0] for line in shown] == [*average.index[:5], *average.index[-5:]]


def test_ties_are_counted_apart_and_nan_is_none_of_the_three(tmp_path):
    """By hand: of eight cases, a is better in three, equal in four and worse in one; b is empty in the first case."""
    for method, dice in (("better", [0.9, 0.9, 0.9, 0.5, 0.5, 0.5, 0.5, 0.2]), ("scratch", [0.5] * 7 + [0.3])):
        place = write_run(tmp_path, method)
        frame = pd.read_csv(place / "cases.csv")
        frame.loc[frame["target"] == "a", "dice"] = dice
        frame.to_csv(place / "cases.csv", index=False)
        sign(place)
    (found,) = compare.compare_methods(tables(tmp_path), "better", "scratch")
    summary = found.summary.set_index("target")
    assert summary.loc["a", ["wins", "ties", "losses"]].tolist() == [3, 4, 1]
    assert summary.loc["b", ["wins", "ties", "losses"]].tolist() == [0, 7, 0]
    assert summary.loc["average", ["wins", "ties", "losses"]].tolist() == [3, 4, 1]


def test_methods_are_compared_on_each_backbone_that_both_have_and_never_across(tmp_path):
    for method, backbone, dice in (
        ("better", "unet", 0.85),
        ("better", "unetr", 0.75),
        ("scratch", "unet", 0.8),
        ("scratch", "unetr", 0.6),
        ("scratch", "segresnet", 0.9),
    ):
        write_run(tmp_path, method, dice=dice, backbone=backbone)
    found = compare.compare_methods(tables(tmp_path), "better", "scratch")
    assert [each.names for each in found] == [
        ("better (unet)", "scratch (unet)"),
        ("better (unetr)", "scratch (unetr)"),
    ]
    differences = [each.summary.set_index("target").loc["a", "difference"] for each in found]
    assert differences == [pytest.approx(0.05), pytest.approx(0.15)]
    assert [each.title.rpartition("backbone ")[2] for each in found] == ["unet", "unetr"]


def test_the_text_says_which_is_which(tmp_path):
    """A is the first; differences are A minus B."""
    for seed in (0, 1):
        write_run(tmp_path, "better", seed, dice=0.9)
        write_run(tmp_path, "scratch", seed, dice=0.8)
    (found,) = compare.compare_methods(tables(tmp_path), "better", "scratch")
    text = str(found)
    assert "A = better (unet)\nB = scratch (unet)\nseeds 0, 1" in text
    (row,) = (line.split() for line in text.splitlines() if line.split()[:1] == ["a"])
    assert [float(value) for value in row[1:5]] == pytest.approx([0.9, 0.8, 2.0, 2.0], abs=0.03)
    assert float(row[5]) == pytest.approx(0.1)


def test_methods_without_a_seed_in_common_are_not_compared(capsys, tmp_path):
    write_run(tmp_path, "scratch", 1)
    write_run(tmp_path, "m", 0)
    said = called(capsys, "leaderboard", "compare", "m", "scratch", "--runs", tmp_path, status=2)
    assert "have no seed in common" in said
