"""What is compared with what, and why not with the rest."""

import pandas as pd
import pytest
from scipy import stats

from leaderboards import board, records, table
from tests.leaderboards.made import built, called, tables, three_fractions, write_run


def test_difference_to_scratch_is_paired_and_empty_for_scratch(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, dice=0.8)
        write_run(tmp_path, "better", seed, dice=0.85)
    frame = built(tmp_path).set_index(["method", "target"])
    row = frame.loc["better", "a"]
    assert row["delta_dice_vs_scratch"] == pytest.approx(0.05)
    # The per-case noise is the same in both, so the paired interval has no width; the unpaired one has.
    assert row["delta_ci_low"] == pytest.approx(row["delta_ci_high"])
    assert row["dice_ci_high"] - row["dice_ci_low"] > 0.01
    assert frame.loc["better", "average"]["delta_dice_vs_scratch"] == pytest.approx(0.025)
    assert pd.isna(frame.loc["scratch", "a"]["delta_dice_vs_scratch"])
    assert (row["rank"], frame.loc["scratch", "a"]["rank"]) == (1, 2)


def test_one_seed_has_no_interval_of_a_difference_and_few_cases_none_at_all(tmp_path):
    """Two seeds of one method would differ as much; a bootstrap over the cases of one training knows nothing of that."""
    for folder, cases in (("many", 8), ("few", 5)):
        write_run(tmp_path / folder, "scratch", cases=cases)
        write_run(tmp_path / folder, "better", cases=cases, dice=0.85)
        rows = built(tmp_path / folder).set_index(["method", "target"])
        row = rows.loc["better", "a"]
        assert row["delta_dice_vs_scratch"] == pytest.approx(0.05)
        assert pd.isna(row["delta_ci_low"])
        assert pd.isna(row["delta_ci_high"])
        assert pd.isna(row["dice_ci_low"]) == (cases == 5)
        assert pd.isna(row["hd95_ci_high"]) == (cases == 5)
    for seed in (1, 2):
        write_run(tmp_path / "few", "scratch", seed, cases=5)
        write_run(tmp_path / "few", "better", seed, cases=5, dice=0.85)
    assert built(tmp_path / "few")[["dice_ci_low", "delta_ci_low"]].isna().all(axis=None)


@pytest.mark.parametrize(
    "other", [{"preset": "paper"}, {"fingerprint": "e" * 32}, {"overrides": {"finetune.steps": "9"}}]
)
def test_what_differs_shares_no_table(tmp_path, other):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "better", dice=0.9, **other)
    frame = built(tmp_path)
    assert frame["delta_dice_vs_scratch"].isna().all()
    assert (frame["rank"] == 1).all()


def test_changed_method_settings_are_another_row(tmp_path):
    write_run(tmp_path, "m")
    write_run(tmp_path, "m", overrides={"method.mask_ratio": "0.6"})
    assert set(built(tmp_path)["method"]) == {"m", "m{mask_ratio=0.6}"}


def test_p_value_needs_seeds_and_cases(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "few", "scratch", seed, cases=5)
        write_run(tmp_path / "few", "better", seed, dice=0.9, cases=5)
        write_run(tmp_path / "many", "scratch", seed)
        write_run(tmp_path / "many", "better", seed, dice=0.9)
    assert built(tmp_path / "few")["p_value_holm"].isna().all()
    frame = built(tmp_path / "many").set_index(["method", "target"])
    assert frame.loc["better", "a"]["p_value_holm"] == pytest.approx(2 / 2**8)
    assert frame.loc["better", "a"]["n_seeds"] == 2


def test_the_difference_uses_the_seeds_that_both_have(tmp_path):
    write_run(tmp_path, "scratch", 0)
    write_run(tmp_path, "better", 0, dice=0.9)
    write_run(tmp_path, "better", 1, dice=0.2)
    write_run(tmp_path, "other", 5, dice=0.9)
    frame = built(tmp_path).set_index(["method", "target"])
    assert frame.loc["better", "a"]["delta_dice_vs_scratch"] == pytest.approx(0.1)
    assert pd.isna(frame.loc["other", "a"]["delta_dice_vs_scratch"])


