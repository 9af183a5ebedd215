"""The two versions of the rules that say which runs share a table."""

import json

import pandas as pd
import pytest

from leaderboards import table, validate
from tests.leaderboards.made import built, tables, write_run

BUDGET = {"pretrain.steps": "1500"}


def test_a_pre_training_budget_is_of_the_row_and_shares_the_control(tmp_path):
    write_run(tmp_path, "scratch", rules=2)
    write_run(tmp_path, "m", overrides={"method.ratio": "0.6", **BUDGET}, rules=2)
    write_run(tmp_path, "m", overrides={"method.ratio": "0.6"}, rules=2)
    (only,) = tables(tmp_path)
    assert [group.method for group in only.groups] == ["m{ratio=0.6, pretrain.steps=1500}", "m{ratio=0.6}", "scratch"]
    assert [group.delta is None for group in only.groups] == [False, False, True]


def test_under_the_first_rules_a_budget_is_of_the_table(tmp_path):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "m", overrides=BUDGET)
    assert [each.shared("preset") for each in tables(tmp_path)] == ["demo", "demo{pretrain.steps=1500}"]


@pytest.mark.parametrize("subset", ["per seed", "by label seed 3"])
def test_another_draw_of_the_labelled_cases_is_another_table(tmp_path, subset):
    write_run(tmp_path, "scratch", label_fraction=0.5)
    write_run(tmp_path, "m", label_fraction=0.5, rules=2, data={"label_subset": subset})
    first, second = tables(tmp_path)
    assert {first.shared("label_subset"), second.shared("label_subset")} == {"first", subset}
    assert set(built(tmp_path)["label_subset"]) == {"first", subset}


def test_the_title_counts_the_labelled_cases(tmp_path):
    write_run(tmp_path, "scratch", label_fraction=0.5, data={"n_train": 4})
    assert tables(tmp_path)[0].title.endswith("50% of the labels (4 cases)")


def test_a_table_of_an_earlier_version_is_valid_by_the_rules_of_its_runs(tmp_path):
    """It lacks the columns that came later; all of its runs have the first cases."""
    write_run(tmp_path / "runs", "scratch", label_fraction=0.5)
    write_run(tmp_path / "runs", "m", label_fraction=0.5)
    frame = built(tmp_path / "runs")
    table.write(frame, tmp_path / "new.csv")
    later = frame.columns[-len(validate.OLDER) :]
    assert list(later) == list(validate.OLDER)
    pd.read_csv(tmp_path / "new.csv", dtype=str).drop(columns=later).to_csv(tmp_path / "old.csv", index=False)
    runs = [run for each in tables(tmp_path / "runs") for group in each.groups for run in group.runs]
    assert validate.check_csv(tmp_path / "old.csv", runs) == ([], "6 rows recomputed from 2 runs")
    for run in runs:
        path = run.folder / "record.json"
        record = json.loads(path.read_text())
        record["data"]["label_subset"] = "per seed"
        path.write_text(json.dumps(record))
    changed = [run for each in tables(tmp_path / "runs") for group in each.groups for run in group.runs]
    problems, _ = validate.check_csv(tmp_path / "old.csv", changed)
    assert "its runs give no such row" in problems[0]
