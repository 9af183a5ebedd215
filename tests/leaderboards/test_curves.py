"""Dice over the share of the labels: which curves there are, and the area under them."""

import numpy as np
import pandas as pd
import pytest

from leaderboards import curves
from tests.leaderboards.made import called, tables, three_fractions, write_run


@pytest.fixture
def runs(tmp_path):
    return three_fractions(tmp_path / "runs")


def test_efficiency(runs, capsys, tmp_path):
    said = called(capsys, "leaderboard", "efficiency", "--runs", runs)
    assert "area [95 % CI]" in said
    assert said.index("better (unet)") < said.index("scratch (unet)")
    write_run(tmp_path / "one", "scratch")
    assert "two label fractions" in called(capsys, "leaderboard", "efficiency", "--runs", tmp_path / "one", status=2)


def test_curves_over_other_fractions_are_not_compared(runs, capsys):
    write_run(runs, "short", label_fraction=0.1)
    write_run(runs, "short", label_fraction=0.5)
    assert "(other label fractions: not comparable)" in called(capsys, "leaderboard", "efficiency", "--runs", runs)


def test_the_area_is_numpys_under_the_means_of_the_cases(tmp_path):
    """Over the range of the fractions, so that it is a Dice again."""
    means = {}
    for fraction, dice in ((0.1, 0.5), (0.25, 0.65), (1.0, 0.8)):
        frame = pd.read_csv(write_run(tmp_path, "m", dice=dice, label_fraction=fraction) / "cases.csv")
        means[fraction] = frame.groupby("target")["dice"].mean().mean()
    (found,) = curves.find(tables(tmp_path))
    (curve,) = found.curves
    assert (curve.name, curve.points) == ("m (unet)", (0.1, 0.25, 1.0))
    value, low, high = curve.area
    assert value == pytest.approx(np.trapezoid(list(means.values()), list(means)) / 0.9)
    assert low < value < high


def test_curves_share_everything_but_the_fraction(tmp_path):
    """Two presets are two sets, and a method with one fraction has no curve."""
    for fraction in (0.5, 1.0):
        write_run(tmp_path, "a", label_fraction=fraction)
        write_run(tmp_path, "b", label_fraction=fraction)
        write_run(tmp_path, "a", label_fraction=fraction, preset="paper")
    write_run(tmp_path, "once")
    write_run(tmp_path, "split", label_fraction=0.5)
    write_run(tmp_path, "split", preset="paper")
    found = {each.title: [curve.name for curve in each.curves] for each in curves.find(tables(tmp_path))}
    assert found == {
        "t, real:ffffffff, preset demo, task-specific, finetune": ["a (unet)", "b (unet)"],
        "t, real:ffffffff, preset paper, task-specific, finetune": ["a (unet)"],
    }


def test_the_largest_area_stands_first_and_what_is_missing_is_a_dash(tmp_path):
    for fraction in (0.1, 0.5, 1.0):
        write_run(tmp_path, "low", dice=0.6, label_fraction=fraction)
        if fraction > 0.1:
            write_run(tmp_path, "high", dice=0.9, label_fraction=fraction)
    (found,) = curves.find(tables(tmp_path))
    _, heading, first, second = str(found).splitlines()
    assert heading.split()[:4] == ["10%", "50%", "100%", "area"]
    assert first.split()[:3] == ["high", "(unet)", "-"]
    assert first.endswith("(other label fractions: not comparable)")
    assert second.split()[:2] == ["low", "(unet)"]
    assert "-" not in second.split()


def test_no_fraction_no_curve(tmp_path):
    write_run(tmp_path, "m")
    assert curves.find(tables(tmp_path)) == []


def test_the_table_shows_the_average_over_targets_at_each_fraction_and_the_best_curve_first(runs):
    (found,) = curves.find(tables(runs))
    lines = str(found).splitlines()
    assert lines[1].split()[:3] == ["10%", "50%", "100%"]
    for line, method, first, slope in ((lines[2], "better", 0.7, 0.15), (lines[3], "scratch", 0.6, 0.2)):
        name, _, *numbers = line.split()
        assert name == method
        frame = pd.read_csv(next(runs.glob(f"*-{method}-*")) / "cases.csv")
        noise = frame[frame["target"] == "a"]["dice"].mean() - frame[frame["target"] == "a"]["dice"].round(1).mean()
        # Target b has a Dice of 0.5 in all cases that have it.
        expected = [(first + slope * fraction + 0.5) / 2 for fraction in (0.1, 0.5, 1.0)]
        assert [float(number) for number in numbers[:3]] == pytest.approx(expected, abs=0.01 + abs(noise))
        area = np.trapezoid([float(number) for number in numbers[:3]], [0.1, 0.5, 1.0]) / 0.9
        assert float(numbers[3]) == pytest.approx(area, abs=1e-3)


