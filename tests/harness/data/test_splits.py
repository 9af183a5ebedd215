"""Splits: by list, rule and fold; nested, disjoint, the same for the same names, no patient on both sides."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from harness.api.registry import Registry
from harness.api.task import Case
from harness.data.splits import check_split, draw_labelled, split_cases
from harness.system.errors import UserError

TASK = replace(Registry().task("msd_hippocampus"), test_ids=None)


def cases(number, patient=lambda i: ""):
    return [Case(f"case_{i:03d}", (Path(f"{i}"),), None, patient=patient(i)) for i in range(number)]


def ids(some):
    return {case.id for case in some}


@pytest.mark.parametrize("number", [2, 5, 50, 369])
def test_the_rule_gives_a_fifth_and_depends_on_names_alone(number):
    split = split_cases(TASK, cases(number))
    assert len(split.test) == max(1, round(number / 5))
    assert not ids(split.train) & ids(split.test)
    assert len(split.train) + len(split.test) == number
    again = split_cases(replace(TASK, name="other"), cases(number)[::-1])
    assert (again.train, again.test, split.by) == (split.train, split.test, "rule")


def test_a_list_wins_and_strangers_train():
    task = replace(TASK, test_ids=frozenset({"case_001", "case_003", "case_777"}))
    split = split_cases(task, cases(6))
    assert (ids(split.test), split.by) == ({"case_001", "case_003"}, "list")
    assert split_cases(replace(TASK, test_ids=frozenset({"unknown"})), cases(6)).by == "rule"


@pytest.mark.parametrize("folds", [2, 3, 5, 7])
def test_folds_test_every_case_once(folds):
    tested = [split_cases(TASK, cases(23), f"{k}/{folds}") for k in range(1, folds + 1)]
    assert sorted(case.id for split in tested for case in split.test) == sorted(ids(cases(23)))
    for split in tested:
        assert ids(split.train) == ids(cases(23)) - ids(split.test)
    assert max(len(split.test) for split in tested) - min(len(split.test) for split in tested) <= 1


@pytest.mark.parametrize("how", ["fixed", "1/5", "2/3"])
def test_patients_never_straddle(how):
    some = cases(60, patient=lambda i: f"p{i // 3}")
    split = split_cases(TASK, some, how)
    assert not {case.patient for case in split.train} & {case.patient for case in split.test}
    assert len(split.train) + len(split.test) == 60


@pytest.mark.parametrize("how", ["fixed", "1/5"])
def test_the_same_scan_twice_is_one_patient(how):
    pairs = [(0, 59), (1, 30), (30, 31), (7, 8)]
    split = split_cases(TASK, cases(60), how, pairs)
    for i, j in pairs:
        assert (f"case_{i:03d}" in ids(split.test)) == (f"case_{j:03d}" in ids(split.test))
    assert ("case_007", "case_008") in split.repeated


def test_a_twin_of_a_listed_test_case_is_left_out():
    task = replace(TASK, test_ids=frozenset({"case_003"}))
    split = split_cases(task, cases(6), same=[(3, 5)])
    assert ids(split.test) == {"case_003"}
    assert ids(split.train) == {"case_000", "case_001", "case_002", "case_004"}
    assert split.left_out == [("case_005", "case_003")]


def test_cases_that_all_look_alike_are_refused_as_such():
    everyone = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    with pytest.raises(UserError, match=r"all 5 labelled cases look like one scan.*data check.*take the copies out"):
        split_cases(TASK, cases(5), same=everyone)
    assert split_cases(TASK, cases(5), "same", everyone).by == "same"
    assert split_cases(TASK, cases(6), same=everyone).test


def test_same_is_a_plumbing_check():
    split = split_cases(TASK, cases(1), "same")
    assert (ids(split.train), ids(split.test), split.by) == ({"case_000"}, {"case_000"}, "same")


@pytest.mark.parametrize("how", ["0/5", "6/5", "1/1", "5", "a/b", "-1/5", "", "80/20"])
def test_wrong_words(how):
    with pytest.raises(UserError, match=r"give fixed \(80/20\), K/N"):
        check_split(how)


def test_too_few_cases():
    with pytest.raises(UserError, match="--split same for a plumbing check"):
        split_cases(TASK, cases(1))
    with pytest.raises(UserError, match="at most as many folds"):
        split_cases(TASK, cases(3), "1/5")


def test_brats_time_points_share_a_patient(tmp_path):
    task = Registry().task("brats")
    for name in ("BraTS-GLI-00005-000", "BraTS-GLI-00005-001", "BraTS-GLI-00006-000", "BraTS-GLI-00007-000"):
        folder = tmp_path / name
        folder.mkdir()
        for kind in ("t2f", "t1n", "t1c", "t2w", "seg"):
            (folder / f"{name}-{kind}.nii.gz").write_bytes(b"x")
    found = task.cases(task.find(tmp_path))
    assert [case.patient for case in found[:2]] == ["BraTS-GLI-00005"] * 2
    for k in (1, 2, 3):
        split = split_cases(task, found, f"{k}/3")
        assert not {case.patient for case in split.train} & {case.patient for case in split.test}


@pytest.mark.parametrize(
    ("number", "asked", "expected"), [(220, 4, 4), (220, 0, 0), (60, 4, 2), (24, 4, 0), (220, 20, 8)]
)
def test_validation_cases_are_held_out_of_training_and_are_few(number, asked, expected):
    whole, split = (split_cases(TASK, cases(number), validation=most) for most in (0, asked))
    assert len(split.validation) == expected
    assert split.test == whole.test
    assert split.train == whole.train[: len(whole.train) - expected]
    assert ids(split.train) | ids(split.validation) == ids(whole.train)
    assert not ids(split.validation) & (ids(split.train) | ids(split.test))


def test_a_patient_is_not_divided_between_training_and_validation():
    """Patients of three scans: of at most four validation cases three are taken."""
    some = [replace(case, patient=f"p{number // 3}") for number, case in enumerate(cases(300))]
    split = split_cases(TASK, some, validation=4)
    assert len(split.validation) == 3
    assert len({case.patient for case in split.validation}) == 1
    assert not {case.patient for case in split.validation} & {case.patient for case in split.train}


@pytest.mark.parametrize(
    ("fraction", "number"), [(1.0, 100), (0.5, 50), (0.07, 7), (4 / 100, 4), (0.041, 5), (1e-9, 1)]
)
def test_the_number_of_labelled_cases_is_rounded_up(fraction, number):
    """7 % of 100 is 7.000000000000001 in floating point, and 7 all the same."""
    assert len(draw_labelled(cases(100), fraction, seed=0)) == number


def test_a_seed_draws_cases_of_its_own_and_larger_shares_hold_smaller_ones():
    train = cases(50)
    draws = [draw_labelled(train, 0.1, seed) for seed in range(5)]
    assert len({tuple(case.id for case in draw) for draw in draws}) == 5
    for seed in range(5):
        sets = [ids(draw_labelled(train, fraction, seed)) for fraction in (0.02, 0.1, 0.3, 0.9, 1.0)]
        assert all(fewer < more for fewer, more in pairwise(sets))
    for draw in draws:
        assert draw == [case for case in train if case in draw]
    counts = [sum(case in draw_labelled(train, 0.2, seed) for seed in range(400)) for case in train]
    assert 40 < min(counts) < max(counts) < 125  # 80 expected, five standard deviations


def test_the_scans_of_a_patient_are_drawn_together():
    train = cases(60, patient=lambda i: f"p{i // 3}")
    for seed in range(5):
        drawn = draw_labelled(train, 0.5, seed)
        assert len({case.patient for case in drawn}) == 10
