"""The shipped lists of test cases."""

import re

import pytest

from tasks.case_lists import read_test_ids


@pytest.mark.parametrize(
    ("name", "number", "form"),
    [("brats2020", 74, r"BraTS20_Training_\d{3}"), ("msd_hippocampus", 44, r"hippocampus_\d{3}")],
)
def test_a_list_has_the_names_of_a_fifth_of_the_cases(name, number, form):
    ids = read_test_ids(name)
    assert len(ids) == number
    assert all(re.fullmatch(form, each) for each in ids)


def test_a_list_that_is_not_shipped_is_an_error():
    with pytest.raises(FileNotFoundError):
        read_test_ids("no_such_task")
