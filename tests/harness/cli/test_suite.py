"""`harness suite`: run, status and report."""

import json

import pandas as pd
import pytest

from tests.harness.commands import fails, harness
from tests.leaderboards.made import write_run

SUITE = """
description = "two phantoms"
[defaults]
data = "phantom"
task = ["msd_hippocampus", "msd_spleen"]
seed = [0, 1]
settings = { "finetune.steps" = 2, "finetune.warmup_steps" = 0, "finetune.crop" = [32, 32, 64], "finetune.validation" = 0, \
"pretrain.steps" = 2, "pretrain.warmup_steps" = 0, "pretrain.crop" = [32, 32, 64], "backbone.features" = [4, 4, 8, 8, 8] }
"""


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "two-v1.toml").write_text(SUITE)
    return tmp_path / "two-v1.toml"


def records_of(runs, methods, tasks=("t", "u"), seeds=(0, 1)):
    """Made records, and a suite that they answer."""
    for task in tasks:
        for seed in seeds:
            for method, dice in methods.items():
                write_run(runs, method, seed, dice=dice, task=task, cases=10)
    file = runs.parent / "made-v1.toml"
    file.write_text('[[matrix]]\ntask = ["t", "u"]\nseed = [0, 1]\n')
    return file


@pytest.mark.slow
def test_a_suite_runs_end_to_end(suite, tmp_path, capsys):
    words = ["suite", "run", suite, "--method", "volume_fusion", "--jobs", "2", "--runs", tmp_path / "runs"]
    harness(*words)
    out = capsys.readouterr().out
    assert "8 cells: 0 finished before, 8 to run" in out
    assert "two-v1: consensus over 2 tables" in out
    assert "PHANTOM DATA in it" in out
    harness(*words)
    assert "8 finished before, 0 to run" in capsys.readouterr().out
    harness("suite", "status", suite, "--runs", tmp_path / "runs")
    assert capsys.readouterr().out.count("2/2") == 4


def test_a_dry_run_lists_scratch_too(suite, tmp_path, capsys):
    suite.write_text(SUITE.replace(', "msd_spleen"', ""))
    harness("suite", "run", suite, "--method", "mae", "--runs", tmp_path / "runs", "--dry-run")
    out = capsys.readouterr().out
    assert "4 cells: 0 finished before, 4 to run" in out
    assert out.count("to run: scratch") == out.count("to run: mae") == 2


def test_the_report_is_made_from_records_alone(tmp_path, capsys):
    file = records_of(tmp_path / "runs", {"scratch": 0.8, "better": 0.85, "worse": 0.7})
    write_run(tmp_path / "runs", "better", 0, preset="small", task="t")  # of another comparison
    out_folder = tmp_path / "report"
    harness("suite", "report", file, "--from", tmp_path / "runs", "--out", out_folder)
    out = capsys.readouterr().out
    assert "made-v1: consensus over 2 tables" in out
    assert "preset small" not in out
    consensus = pd.read_csv(out_folder / "consensus.csv")
    assert consensus["method"].tolist() == ["better", "scratch", "worse"]
    assert consensus["wins"].tolist()[0] == 2


def test_the_prior_changes_the_probability(tmp_path, capsys):
    file = records_of(tmp_path / "runs", {"scratch": 0.8, "better": 0.801})
    said = []
    for prior in ("0.0001", "0.1"):
        harness("suite", "report", file, "--from", tmp_path / "runs", "--out", tmp_path / prior, "--prior", prior)
        said.append(pd.read_csv(tmp_path / prior / "consensus.csv")["probability_not_better"].max())
    assert said[0] > said[1]
    assert "--prior 2 is no standard deviation" in fails(
        capsys, "suite", "report", file, "--from", tmp_path / "runs", "--prior", "2"
    )


def test_the_status_counts_runs_per_task(tmp_path, capsys):
    file = records_of(tmp_path / "runs", {"scratch": 0.8, "better": 0.85})
    record = next((tmp_path / "runs").glob("*s1*better*/record.json"))
    task = json.loads(record.read_text())["task"]
    record.unlink()
    harness("suite", "status", file, "--from", tmp_path / "runs")
    heading, better, scratch = capsys.readouterr().out.splitlines()
    assert heading.split() == ["method", "t", "unet", "100", "%", "u", "unet", "100", "%"]
    assert better.split()[2:] == (["1/2", "2/2"] if task == "t" else ["2/2", "1/2"])
    assert scratch.split()[2:] == ["2/2", "2/2"]


def test_wrong_suites_are_answered_in_words(suite, tmp_path, capsys):
    words = ["--method", "mae", "--runs", tmp_path / "runs"]
    assert "unknown suite 'phantms-v1': did you mean 'phantoms-v1'?" in fails(
        capsys, "suite", "run", "phantms-v1", *words
    )
    assert "needs real data: give its folder" in fails(capsys, "suite", "run", "ssl3d-v1", *words)
    assert "--set finetune.lr=1: the suite fixes it" in fails(
        capsys, "suite", "run", suite, *words, "--set", "finetune.lr=1"
    )
    write_run(tmp_path / "runs", "scratch")
    assert "none of 1 run belongs to two-v1" in fails(capsys, "suite", "report", suite, "--runs", tmp_path / "runs")


def test_a_suite_of_which_nothing_can_run_says_why(tmp_path, capsys):
    (tmp_path / "mine-v1.toml").write_text('[[matrix]]\ntask = "msd_spleen"\n')
    words = [
        "suite",
        "run",
        tmp_path / "mine-v1.toml",
        "--method",
        "mae",
        "--data",
        tmp_path,
        "--runs",
        tmp_path / "runs",
    ]
    harness(*words, status=2)
    err = capsys.readouterr().err
    assert "no record of" in err
    assert "Traceback" not in err


def test_two_runs_of_one_seed_count_once(tmp_path, capsys):
    suite = records_of(tmp_path / "runs", {"scratch": 0.8}, seeds=(0,))
    write_run(tmp_path / "runs", "scratch", 0, task="t", cases=10, finished="2026-02-01T00:00:00Z")
    harness("suite", "status", suite, "--runs", tmp_path / "runs")
    assert capsys.readouterr().out.count("1/2") == 2
