"""Runs that ended before fine-tuning had converged are marked; converged runs are not."""

import json
from pathlib import Path

import pytest

from leaderboards import board, convergence, records
from tests.leaderboards.made import built, called, tables, write_run


# What was measured on hippocampi: 400 steps at a learning rate of 0.001, 400 at 0.005, and 2000 at 0.003; then too few steps.
@pytest.mark.parametrize(
    ("loss", "dice", "marked"),
    [
        (0.45, 0.82, True),
        (0.16, 0.83, False),
        (0.12, 0.876, False),
        (0.93, 0.08, True),
        (0.99, 0.0, True),
        (0.4, 0.55, False),
    ],
)
def test_the_rule_on_what_was_measured(tmp_path, loss, dice, marked):
    folder = write_run(tmp_path, "scratch", final_soft_dice=1 - loss)
    record = json.loads((folder / "record.json").read_text())
    record["metrics"]["average"]["dice"] = dice
    (folder / "record.json").write_text(json.dumps(record))
    assert bool(convergence.unconverged([records.load_run(folder)])) is marked


def test_the_mark_has_the_numbers(tmp_path):
    runs = [records.load_run(write_run(tmp_path, "m", seed, final_soft_dice=0.3 + 0.1 * seed)) for seed in (0, 1)]
    assert convergence.unconverged(runs[:1]) == (
        "not converged (seed 0): soft Dice 0.30 on the last crops, Dice 0.65 on the test cases"
    )
    several = convergence.unconverged(runs)
    assert several.startswith("not converged (seeds 0, 1): soft Dice 0.30")
    assert several.endswith("on the test cases (seed 0)")


def test_an_older_record_says_nothing(tmp_path):
    assert convergence.unconverged([records.load_run(write_run(tmp_path, "scratch"))]) == ""


def test_row_and_table_say_it(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, final_soft_dice=0.9)
        write_run(tmp_path, "m", seed, final_soft_dice=0.3 + 0.4 * seed)
    (only,) = tables(tmp_path)
    assert only.sentences[0].startswith("NOT CONVERGED: the fine-tuning of 1 of 2 rows")
    notes = built(tmp_path).set_index("method")["note"]
    assert all(note.startswith("not converged (seed 0)") for note in notes["m"])
    assert set(notes["scratch"]) == {"the control"}
    assert "NOT CONVERGED" in called(capsys, "leaderboard", "build", "--runs", tmp_path)


def labelled(folder, method, number, dice, seed=0, **changes):
    own = {"data": {"n_train": number}, "label_fraction": number / 100, "metrics": {"average": {"dice": dice}}}
    return write_run(folder, method, seed, dice, **own | changes)


def test_older_records_are_marked_where_many_more_labels_do_not_help(tmp_path):
    for seed in (0, 1):
        for number, dice in ((10, 0.80), (20, 0.79), (45, 0.80), (100, 0.805)):
            labelled(tmp_path, "scratch", number, dice + 0.02 * seed, seed)
            labelled(tmp_path, "m", number, 0.6, seed)
    few, some, more, many = tables(tmp_path)
    for table in (few, many):
        assert [group.unconverged for group in table.groups] == [
            "not converged: scratch has Dice 0.810 with 10 labelled cases and 0.815 with 100"
        ] * 2
        assert table.sentences[0].startswith("NOT CONVERGED: the fine-tuning of 2 of 2 rows")
    # Twenty cases have 0.80 and a hundred 0.815: more labels help there.
    assert [group.unconverged for group in some.groups] == ["", ""]
    assert "0.810 with 10 labelled cases and 0.810 with 45" in more.groups[0].unconverged


@pytest.mark.parametrize(
    ("number", "dice", "changes"),
    [
        (100, 0.811, {}),  # more labels help
        (39, 0.80, {}),  # not four times as many
        (100, 0.80, {"seed": 1}),  # no seed in common
        (100, 0.80, {"backbone": "swinunetr"}),
        (100, 0.80, {"overrides": {"finetune.steps": "9"}}),  # other tables than those that differ in labels alone
        (100, 0.80, {"data": {"n_train": None}}),
    ],
)
def test_other_label_curves_mark_nothing(tmp_path, number, dice, changes):
    labelled(tmp_path, "scratch", 10, 0.80)
    labelled(tmp_path, "scratch", number, dice, **changes)
    for each in (10, 100):
        labelled(tmp_path, "flat", each, 0.8)
    assert not any(group.unconverged for table in tables(tmp_path) for group in table.groups)


def test_soft_dice_decides_where_a_record_has_it(tmp_path):
    for number in (10, 100):
        labelled(tmp_path, "scratch", number, 0.8)
        labelled(tmp_path, "m", number, 0.8, final_soft_dice=0.9)
    assert [[bool(group.unconverged) for group in table.groups] for table in tables(tmp_path)] == [[False, True]] * 2