def test_every_row_says_why_it_has_no_p_value(tmp_path):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "one_seed")
    write_run(tmp_path, "alone", backbone="other")
    notes = built(tmp_path).set_index("method")["note"].to_dict()
    assert notes["one_seed"].startswith("no p-value: one seed")
    assert notes["alone"].startswith("no scratch run to compare with")
    assert notes["scratch"] == "the control"
    assert "no p-value: one seed" in table.render(tables(tmp_path))


def test_of_two_runs_of_a_seed_the_later_one_counts(tmp_path):
    write_run(tmp_path, "m", dice=0.9)
    write_run(tmp_path, "m", dice=0.7, run_id="later", finished="2026-02-01T00:00:00Z")
    row = built(tmp_path).set_index("target").loc["a"]
    assert (row["n_seeds"], row["run_ids"]) == (1, "later")
    assert "older runs" in row["note"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"preset": "paper"}, "preset"),
        ({"task_version": "2"}, "task"),
        ({"metric_policy": "empty-is-skipped-v1"}, "metric_policy"),
        ({"data": {"fingerprint": "e" * 32}}, "data"),
        ({"label_fraction": 0.5}, "label_fraction"),
        ({"protocol": "frozen"}, "protocol"),
        ({"mode": "generic"}, "mode"),
    ],
)
def test_what_keeps_two_runs_apart_is_named(tmp_path, change, field):
    first = records.load_run(write_run(tmp_path, "a"))
    second = records.load_run(write_run(tmp_path, "b", **change))
    (difference,) = board.differing(first, second)
    assert difference.startswith(field)
    assert len({each.key for each in tables(tmp_path)}) == 2


@pytest.fixture
def runs(tmp_path):
    return three_fractions(tmp_path / "runs")


def test_ranks(runs, capsys):
    said = called(capsys, "leaderboard", "ranks", "--runs", runs)
    assert "Kendall's tau" in said
    assert "100%" in said


def by_method(each):
    return {group.method: group for group in each.groups}


def test_a_control_that_calibrates_has_no_line_among_the_ranks(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed)
        write_run(tmp_path, "better", seed, dice=0.85)
        write_run(tmp_path, "untrained", seed, dice=0.81)
    said = called(capsys, "leaderboard", "ranks", "--runs", tmp_path)
    assert "better" in said
    assert not any(line.startswith("untrained") for line in said.splitlines())
    assert "nan" not in said
    assert "#3" not in said


def test_ranks_are_scipys_with_the_better_rank_for_equal_means(tmp_path):
    for number, dice in enumerate((0.8, 0.9, 0.7, 0.9, 0.6)):
        write_run(tmp_path, f"m{number}", dice=dice)
    (each,) = tables(tmp_path)
    for target in (0, -1):
        means = [group.dice.mean[target] for group in each.groups]
        assert each.ranks(target) == stats.rankdata([-mean for mean in means], method="min").tolist()
    assert each.ranks() == [3, 1, 4, 1, 5]
    assert each.ranks(1) == [1] * 5  # b is the same in all


def test_a_target_that_nobody_scored_has_no_rank(tmp_path):
    nothing = dict.fromkeys(("dice", "hd95", "surface_dice"))
    place = write_run(tmp_path, cases=1, metrics={"b": nothing, "average": nothing})
    assert "c0,b,empty" in (place / "cases.csv").read_text()
    (each,) = tables(tmp_path)
    assert (each.ranks(0), each.ranks(1)) == ([1], [None])


def test_the_control_of_one_mode_is_that_of_both(tmp_path):
    """Nothing was pre-trained on: it does not matter which scans would have been."""
    write_run(tmp_path, "scratch", dice=0.8, mode="task-specific")
    write_run(tmp_path, "better", dice=0.85, mode="generic")
    write_run(tmp_path, "better", dice=0.9, mode="task-specific")
    found = {each.shared("mode"): by_method(each) for each in tables(tmp_path)}
    assert set(found) == {"generic", "task-specific"}
    for mode, difference in (("generic", 0.05), ("task-specific", 0.1)):
        assert set(found[mode]) == {"scratch", "better"}
        assert found[mode]["better"].delta.mean[0] == pytest.approx(difference)


def test_a_control_of_other_settings_is_no_control_of_the_other_mode(tmp_path):
    write_run(tmp_path, "scratch", mode="task-specific", label_fraction=0.5)
    write_run(tmp_path, "better", mode="generic")
    (generic,) = (each for each in tables(tmp_path) if each.shared("mode") == "generic")
    assert set(by_method(generic)) == {"better"}


