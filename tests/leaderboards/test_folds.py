"""Folds that become one row: which do, what the row is made of, and what stays apart."""

import json

import numpy as np
import pandas as pd
import pytest

from leaderboards import board, folds, records, table, validate
from tests.leaderboards.made import built, digest_cases, sign, summary, tables, write_run


def write_fold(folder, method, fold, seed=0, total=3, dice=0.8, **changes):
    """A run of fold K of N, whose test cases no other fold has."""
    data = {"split": f"{fold}/{total}", **changes.pop("data", {})}
    run_id = f"{method}-{fold}-of-{total}-s{seed}-{changes.pop('mark', 0)}"
    place = write_run(folder, method, seed, dice + 0.01 * fold, run_id=run_id, data=data, **changes)
    frame = pd.read_csv(place / "cases.csv")
    frame["case"] = [f"f{4 - fold}{case}" for case in frame["case"]]  # the last fold has the first cases
    frame.to_csv(place / "cases.csv", index=False)
    record = json.loads((place / "record.json").read_text())
    record["data"]["test"] = sorted(set(frame["case"]))
    record["metrics"], record["digests"] = summary(frame), {"cases.csv": digest_cases(place)}
    (place / "record.json").write_text(json.dumps(record))
    return place


def test_folds_of_other_sizes_keep_their_cases(tmp_path):
    """Two cases in the first fold, eight in the second: the order of folds is no mirror image."""
    write_fold(tmp_path, "scratch", 1, total=2, cases=2)
    write_fold(tmp_path, "scratch", 2, total=2)
    run = tables(tmp_path)[0].groups[0].runs[0]
    assert [(name[:2], fold) for name, fold in zip(run.cases, run.folds, strict=True)] == [("f2", 1)] * 8 + [
        ("f3", 0)
    ] * 2


def write_study(folder, seeds=(0, 1)):
    for seed in seeds:
        for fold in (1, 2, 3):
            write_fold(folder, "scratch", fold, seed)
            write_fold(folder, "better", fold, seed, dice=0.85)
    return folder


def test_all_folds_are_one_row_over_all_cases(tmp_path):
    (only,) = tables(write_study(tmp_path))
    assert only.shared("preset") == "demo{split=3 folds}"
    for group in only.groups:
        assert len(group.runs) == 2
        assert len(group.members) == 6
        assert len(group.runs[0].cases) == 24
        assert "3 folds pooled" in group.note
    singles = {run.run_id: run for run in records.load_runs([tmp_path])[0]}
    scratch = next(group for group in only.groups if group.is_control)
    expected = [singles[f"scratch-{fold}-of-3-s0-0"] for fold in (1, 2, 3)]
    for name, row in zip(scratch.runs[0].cases, scratch.runs[0].dice, strict=True):
        (own,) = (run for run in expected if name in run.cases)
        assert np.array_equal(row, own.dice[own.cases.index(name)], equal_nan=True)
        assert expected[scratch.runs[0].folds[scratch.runs[0].cases.index(name)]] is own
    assert [3 - int(name[1]) for name in scratch.runs[0].cases] == list(scratch.runs[0].folds)
    assert list(scratch.runs[0].cases) == sorted(scratch.runs[0].cases)


def test_the_csv_of_pooled_folds_is_recomputed_from_all_their_runs(tmp_path):
    write_study(tmp_path / "runs")
    frame = built(tmp_path / "runs")
    assert len(frame) == 6
    assert all(len(ids.split()) == 6 for ids in frame["run_ids"])
    assert set(frame["n_seeds"]) == {2}
    table.write(frame, tmp_path / "board.csv")
    runs, _ = records.load_runs([tmp_path / "runs"])
    assert validate.check_csv(tmp_path / "board.csv", runs) == ([], "6 rows recomputed from 12 runs")


def test_one_seed_of_all_folds_has_a_test(tmp_path):
    (only,) = tables(write_study(tmp_path, seeds=(0,)))
    better = next(group for group in only.groups if group.method == "better")
    assert np.isfinite(better.p[-1])
    assert "no p-value" not in better.note


def test_where_a_row_lacks_a_fold_its_folds_keep_their_tables_with_the_control(tmp_path):
    write_study(tmp_path, seeds=(0,))
    write_fold(tmp_path, "partial", 1)
    found = {each.shared("preset"): {group.method for group in each.groups} for each in tables(tmp_path)}
    assert found.pop("demo{split=3 folds}") == {"better", "scratch"}
    assert found.pop("demo{split=1/3}") == {"better", "partial", "scratch"}
    assert set(found.values().__iter__().__next__()) == {"better", "scratch"}


