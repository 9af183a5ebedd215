"""Which records answer a suite."""

import json
from pathlib import Path

import pytest

from harness import UserError
from harness.config.request import Request
from harness.sweeps.suites import read_suite
from tests.leaderboards.made import merge, write_run

TOML = """
[defaults]
task = ["t", "u"]
seed = [0, 1]
settings = { "finetune.lr" = 0.003, "pretrain.steps" = 50 }
[[matrix]]
label_fraction = 1.0
[[matrix]]
shots = 2
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "mine-v1.toml").write_text(TOML)
    return read_suite(str(tmp_path / "mine-v1.toml"), Request())


@pytest.fixture
def record(tmp_path):
    folder = write_run(tmp_path / "runs", "hybridmim", overrides={"finetune.lr": "0.003", "pretrain.steps": "9"})
    return json.loads((folder / "record.json").read_text())


def test_cells_are_those_of_the_control_and_of_each_method(suite):
    cells = suite.cells(["mae", "voco", "scratch"], ["pretrain.steps=7"])
    assert suite.name == "mine-v1"
    assert len(cells) == 3 * 8
    settings = {cell.request.method: cell.request.settings for cell in cells}
    assert settings["scratch"] == ("finetune.lr=0.003", "pretrain.steps=50")
    assert settings["voco"] == (*settings["scratch"], "pretrain.steps=7")


def test_pretraining_is_the_methods_own(suite, record):
    request = suite.request_of(record)
    assert (request.task, request.seed, request.shots) == ("t", 0, 0)
    assert suite.request_of(merge(record, {"overrides": record["overrides"] | {"method.mask_ratio": "0.3"}})) == request


@pytest.mark.parametrize(
    "changes",
    [
        {"task": "v"},
        {"seed": 2},
        {"backbone": "resenc"},
        {"preset": "small"},
        {"protocol": "frozen"},
        {"overrides": {"finetune.lr": "0.001"}},
        {"overrides": {"evaluate.overlap": "0.5"}},
        {"label_fraction": 0.5, "data": {"n_train": 1}},
        {"data": {"source": "phantom"}},
        {"data": {"split": "1/5"}},
        {"mode": "generic"},
        {"config": {"label_seed": 3}},
        {"config": {"tune": "finetune.lr=1,2"}},
        {"transfer": {"requested": "encoder"}},
    ],
    ids=str,
)
def test_a_run_of_another_comparison_is_not_in_it(suite, record, changes):
    assert suite.request_of(merge(record, changes)) is None


def test_shots_are_recognised_by_the_number_of_training_cases(suite, record):
    few = merge(record, {"label_fraction": 0.1, "data": {"n_train": 2}})
    assert suite.request_of(few).shots == 2
    assert suite.request_of(merge(few, {"data": {"n_train": 3}})) is None


def test_shots_of_a_preset_are_recognised(tmp_path, record):
    (tmp_path / "few-v1.toml").write_text('[[matrix]]\ntask = "t"\npreset = "fewshot"\n')
    suite = read_suite(str(tmp_path / "few-v1.toml"), Request())
    few = merge(record, {"preset": "fewshot", "overrides": {}, "label_fraction": 0.1, "data": {"n_train": 4}})
    few["overrides"] = {}
    assert suite.request_of(few) is not None
    assert suite.request_of(merge(few, {"data": {"n_train": 3}})) is None


def test_what_changes_no_result_tells_no_runs_apart(tmp_path, record):
    path = tmp_path / "mine-v1.toml"
    path.write_text(
        '[[matrix]]\ntask = "t"\nlabel_seed = 3\nsettings = { "finetune.workers" = 4, "finetune.lr" = 0.003 }\n'
    )
    assert read_suite(str(path), Request()).request_of(record) is not None
    few = merge(record, {"label_fraction": 0.5, "data": {"n_train": 1}})
    assert read_suite(str(path), Request()).request_of(few) is None


def test_a_control_serves_every_mode(suite, record):
    nothing = merge(record, {"method": "scratch", "mode": "generic"})
    nothing["timing"]["pretrain_step"] = None
    assert suite.request_of(nothing) is not None


def test_a_suite_names_no_methods(tmp_path):
    path = tmp_path / "mine-v1.toml"
    path.write_text('[[matrix]]\ntask = "brats"\nmethod = "voco"\n')
    with pytest.raises(UserError, match="names methods"):
        read_suite(str(path), Request())


def test_data_of_a_suite_is_real_unless_it_says_phantom(tmp_path):
    path = tmp_path / "mine-v1.toml"
    path.write_text('[[matrix]]\ntask = "brats"\ndata = "phantom"\n')
    assert not read_suite(str(path), Request(data=Path("/data"))).on_real_data
    path.write_text('[[matrix]]\ntask = "brats"\n')
    assert read_suite(str(path), Request()).on_real_data