def test_times_are_the_median_step_and_the_mean_pre_training_with_its_preparation(tmp_path):
    for seed, (step, seconds) in enumerate([(10.0, 60.0), (20.0, 90.0), (90.0, 150.0)]):
        timing = {"seconds": {"pretrain": seconds, "method_prepare": 3.0}, "pretrain_step": {"step": {"p50_ms": step}}}
        write_run(tmp_path, "m", seed, timing=timing)
    write_run(tmp_path, "scratch")
    (each,) = tables(tmp_path)
    found = by_method(each)
    assert (found["m"].step_ms, found["m"].pretrain_seconds) == (20.0, 103.0)
    assert (found["scratch"].step_ms, found["scratch"].pretrain_seconds) == (None, None)
    assert [group.method for group in each.groups if group.is_control] == ["scratch"]


def test_p_values_are_corrected_over_the_methods_of_the_table(tmp_path):
    """Eight cases, all better: 2 / 2^8 each; Holm takes the smallest of two twice, and the other is not smaller."""
    for seed in (0, 1):
        for method, dice in (("scratch", 0.7), ("better", 0.8), ("best", 0.9)):
            write_run(tmp_path, method, seed, dice=dice)
    (each,) = tables(tmp_path)
    for method in ("better", "best"):
        assert by_method(each)[method].p[0] == pytest.approx(2 * 2 / 2**8)
    assert pd.isna(by_method(each)["scratch"].p).all()


def test_controls_are_those_of_the_same_backbone(tmp_path):
    write_run(tmp_path, "scratch", dice=0.8)
    write_run(tmp_path, "scratch", dice=0.6, backbone="swinunetr")
    for backbone in ("unet", "swinunetr"):
        write_run(tmp_path, "m", dice=0.85, backbone=backbone)
    (each,) = tables(tmp_path)
    deltas = {group.backbone: group.delta.mean[0] for group in each.groups if group.method == "m"}
    assert deltas == {"unet": pytest.approx(0.05), "swinunetr": pytest.approx(0.25)}


def test_the_title_warns_before_it_says_anything_else(tmp_path):
    write_run(tmp_path / "a", label_fraction=0.5)
    write_run(tmp_path / "b", data={"source": "phantom"})
    write_run(tmp_path / "c", data={"n_test_seen": 2})
    titles = [tables(tmp_path / name)[0].title for name in "abc"]
    assert titles[0] == "t, real:ffffffff, preset demo, task-specific, finetune, 50% of the labels (2 cases)"
    assert titles[1].startswith("PHANTOM DATA, says nothing about any method - t, phantom:ffffffff")
    assert titles[2].startswith("TEST CASES WERE TRAINED OR PRE-TRAINED ON (column seen) - t")


def test_runs_of_one_table_do_not_differ_and_a_control_is_of_any_mode(tmp_path):
    one, other, control = (
        records.load_run(write_run(tmp_path, method, mode=mode))
        for method, mode in (("a", "generic"), ("b", "generic"), ("scratch", "task-specific"))
    )
    assert board.differing(one, other) == board.differing(one, control) == []
    shorter = records.load_run(write_run(tmp_path, "c", mode="generic", cases=5))
    assert board.differing(one, shorter) == ["test_cases (8 cases and 5 others)"]


def test_a_row_whose_features_collapsed_says_so(tmp_path):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "m", probe={"points": [[0, 0.5, 20.0], [9, 0.4, 1.1]], "collapsed": 9, "seconds": 1.0})
    write_run(tmp_path, "m", seed=1, probe={"points": [[0, 0.5, 20.0]], "collapsed": None, "seconds": 1.0})
    notes = {group.method: group.note for group in tables(tmp_path)[0].groups}
    assert "features collapsed in pre-training (seed 0)" in notes["m"]
    assert "collapsed" not in notes["scratch"]


def test_two_networks_keep_two_names(tmp_path):
    for method in ("scratch", "m"):
        write_run(tmp_path, method, rules=2)
    write_run(tmp_path, "n", rules=2, overrides={"backbone.features": "8,16"})
    (table,) = board.gather(records.load_runs([tmp_path])[0])
    assert table.with_short_names() is table
