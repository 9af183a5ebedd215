"""Figures: drawn for any name and number, and their words give the numbers that are drawn."""

import json
import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from leaderboards import board, curves, figures
from tests.leaderboards.made import tables, write_run


def test_figures_are_drawn_for_any_name_and_number(tmp_path):
    for number in range(30):
        write_run(tmp_path / "runs", f"m{number} $x_{{", dice=0.5 + number / 100)
        write_run(tmp_path / "runs", f"m{number} $x_{{", seed=1, dice=0.5 + number / 100)
    for seed in (0, 1):
        write_run(tmp_path / "runs", "scratch", seed)
    write_run(tmp_path / "runs", "m29 $x_{", dice=0.9, overrides={"method.mask_ratio": "0.6"})
    for fraction in (0.1, 0.5):
        write_run(tmp_path / "runs", "m29 $x_{", label_fraction=fraction)
    found = {path.name for each in tables(tmp_path / "runs") for path in _drawn(each, tmp_path / "figures")}
    names = ("difference", "dice", "pareto", "ranks", "step_time", "training", "settings")
    assert found == {f"{name}.{ending}" for name in names for ending in ("png", "svg")}
    (curve,) = curves.find(tables(tmp_path / "runs"))
    assert "area" in figures.efficiency(curve, tmp_path / "figures" / "curve")


def _drawn(each: board.Table, folder):
    if len(each.groups) > 1:
        said = figures.table_figures(each, folder)
        assert all(said.values())
    return list(folder.iterdir()) if folder.exists() else []


def test_a_damaged_history_draws_what_can_be_read(tmp_path):
    path = tmp_path / "history.jsonl"
    lines = ['{"stage": "finetune", "loss": 1}', "{", "[]", '{"stage": "finetune", "loss": "x"}', '{"loss": NaN}']
    path.write_text("\n".join([*lines, json.dumps({"stage": "finetune", "loss": 0.5})]))
    assert figures.read_losses(path) == {"finetune": [1.0, 0.5]}


GAINS = {"scratch": 0.7, "worse": 0.6, "better": 0.75, "supervised": 0.8}
CONTROLS = {"supervised": {"uses_labels": True}}


def timed(folder, method, dice, hours, seed=0):
    timing = {"seconds": {"pretrain": 3600.0 * hours, "method_prepare": 0.0}} if hours else {}
    write_run(folder, method, seed, dice=dice, timing=timing)


