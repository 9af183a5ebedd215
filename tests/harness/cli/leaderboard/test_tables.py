"""`harness leaderboard build`: its columns, and what keeps a table of its own."""

import json
import re

import pandas as pd
import pytest

from tests.harness.commands import BUDGET, SMALL, fails, harness, short_run
from tests.harness.nnunet import nnunet
from tests.leaderboards.made import write_run


def test_leaderboard_has_the_contracts_columns(finished_runs, capsys):
    harness("leaderboard", "build", "--runs", finished_runs)
    assert "PHANTOM DATA" in capsys.readouterr().out
    frame = pd.read_csv(finished_runs / "leaderboard.csv")
    assert ",".join(frame.columns) == (
        "task,data,preset,mode,protocol,label_fraction,method,backbone,n_seeds,target,dice,dice_ci_low,dice_ci_high,"
        "hd95_mm,hd95_ci_low,hd95_ci_high,n_cases,n_missed,delta_dice_vs_scratch,delta_ci_low,delta_ci_high,"
        "p_value_holm,rank,step_ms_p50,pretrain_seconds,source,run_ids,n_test_seen,"
        "surface_dice,surface_dice_ci_low,surface_dice_ci_high,surface_tolerance_mm,metric_policy,note,"
        "label_subset,control,headroom_share,headroom_share_ci_low,headroom_share_ci_high,steps_to_scratch,seconds_to_scratch,"
        "gpu_hours,kwh,peak_memory_gib"
    )
    average = frame[frame["target"] == "average"].set_index("method")
    (method,) = [name for name in average.index if name.startswith("hybridmim{pretrain.")]
    difference = average.loc[method, "dice"] - average.loc["scratch", "dice"]
    assert average.loc[method, "delta_dice_vs_scratch"] == pytest.approx(difference, abs=1e-5)
    assert average["p_value_holm"].isna().all()
    assert average["data"].str.startswith("phantom:").all()


def test_one_control_serves_both_modes(corpus_runs, capsys):
    harness("leaderboard", "build", "--runs", corpus_runs)
    frame = pd.read_csv(corpus_runs / "leaderboard.csv")
    average = frame[frame["target"] == "average"].set_index(["mode", "method"])
    assert {mode for mode, method in average.index if method == "scratch"} == {"generic", "task-specific"}
    (generic,) = [method for mode, method in average.index if mode == "generic" and method != "scratch"]
    assert re.fullmatch(r"simmim\{corpus=scans@[0-9a-f]{8}, pretrain[^{}]*\}", generic)
    assert not pd.isna(average.loc[("generic", generic), "delta_dice_vs_scratch"])
    assert (frame["n_test_seen"] == 0).all()


def test_folds_and_plumbing_keep_tables_of_their_own(data_folders, tmp_path, capsys):
    for how in ("1/5", "2/5", "same"):
        harness(*short_run("scratch", data_folders / "msd_hippocampus"), "--runs", tmp_path, "--split", how)
    out, err = capsys.readouterr()
    assert "PLUMBING CHECK" in err
    assert "TEST CASES WERE TRAINED" in out
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    labels = frame["preset"].unique()
    assert [re.search(r"split=[^,}]+", label)[0] for label in sorted(labels)] == [
        "split=1/5",
        "split=2/5",
        "split=same",
    ]
    same = frame[frame["preset"].str.contains("split=same") & (frame["target"] == "average")].iloc[0]
    assert same["n_test_seen"] == same["n_cases"] == 5
    tested = [json.loads(path.read_text())["data"]["test"] for path in tmp_path.glob("*/record.json")]
    assert sorted(map(len, tested)) == [1, 1, 5]


def test_cases_and_targets_may_be_called_na_and_null(hippocampus_phantom, tmp_path, capsys):
    labels = {"background": 0, "null": 1, "nan": 2}
    folder = nnunet(hippocampus_phantom, tmp_path / "mine", ["NA", "null", "nan", "None"], labels)
    words = ["run", "--method", "scratch", "--task", folder, "--runs", tmp_path / "runs", "--split", "same"]
    harness(*words, *BUDGET, *SMALL["unet"])
    frame = pd.read_csv(tmp_path / "runs" / "leaderboard.csv", keep_default_na=False)
    assert set(frame["target"]) == {"average", "null", "nan"}
    assert set(frame["n_cases"]) <= {"4", 4}


def test_a_damaged_record_is_left_out_said_and_is_the_status(tmp_path, capsys):
    good, bad = write_run(tmp_path / "runs", "good", dice=0.7), write_run(tmp_path / "runs", "bad")
    (bad / "record.json").write_text("{")
    harness("leaderboard", "build", "--runs", tmp_path / "runs", "--json", status=2)
    out, err = capsys.readouterr()
    assert err.startswith("harness: error: left out: ")
    assert bad.name in err
    rows = {row["target"]: row for row in json.loads(out)}
    assert {row["method"] for row in rows.values()} == {"good"}
    cases = pd.read_csv(good / "cases.csv")
    means = cases.groupby("target")["dice"].mean()  # pandas leaves out what was not scored, too
    for target, row in rows.items():
        assert row["dice"] == pytest.approx(means.mean() if target == "average" else means[target], abs=1e-6)


def test_what_is_not_there_is_refused(tmp_path, capsys):
    run = write_run(tmp_path / "runs", "good")
    words = ["--runs", tmp_path / "runs"]
    assert "no finished run in" in fails(capsys, "leaderboard", "build", "--runs", tmp_path)
    assert "is not a folder" in fails(capsys, "leaderboard", "ranks", "--runs", tmp_path / "gone")
    assert "does not exist" in fails(capsys, "leaderboard", "validate", tmp_path / "gone.csv", *words)
    figure = tmp_path / "x.pdf"
    assert "are written as .png or .svg" in fails(capsys, "leaderboard", "panels", run.name, "--out", figure, *words)
    assert "unknown run 'god'" in fails(capsys, "leaderboard", "panels", "god", "--out", tmp_path / "x.png", *words)
    assert not figure.exists()


def test_validation_tells_a_changed_score_from_a_valid_run(tmp_path, capsys):
    run = write_run(tmp_path / "runs", "good")
    harness("leaderboard", "validate", tmp_path / "runs", run / "record.json", "--runs", tmp_path / "runs")
    assert capsys.readouterr().out.splitlines() == [
        f"{tmp_path}/runs: 1 run, valid",
        f"{run}/record.json: 1 run, valid",
    ]
    text = (run / "cases.csv").read_text()
    (run / "cases.csv").write_text(text.replace("0.5,4.0", "0.9,4.0"))
    harness("leaderboard", "validate", run, "--runs", tmp_path / "runs", status=2)
    out, err = capsys.readouterr()
    assert "problems" in out
    assert err.startswith("harness: error: ")
