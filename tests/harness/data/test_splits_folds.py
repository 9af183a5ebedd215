"""Folds of a file as nnU-Net writes it: who trains, who is tested, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from harness.api.registry import Registry
from harness.api.task import Case
from harness.data.splits import check_split, parse_fold, read_fold, split_cases
from harness.system.errors import UserError

TASK = replace(Registry().task("msd_hippocampus"), test_ids=None)


def cases(number, patient=lambda i: ""):
    return [Case(f"case_{i:03d}", (Path(f"{i}"),), None, patient=patient(i)) for i in range(number)]


def ids(some):
    return {case.id for case in some}


def write_folds(path, total=2, number=10):
    """A file as nnU-Net writes it, of the even and the odd cases; one case is in no list."""
    names = [case.id for case in cases(number)][:-1]
    content = [{"train": names[1 - k :: 2], "val": names[k::2]} for k in range(total)]
    path.write_text(json.dumps(content))
    return path


def test_a_file_of_folds_says_who_trains_and_who_is_tested(tmp_path):
    path = write_folds(tmp_path / "splits_final.json")
    first, second = (split_cases(TASK, cases(10), check_split(f"{k}/2@{path}")) for k in (1, 2))
    assert ids(first.test) == {f"case_{i:03d}" for i in (0, 2, 4, 6, 8)}
    assert ids(first.train) == ids(second.test) == {f"case_{i:03d}" for i in (1, 3, 5, 7)}
    assert (first.by, first.unused) == ("file", ["case_009"])


def test_a_patient_whom_a_file_tests_does_not_train(tmp_path):
    path = write_folds(tmp_path / "s.json")
    split = split_cases(TASK, cases(10, patient=lambda i: "same" if i < 2 else f"p{i}"), f"1/2@{path}")
    assert ids(split.test) == {f"case_{i:03d}" for i in (0, 2, 4, 6, 8)}
    assert ids(split.train) == {f"case_{i:03d}" for i in (3, 5, 7)}
    assert split.left_out == [("case_001", "case_000")]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no file"),
        ("{", "not a list of tables"),
        ("{}", "not a list of tables"),
        ('[{"train": ["a"], "val": []}]', "not a list of tables"),
        ('[{"train": ["a"], "val": [1]}]', "not a list of tables"),
        ('[{"train": ["a"], "val": ["b"]}]', "has one fold: give a file of two folds or more"),
        ('[{"train": ["a", "b"], "val": ["b"]}, {"train": ["b"], "val": ["a"]}]', "trains and tests on b in fold 1"),
    ],
)
def test_a_file_that_is_no_file_of_folds_is_refused(content, says, tmp_path):
    path = tmp_path / "s.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="--split") as error:
        check_split(f"1/2@{path}")
    assert says in str(error.value)


def test_a_file_of_another_data_set_is_refused(tmp_path):
    path = write_folds(tmp_path / "s.json", number=12)
    with pytest.raises(
        UserError, match="lists 1 cases that task 'msd_hippocampus' does not have here, for instance 'case_010'"
    ):
        split_cases(TASK, cases(10), f"1/2@{path}")


def test_the_name_of_a_fold_has_no_path_and_follows_the_content(tmp_path):
    first, second = write_folds(tmp_path / "a.json"), write_folds(tmp_path / "b.json")
    assert parse_fold(f"1/2@{first}").canonical == parse_fold(f"1/2@{second}").canonical
    assert parse_fold(f"1/2@{first}").canonical.startswith("1/2@")
    write_folds(second, number=8)
    assert parse_fold(f"1/2@{first}").canonical != parse_fold(f"1/2@{second}").canonical
    assert parse_fold("2/5").canonical == "2/5"


@pytest.mark.parametrize("how", ["0/5", "6/5", "1/1", "1/5@", "a/5", "1", "fixed", ""])
def test_other_words_name_no_fold(how):
    assert parse_fold(how) is None


def test_a_fold_has_its_number_its_total_and_its_file():
    fold = parse_fold("2/5@a@b.json")
    assert (fold.number, fold.total, fold.file) == (2, 5, Path("a@b.json"))
    assert parse_fold("5/5").file is None


def test_a_name_that_is_listed_twice_counts_once(tmp_path):
    path = tmp_path / "s.json"
    names = ["case_000", "case_000", "case_001"]
    path.write_text(
        json.dumps([{"train": names, "val": ["case_002", "case_002"]}, {"train": names, "val": ["case_003"]}])
    )
    assert read_fold(parse_fold(f"1/2@{path}")) == (["case_000", "case_001"], ["case_002"])