def words_of(path):
    """What an SVG says, in the order in which it is drawn."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.with_suffix(".svg").read_text())


def test_on_the_front_is_what_nothing_beats_at_no_more_cost(tmp_path):
    for method, dice, hours in (
        *(("scratch", 0.7, 0), ("fast", 0.8, 1), ("slow", 0.8, 2), ("worse", 0.75, 1), ("best", 0.9, 3)),
        ("late", 0.85, 9),
    ):
        timed(tmp_path / "runs", method, dice, hours)
    (each,) = tables(tmp_path / "runs")
    said = figures.pareto(each, each.groups, tmp_path / "pareto")
    assert said.endswith("on the Pareto front: scratch (unet), fast (unet), best (unet)")


def test_a_stacked_bar_begins_where_the_one_before_it_ends():
    axes = Figure().subplots()
    ends = figures.stacked(axes, [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], ["a", "b"])
    assert ends.tolist() == [6, 15]
    bars = [[(bar.get_x(), bar.get_width()) for bar in container] for container in axes.containers]
    assert bars == [[(0, 1), (0, 4)], [(1, 2), (4, 5)], [(3, 3), (9, 6)]]
    assert [container.get_label() for container in axes.containers] == ["forward", "backward", "update"]
    assert axes.yaxis_inverted()  # the first name stands above


def test_points_of_dice_are_the_means_with_the_ends_of_their_intervals(tmp_path, monkeypatch):
    for seed in (0, 1):
        write_run(tmp_path / "runs", "m", seed, dice=0.8)
        write_run(tmp_path / "runs", "n", seed, dice=0.6)
    (each,) = tables(tmp_path / "runs")
    axes = Figure().subplots()
    monkeypatch.setattr(figures, "save", lambda path, size, title, draw: draw(axes))
    figures.dice_points(each, each.groups, tmp_path / "dice")
    for container, group in zip(axes.containers, each.groups, strict=True):
        assert list(container.lines[0].get_ydata()) == pytest.approx(list(group.dice.mean))
        (segments,) = (lines.get_segments() for lines in container.lines[2])
        ends = np.array(segments)[:, :, 1]
        np.testing.assert_allclose(ends, np.stack([group.dice.low, group.dice.high], axis=1), atol=1e-12)


def test_the_forest_has_every_difference_its_interval_and_the_headroom(tmp_path, monkeypatch):
    for seed, name, dice in ((s, n, d) for s in (0, 1, 2) for n, d in GAINS.items()):
        write_run(tmp_path / "runs", name, seed, dice=dice + 0.001 * seed, rules=2, **CONTROLS.get(name, {}))
    (each,) = tables(tmp_path / "runs")
    axes = Figure().subplots()
    monkeypatch.setattr(figures, "save", lambda path, size, title, draw: draw(axes))
    said = figures.forest(each, each.groups, tmp_path / "forest")
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "worse (unet)",
        "better (unet)",
        "supervised (unet)",
    ]
    drawn = [float(container.lines[0].get_xdata()[0]) for container in axes.containers]
    assert drawn == pytest.approx([-0.05, 0.025, 0.05], abs=0.001)
    assert said.index("supervised") < said.index("better") < said.index("worse")
    assert "headroom on unet +0.05" in said
    by_name = {group.method: group for group in each.groups}
    (segments,) = (lines.get_segments() for lines in axes.containers[1].lines[2])
    delta = by_name["better"].delta
    np.testing.assert_allclose(segments[0][:, 0], [delta.low[-1], delta.high[-1]], atol=1e-9)


def test_names_in_figures_leave_out_what_all_rows_share(tmp_path):
    shared = {"pretrain.steps": "9"}
    for name, more in (("a", {}), ("b", {"method.x": "1"}), ("b", {"method.x": "2"})):
        write_run(tmp_path / "runs", name, overrides=shared | more, rules=2)
    write_run(tmp_path / "runs", "scratch", rules=2)
    (each,) = tables(tmp_path / "runs")
    short = each.with_short_names()
    assert {group.method for group in short.groups} == {"a", "b{x=1}", "b{x=2}", "scratch"}
    assert [group.runs for group in short.groups] == [group.runs for group in each.groups]


def test_step_times_are_medians_over_the_seeds(tmp_path):
    for seed, step in enumerate((10.0, 70.0, 20.0)):
        write_run(tmp_path / "runs", "m", seed, timing={"pretrain_step": {"step": {"p50_ms": step}}})
    write_run(tmp_path / "runs", "scratch")
    (each,) = tables(tmp_path / "runs")
    assert figures.step_times(each, each.groups, tmp_path / "t").endswith(": m (unet) 20 ms")
    assert not any("scratch" in word for word in words_of(tmp_path / "t"))


def test_the_loss_is_the_mean_over_seeds_smoothed_over_a_twenty_fifth(tmp_path):
    """Of 100 steps that rise by 1, and of another seed's that rise by 3, the last four are averaged."""
    for seed, slope in enumerate((1, 3)):
        place = write_run(tmp_path / "runs", "m", seed)
        lines = [{"stage": "finetune", "step": step, "loss": slope * step} for step in range(1, 101)]
        (place / "history.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (each,) = tables(tmp_path / "runs")
    said = figures.training(each, each.groups, tmp_path / "training")
    assert said.endswith(f"m (unet) {2 * np.mean([97, 98, 99, 100]):.3f}")


def test_of_many_rows_the_best_are_drawn(tmp_path):
    for number in range(figures.MOST + 3):
        write_run(tmp_path / "runs", f"m{number:02}", dice=0.5 + number / 100, cases=3)
    (each,) = tables(tmp_path / "runs")
    figures.table_figures(each, tmp_path / "figures")
    shown = {word.split()[0] for word in words_of(tmp_path / "figures" / "dice") if word.startswith("m")}
    assert shown == {f"m{number:02}" for number in range(3, figures.MOST + 3)}


def test_who_is_always_first_is_so_in_all_resamples(tmp_path):
    for method, dice in (("best", 0.9), ("second", 0.6), ("third", 0.3)):
        for seed in (0, 1):
            write_run(tmp_path / "runs", method, seed, dice=dice)
    (each,) = tables(tmp_path / "runs")
    said = figures.rank_stability(each, each.groups, tmp_path / "ranks")
    assert said.endswith("best (unet) 100% at rank 1, second (unet) 100% at rank 2, third (unet) 100% at rank 3")
    assert words_of(tmp_path / "ranks").count("100%") == 3


def test_the_same_runs_give_the_same_bytes(tmp_path):
    """A published site does not change where nothing was measured anew."""
    for method, dice in (("m", 0.9), ("n", 0.6)):
        write_run(tmp_path / "runs", method, dice=dice)
    for folder in ("one", "other"):
        (each,) = tables(tmp_path / "runs")
        figures.table_figures(each, tmp_path / folder)
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len(names) >= 8
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes(), name


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a $x$ b", r"a \$x\$ b"),
        ("a\nb", "a b"),
        ("x" * 44, "x" * 44),
        ("x" * 45, "x" * 43 + "…"),
        ("$" * 44, r"\$" * 44),
    ],
)
def test_names_are_short_and_no_formula(text, shown):
    assert figures.plain(text) == shown


@pytest.mark.parametrize("number", [1, 3, 10, 11, 24])
def test_there_is_a_colour_for_each_and_ten_differ(number):
    found = figures.colours(number)
    assert len(found) >= number
    assert len(set(found[:number])) == min(number, 10)