def budget_run(folder, method, seed, steps=None, dice=0.8, finetune=400, **changes):
    """A run under rules 2; `steps` of pre-training, or none for a method that is not pre-trained."""
    overrides = {} if steps is None else {"pretrain.steps": str(steps)}
    overrides |= {"finetune.steps": str(finetune)} if finetune != 400 else {}
    config = {"pretrain": {"steps": steps or 200}, "finetune": {"steps": finetune}}
    write_run(folder, method, seed, dice, overrides=overrides, rules=2, config=config, **changes)


def test_curves_over_pre_training_begin_with_the_control(tmp_path, capsys):
    for seed in (0, 1):
        budget_run(tmp_path, "scratch", seed, dice=0.6)
        budget_run(tmp_path, "m", seed, 500, dice=0.7)
        budget_run(tmp_path, "m", seed, 1500, dice=0.8)
        budget_run(tmp_path, "other", seed, 1500, dice=0.5)
    (found,) = curves.find(tables(tmp_path), "pretrain.steps")
    assert {curve.name: curve.points for curve in found.curves} == {
        "m (unet)": (0, 500, 1500),
        "other (unet)": (0, 1500),
    }
    first = found.curves[0].groups[0]
    assert first.method == "scratch"
    assert len(first.runs) == 2
    said = called(capsys, "leaderboard", "efficiency", "--over", "pretrain.steps", "--runs", tmp_path)
    assert said.splitlines()[1].split()[:3] == ["0", "500", "1500"]


def test_curves_over_fine_tuning_join_the_tables_of_its_budgets(tmp_path):
    for steps, dice in ((100, 0.5), (400, 0.7), (2000, 0.8)):
        budget_run(tmp_path, "scratch", 0, dice=dice, finetune=steps)
    budget_run(tmp_path, "scratch", 0, finetune=2000, label_fraction=0.5)
    (found,) = curves.find(tables(tmp_path), "finetune.steps")
    (curve,) = found.curves
    assert (curve.name, curve.points) == ("scratch (unet)", (100, 400, 2000))
    assert found.title.endswith("finetune, 100% of the labels")


def test_an_unknown_axis_is_refused_with_those_that_there_are(runs, capsys):
    said = called(capsys, "leaderboard", "efficiency", "--over", "steps", "--runs", runs, status=2)
    assert "pretrain.steps" in said
    said = called(capsys, "leaderboard", "efficiency", "--over", "finetune.steps", "--runs", runs, status=2)
    assert "--set finetune.steps=1000" in said


def test_a_second_row_at_a_point_is_named_and_left_out(tmp_path, capsys):
    """The preset's 200 steps, and 200 that were asked for, are two rows of one table."""
    for steps, dice in ((None, 0.6), (200, 0.7), (400, 0.8)):
        overrides = {} if steps is None else {"pretrain.steps": str(steps)}
        write_run(tmp_path, "m", dice=dice, overrides=overrides, rules=2, config={"pretrain": {"steps": steps or 200}})
    said = called(capsys, "leaderboard", "efficiency", "--over", "pretrain.steps", "--runs", tmp_path)
    assert "left out, as another row has the same point: m{pretrain.steps=200} (unet), 200" in said


@pytest.mark.parametrize("config", [[], {"pretrain": []}, {"pretrain": {"steps": True}}, {"pretrain": {"steps": -5}}])
def test_a_foreign_configuration_has_no_point(tmp_path, config):
    write_run(tmp_path, "m", config=config, rules=2)
    write_run(tmp_path, "m", overrides={"pretrain.steps": "9"}, config={"pretrain": {"steps": 10**400}}, rules=2)
    assert curves.find(tables(tmp_path), "pretrain.steps") == []


def test_two_draws_of_the_labelled_cases_are_two_sets_with_their_own_titles(tmp_path):
    for subset in ("per seed", "by label seed 0"):
        for fraction in (0.1, 0.5):
            write_run(tmp_path, "m", label_fraction=fraction, rules=2, data={"label_subset": subset})
    titles = [each.title for each in curves.find(tables(tmp_path))]
    assert sorted(title.rpartition(", ")[2] for title in titles) == ["drawn by label seed 0", "drawn per seed"]


def test_the_area_of_few_cases_has_no_interval_either(tmp_path, capsys):
    for seed in (0, 1):
        for fraction in (0.5, 1.0):
            write_run(tmp_path, "scratch", seed, cases=4, label_fraction=fraction)
    said = called(capsys, "leaderboard", "efficiency", "--runs", tmp_path)
    row = next(line for line in said.splitlines() if line.startswith("scratch"))
    assert len(row.split()) == 5, "name, backbone, two points, the area alone"


def test_points_of_other_seeds_are_named(tmp_path, capsys):
    for seed, fraction in ((0, 0.5), (1, 0.5), (0, 1.0)):
        write_run(tmp_path, "scratch", seed, label_fraction=fraction)
    said = called(capsys, "leaderboard", "efficiency", "--runs", tmp_path)
    assert "scratch (unet) has other seeds at each point (50%: 0, 1; 100%: 0): do not compare them" in said
    write_run(tmp_path, "scratch", 1, label_fraction=1.0)
    assert "other seeds" not in called(capsys, "leaderboard", "efficiency", "--runs", tmp_path)
