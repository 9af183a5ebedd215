"""Runs that ended before fine-tuning had converged are marked; converged runs are not."""

import json

import pytest

from leaderboards import convergence, records
from tests.leaderboards.made import built, called, tables, write_run


# What was measured on hippocampi: 400 steps at a learning rate of 0.001, 400 at 0.005, and 2000 at 0.003.
@pytest.mark.parametrize(("loss", "dice", "marked"), [(0.45, 0.82, True), (0.16, 0.83, False), (0.12, 0.876, False)])
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
    assert convergence.unconverged(runs).startswith("not converged (seeds 0, 1): soft Dice 0.30")


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
