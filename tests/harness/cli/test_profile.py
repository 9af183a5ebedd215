"""`harness profile`: what it prints is what was measured, and wrong input is refused in a line."""

import csv
import json

import pytest

from harness.cli.main import main
from harness.config.request import Request
from harness.costs import profile
from harness.costs.suites import suite_names, suite_path
from harness.costs.trial import resolve_trial
from harness.sweeps.cells import read
from leaderboards import profiles
from tests.harness.small_requests import SMALL_PROFILE


def words(*more):
    settings = [word for pair in SMALL_PROFILE for word in ("--set", pair)]
    return ["profile", "--method", "hybridmim", "--task", "msd_hippocampus", "--rounds", "2", *settings, *more]


@pytest.mark.usefixtures("quick_steps")
def test_profile_writes_table_csv_and_figure(tmp_path, capsys):
    out = tmp_path / "new" / "steps.csv"
    assert main(words("--set", "method.region=32,16,32", "--compare", "partial", "whole", "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "hybridmim, partial, unet, 32x32x32 x 2, fp32" in printed
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == profiles.COLUMNS
    partial, whole = rows
    assert (partial["variant"], whole["variant"]) == ("partial", "whole")
    assert float(partial["gflop"]) < float(whole["gflop"])
    for row in rows:
        step = sum(float(row[f"{phase}_ms_p50"]) for phase in ("forward", "backward", "optimizer"))
        assert float(row["step_ms_p50"]) == pytest.approx(step, rel=0.3)
        assert float(row["step_ms_p95"]) >= float(row["step_ms_p50"])
        assert float(row["samples_per_s"]) == pytest.approx(2000 / float(row["step_ms_p50"]), rel=1e-3)
        assert int(row["rounds"]) == 2
        assert float(row["host_peak_gib"]) > 0
        assert row["device_peak_gib"] == ""
    assert float(partial["first_over_this"]) == 1
    picture = out.with_suffix(".png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert out.with_suffix(".svg").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("quick_steps")
def test_crops_batches_and_precisions_are_combined(tmp_path, capsys):
    axes = ["--precision", "fp32", "--precision", "bf16", "--batch", "2", "--batch", "3", "--json"]
    assert main(words(*axes, "--out", str(tmp_path / "a.csv"))) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch_size"], row["precision"]) for row in rows] == [
        *((2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    ]
    assert all(row["gemm_tflop_per_s"] > 0 for row in rows)


@pytest.mark.usefixtures("quick_steps")
def test_a_sweep_is_profiled_without_its_controls(tmp_path, capsys):
    file = tmp_path / "two.toml"
    settings = {pair.partition("=")[0]: pair.partition("=")[2] for pair in SMALL_PROFILE}
    listed = ", ".join(f'"{key}" = "{value}"' for key, value in settings.items())
    file.write_text(
        f'[defaults]\ntask = "msd_hippocampus"\nsettings = {{ {listed} }}\n'
        '[[matrix]]\nmethod = "scratch"\n[[matrix]]\nmethod = ["simmim", "volume_fusion"]\n'
    )
    assert main(["profile", "--sweep", str(file), "--rounds", "1", "--runs", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    assert "left out: method 'scratch' pre-trains nothing" in said.err
    with (tmp_path / "runs" / "profiles" / "two.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["simmim", "volume_fusion"]


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--compare", "whle"], "'whole'"),
        (["--method", "scratch"], "pre-trains nothing"),
        (["--backbone", "unnet"], "'unet'"),
        (["--precision", "fp8"], "pretrain.precision=fp8"),
        (["--crop", "33"], "pretrain.crop"),
        (["--out", "steps.txt"], ".csv"),
        (["--rounds", "0"], "--rounds"),
        (["--sweep", "none.toml"], "leave out --method"),
    ],
)
@pytest.mark.usefixtures("quick_steps")
def test_wrong_input_is_one_line(more, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words(), *more]) == 2
    error = capsys.readouterr().err
    assert said.strip("'") in error
    assert len([line for line in error.splitlines() if line.startswith("harness")]) == 1


@pytest.mark.slow
def test_the_paper_suite_is_the_papers_shapes():
    assert "paper" in suite_names()
    cells = [resolve_trial(cell.request) for cell in read(suite_path("paper"), Request(method="", task=""))]
    shapes = {(cell.settings.crop, cell.settings.batch_size, len(cell.task.channels)) for cell in cells}
    assert shapes == {((128,) * 3, 2, 4), ((96,) * 3, 4, 1)}
    assert {cell.settings.precision for cell in cells} == {"fp32", "bf16"}
    whole = [cell for cell in cells if "method.region=whole" in cell.request.settings]
    assert (len(cells), len(whole)) == (40, 8)


@pytest.mark.slow
def test_a_suite_is_profiled(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.toml").write_text(
        '[defaults]\ntask = "msd_hippocampus"\nmethod = "simmim"\n'
        'settings = { "backbone.features" = "4,4,8,8,8", "pretrain.crop" = "32,32,32" }\n'
    )
    monkeypatch.setattr("harness.costs.suites.FOLDER", tmp_path)
    monkeypatch.setattr(profile, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(profile, "LOOP_SECONDS", 0.1)
    assert main(["profile", "--suite", "tiny", "--out", str(tmp_path / "a.csv")]) == 0
    with (tmp_path / "a.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["rounds"] == "3"
    assert row["method"] == "simmim"
    if row["device"] == "cpu":
        assert (row["bound"], row["device_busy"], row["of_bandwidth"]) == ("", "", "")
    assert main(["profile", "--suite", "tny"]) == 2
    assert "'tiny'" in capsys.readouterr().err
    assert main(["profile", "--suite", "tiny", "--sweep", "a.toml"]) == 2
