"""The suites that come with the harness."""

from pathlib import Path

import pytest

from harness import UserError
from harness.config.request import Request
from harness.config.suites import describe_suite, suite_file, suite_names
from harness.sweeps.suites import read_suite


@pytest.mark.parametrize("name", suite_names())
def test_a_shipped_suite_has_a_version_a_description_and_several_tasks_and_seeds(name):
    assert name.rpartition("-v")[2].isdecimal()
    assert len(describe_suite(name)) > 40
    suite = read_suite(name, Request())
    assert len({request.task for request in suite.requests}) > 2
    assert len({request.seed for request in suite.requests}) > 1


def test_the_big_suite_has_the_decathlon_and_btcv():
    suite = read_suite("ssl3d-v1", Request(data=Path("/data")))
    tasks = {request.task for request in suite.requests}
    assert len(tasks) == 11
    assert {"btcv", "msd_liver", "msd_prostate"} < tasks
    assert {request.shots for request in suite.requests} == {0, 10}
    assert all(request.data == Path("/data") for request in suite.requests)
    assert suite.on_real_data


def test_a_suite_may_be_a_file_of_ones_own(tmp_path):
    assert suite_file(str(tmp_path / "mine-v1.toml")) == tmp_path / "mine-v1.toml"
    with pytest.raises(UserError, match="did you mean 'phantoms-v1'"):
        suite_file("phantom-v1")