def test_a_table_without_the_mark_is_valid_if_it_is_older_than_the_rule(tmp_path, capsys):
    for number in (10, 100):
        labelled(tmp_path, "scratch", number, 0.8)
    frame = built(tmp_path)
    assert frame["note"].str.startswith("not converged: scratch has Dice 0.800 with 10").all()
    frame["note"] = "the control"
    older, forged = tmp_path / "older.csv", tmp_path / "forged.csv"
    frame.loc[:, :"note"].to_csv(older, index=False)
    frame.to_csv(forged, index=False)
    assert "valid, 6 rows recomputed" in called(capsys, "leaderboard", "validate", older, "--runs", tmp_path)
    assert "note is 'the control'" in called(capsys, "leaderboard", "validate", forged, "--runs", tmp_path, status=2)


def test_the_published_records_of_0_3_0_are_marked():
    folder = Path(__file__).parents[2] / "leaderboards" / "published"
    old = board.gather(records.load_runs([folder / "msd_hippocampus" / "runs"])[0])
    marked = [(group.backbone, bool(group.unconverged)) for table in old for group in table.groups]
    assert set(marked) == {("unet", True), ("swinunetr", False)}, "of SwinUNETR there is no curve over labels"
    new = board.gather(records.load_runs([folder / "msd_hippocampus_controls" / "runs"])[0])
    assert not any(group.unconverged for table in new for group in table.groups)


def with_curve(folder, method, seed, dice, steps=(1, 2, 4), seconds=None):
    values = {"validation": {"cases": ["v"], "curve": [[step, value] for step, value in zip(steps, dice, strict=True)]}}
    timing = {"timing": {"seconds": seconds}} if seconds else {}
    write_run(folder, method, seed, rules=2, **values, **timing)


def test_a_row_reaches_scratch_at_the_first_step_of_its_mean_curve(tmp_path, capsys):
    """Scratch ends at 0.7, the mean of its seeds. The method is there in step 2, after all of its pre-training."""
    with_curve(tmp_path, "scratch", 0, (0.1, 0.5, 0.6))
    with_curve(tmp_path, "scratch", 1, (0.1, 0.5, 0.8))
    with_curve(tmp_path, "m", 0, (0.3, 0.5, 0.9), seconds={"pretrain": 100.0, "method_prepare": 3.0, "finetune": 60.0})
    with_curve(tmp_path, "m", 1, (0.3, 0.95, 0.9), seconds={"pretrain": 100.0, "method_prepare": 3.0, "finetune": 60.0})
    with_curve(tmp_path, "never", 0, (0.1, 0.2, 0.3))
    average = built(tmp_path).query("target == 'average'").set_index("method")
    assert average["steps_to_scratch"].to_dict() == {
        "m": 2,
        "never": pytest.approx(float("nan"), nan_ok=True),
        "scratch": 4,
    }
    assert average.loc["m", "seconds_to_scratch"] == pytest.approx(103 + 60 * 2 / 4)
    assert average.loc["scratch", "seconds_to_scratch"] == pytest.approx(60)
    called(capsys, "leaderboard", "publish", "--runs", tmp_path, "--out", tmp_path / "site")
    assert '<th scope="col">steps to scratch</th>' in (tmp_path / "site" / "tables" / "1.html").read_text()
    assert (tmp_path / "site" / "figures" / "1" / "convergence.png").exists()


def test_curves_of_other_steps_are_not_averaged(tmp_path):
    with_curve(tmp_path, "scratch", 0, (0.1, 0.5, 0.6))
    with_curve(tmp_path, "scratch", 1, (0.1, 0.5, 0.6), steps=(2, 4, 8))
    (only,) = tables(tmp_path)
    assert convergence.curve(only.groups[0].runs) is None
    assert only.to_scratch(only.groups[0]) is None


def test_without_curves_there_is_no_column(tmp_path, capsys):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "m")
    assert built(tmp_path)["steps_to_scratch"].isna().all()
    called(capsys, "leaderboard", "publish", "--runs", tmp_path, "--out", tmp_path / "site")
    assert "steps to scratch" not in (tmp_path / "site" / "tables" / "1.html").read_text()


def test_only_seeds_in_common_and_the_same_cases_are_compared(tmp_path):
    with_curve(tmp_path, "scratch", 0, (0.1, 0.4, 0.5))
    with_curve(tmp_path, "scratch", 1, (0.1, 0.5, 0.9))
    with_curve(tmp_path, "m", 0, (0.3, 0.6, 0.65))
    other = {"cases": ["w"], "curve": [[1, 0.9], [2, 0.9], [4, 0.9]]}
    for seed in (0, 1):
        write_run(tmp_path, "other", seed, rules=2, validation=other)
    (only,) = tables(tmp_path)
    steps = {group.method: only.to_scratch(group) for group in only.groups}
    assert steps["m"][0] == 2
    assert steps["other"] is None


@pytest.mark.parametrize(
    "curve", [[[0, 0.1]], [[2, 0.1], [1, 0.2]], [[1, 0.1], [1, 0.2]], [[0.5, 0.1]], [[1, 1.5]], [[1]]]
)
def test_a_curve_that_cannot_be_is_refused(tmp_path, curve):
    folder = write_run(tmp_path, "m", validation={"cases": ["v"], "curve": curve})
    with pytest.raises(records.RecordError, match="validation"):
        records.load_run(folder)
