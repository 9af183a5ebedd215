"""The record of a run says what it was, in JSON, and what it took."""

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from harness.config.request import Request
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.runs.record import make_record

REPORT = {"clock": {"step": {"p50_ms": 2.0}}, "used": {"precision": "fp32"}, "resumed": 2, "skipped": [3]}


@pytest.fixture
def run_plan(sixteen_cases, tmp_path):
    settings = ("finetune.crop=32", "pretrain.crop=32", "backbone.features=4,4,8,8,8", "evaluate.tolerance=2")
    request = Request(
        method="simmim", task="msd_hippocampus", data=sixteen_cases, settings=settings, label_fraction=0.5
    )
    request = replace(request, runs=tmp_path, seed=3)
    return plan(request, *locate(request))


def made(run_plan, memory=None, stage=None):
    tuned = {"trained": REPORT, "memory": memory or {}, "transfer": {"text": "all of it", "loaded": 5}}
    network = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return make_record(run_plan, {"average": {"dice": 0.5}}, {"finetune": 1.23456}, tuned, network, stage or {})


def test_a_record_is_json_that_says_what_was_run_on_what(run_plan):
    record = made(run_plan)
    assert json.loads(json.dumps(record, allow_nan=False)) == json.loads(json.dumps(record))
    assert (record["method"], record["seed"], record["label_fraction"]) == ("simmim", 3, 0.5)
    assert record["overrides"]["evaluate.tolerance"] == "2"
    data = record["data"]
    assert (data["source"], data["n_train"], data["n_test"], data["n_test_seen"]) == ("phantom", 7, 3, 0)
    assert data["train"] == [case for case in data["pretrain"] if case in data["train"]]
    assert (len(data["train"]), data["label_subset"], record["rules"]) == (7, "per seed", 2)
    assert len(data["pretrain"]) == 13
    assert not {*data["pretrain"]} & {*data["test"]}
    assert record["metric_definitions"]["surface_dice_tolerance_mm"] == 2
    assert record["task_description"]["targets"] == {"anterior": [1], "posterior": [2]}
    assert record["parameters"] == 3 * 4 + 4 + 4 + 4  # weights and biases; running moments are none
    assert record["transfer"] == {"loaded": 5}
    assert record["timing"]["seconds"] == {"finetune": 1.235}
    assert (record["resumed"], record["skipped_steps"]) == (
        {"pretrain": 0, "finetune": 2},
        {"pretrain": [], "finetune": [3]},
    )
    assert record["environment"]["torch"] == torch.__version__


def test_the_peak_of_a_run_is_the_larger_one_of_its_processes(run_plan):
    small = made(run_plan, memory={"host_peak_gib": 1e-6, "device_peak_gib": None})["memory"]["run"]
    assert small["host_peak_gib"] > 0.01  # of this process
    large = made(run_plan, memory={"host_peak_gib": 1000.0, "device_peak_gib": 7.5})["memory"]["run"]
    assert large == {"host_peak_gib": 1000.0, "device_peak_gib": 7.5}
    assert made(run_plan)["memory"]["run"]["device_peak_gib"] is None


def test_what_pre_training_said_is_in_the_record(run_plan):
    stage = {
        "clock": {"a": 1},
        "used": {"b": 2},
        "resumed": 1,
        "skipped": [9],
        "memory": {"c": 3},
        "prepared": {"words": 7},
    }
    record = made(run_plan, stage=stage)
    assert record["timing"]["pretrain_step"] == {"a": 1}
    assert record["computed_with"] == {"pretrain": {"b": 2}, "finetune": {"precision": "fp32"}}
    assert record["memory"]["pretrain"] == {"c": 3}
    assert record["method_prepare"] == {"words": 7}
    assert (record["resumed"]["pretrain"], record["skipped_steps"]["pretrain"]) == (1, [9])