@pytest.mark.parametrize("what", ["another total", "another seed", "another file", "a case twice"])
def test_folds_that_do_not_belong_together_are_not_pooled(what, tmp_path):
    write_fold(tmp_path, "scratch", 1)
    write_fold(tmp_path, "scratch", 2)
    changes = {
        "another total": {"total": 5},
        "another seed": {"seed": 1},
        "another file": {"data": {"split": "3/3@abcdef01"}},
        "a case twice": {},
    }[what]
    place = write_fold(tmp_path, "scratch", 3, **changes)
    if what == "a case twice":
        frame = pd.read_csv(place / "cases.csv").replace("f1c0", "f3c0")
        frame.to_csv(place / "cases.csv", index=False)
        sign(place)
    runs, problems = records.load_runs([tmp_path])
    assert not problems
    assert len(folds.pool(runs)) == 3
    assert not any(run.parts for run in folds.pool(runs))


def test_folds_of_a_file_are_pooled_too(tmp_path):
    for fold in (1, 2, 3):
        write_fold(tmp_path, "scratch", fold, data={"split": f"{fold}/3@abcdef01"})
    assert tables(tmp_path)[0].shared("preset") == "demo{split=3 folds@abcdef01}"


def test_a_number_of_labelled_cases_is_another_share_in_folds_of_other_sizes(tmp_path):
    for fold, share in ((1, 4 / 176), (2, 4 / 176), (3, 4 / 177)):
        write_fold(tmp_path, "scratch", fold, label_fraction=share, data={"n_train": 4}, mark=1)
        write_fold(tmp_path, "scratch", fold, label_fraction=2 * share, data={"n_train": 8}, mark=2)
    found = tables(tmp_path)
    assert [each.shared("label_fraction") for each in found] == [4 / 176, 8 / 176]
    assert all(len(each.groups[0].members) == 3 for each in found)


def test_other_amounts_of_labels_are_not_pooled(tmp_path):
    for fold, share, number in ((1, 0.1, 10), (2, 0.1, 10), (3, 0.2, 20)):
        write_fold(tmp_path, "scratch", fold, label_fraction=share, data={"n_train": number})
    assert len(tables(tmp_path)) == 3


def test_of_two_runs_of_a_fold_the_later_one_is_taken(tmp_path):
    for fold in (1, 2, 3):
        write_fold(tmp_path, "scratch", fold)
    write_fold(tmp_path, "scratch", 2, dice=0.6, mark="later", finished="2026-02-01T00:00:00Z")
    (only,) = tables(tmp_path)
    assert sorted(run.run_id for run in only.groups[0].members)[1] == "scratch-2-of-3-s0-later"
    assert len(only.groups[0].members) == 3


def test_without_folds_nothing_changes(tmp_path):
    write_run(tmp_path, "scratch")
    runs, _ = records.load_runs([tmp_path])
    assert folds.pool(runs) == runs
    assert board.gather(runs)[0].groups[0].members == runs


def test_one_amount_of_labels_more_does_not_undo_the_pooling_of_another(tmp_path):
    write_study(tmp_path, seeds=(0,))
    write_fold(tmp_path, "scratch", 1, label_fraction=0.5, data={"n_train": 1}, mark="half")
    found = [(each.shared("preset"), each.shared("label_fraction"), len(each.groups)) for each in tables(tmp_path)]
    assert sorted(found) == [("demo{split=1/3}", 0.5, 1), ("demo{split=3 folds}", 1.0, 2)]


def test_a_pooled_row_says_what_tuning_chose_in_each_fold(tmp_path):
    trials = [{"settings": {"finetune.lr": value}, "dice": 0.5} for value in ("1", "2")]
    for fold in (1, 2, 3):
        chosen = fold == 3
        own = [each | {"dice": 0.5 + 0.1 * (index == chosen)} for index, each in enumerate(trials)]
        write_fold(tmp_path, "scratch", fold, tuning={"grid": "finetune.lr=1,2", "trials": own, "chosen": int(chosen)})
    (only,) = tables(tmp_path)
    assert "tuning chose lr=1 (seeds 0 fold 1/3, 0 fold 2/3); lr=2 (seed 0 fold 3/3)" in only.groups[0].note


def test_imported_results_without_folds_are_in_a_table_of_their_own(tmp_path):
    """They hold the same cases. Their name sorts first, and their want of folds must not change anybody's intervals."""
    (before,) = tables(write_study(tmp_path))
    cases = before.groups[0].runs[0].cases
    imported = {"imported": {"kind": "label maps"}, "preset": "imported"}
    place = write_run(tmp_path, "AAA", 0, 0.5, cases=len(cases), data={"test": list(cases)}, **imported)
    frame = pd.read_csv(place / "cases.csv")
    names = dict(zip(frame["case"].unique(), cases, strict=True))
    frame["case"] = frame["case"].map(names)
    frame.to_csv(place / "cases.csv", index=False)
    sign(place)
    after = {tuple(group.method for group in each.groups): each for each in tables(tmp_path)}
    assert set(after) == {("AAA (imported)",), ("better", "scratch")}
    for old, new in zip(before.groups, after["better", "scratch"].groups, strict=True):
        np.testing.assert_equal((new.p, new.dice.low, new.dice.high), (old.p, old.dice.low, old.dice.high))
