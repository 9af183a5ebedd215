"""`harness sweep`: what is shared, what fails, what was finished before."""

import argparse
import json

import pytest

from harness.cli import sweep
from harness.cli.main import main
from harness.sweeps import cells
from tests.harness.sweep_files import TINY_SWEEP
from tests.leaderboards.made import write_run


@pytest.mark.slow
def test_a_sweep_runs_shares_pretraining_lists_failures_and_skips_what_is_finished(
    tmp_path, hippocampus_phantom, capsys
):
    path = tmp_path / "mine.toml"
    path.write_text(
        TINY_SWEEP
        + '[[matrix]]\nmethod = "scratch"\n'
        + '[[matrix]]\nmethod = "simmim"\nlabel_fraction = [0.5, 1.0]\n'
        + '[[matrix]]\nmethod = "simmim"\nsettings = { "method.patch" = 12 }\n'
    )
    words = ["sweep", str(path), "--data", str(hippocampus_phantom), "--runs", str(tmp_path / "runs"), "--jobs", "2"]
    assert main([*words, "--dry-run"]) == 2
    assert "3 to run, 1 that cannot run" in capsys.readouterr().out
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert "does not divide the crop" in err
    assert "leaderboard of this sweep" in out
    records = sorted((tmp_path / "runs").glob("*/record.json"))
    assert len(records) == 3
    # Both label fractions start from one pre-training.
    assert len(list((tmp_path / "runs" / "cache" / "pretrain").iterdir())) == 1
    fractions = [json.loads(p.read_text())["label_fraction"] for p in records if "-simmim-" in str(p)]
    assert sorted(fractions) == [0.5, 1.0]
    times = [p.stat().st_mtime_ns for p in records]
    assert main(words) == 2
    assert "3 finished before, 0 to run, 1 that cannot run" in capsys.readouterr().out
    assert [p.stat().st_mtime_ns for p in records] == times


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--slurm", "partition=gpu"], "is for --launcher slurm"),
        (["--estimate"], "is for --dry-run"),
        (["--launcher", "slurm", "--slurm", "partition"], "is not of the form KEY=VALUE"),
    ],
)
def test_wrong_launchers_are_answered_in_words(more, says, tmp_path, hippocampus_phantom, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(TINY_SWEEP + '[[matrix]]\nmethod = "scratch"\n')
    words = ["sweep", path, "--data", hippocampus_phantom, "--runs", tmp_path / "runs", *more]
    assert main([str(word) for word in words]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("asked", [False, True])
def test_a_dry_run_measures_only_where_it_is_asked_to(asked, tmp_path, hippocampus_phantom, monkeypatch):
    path, measured = tmp_path / "mine.toml", []
    path.write_text(TINY_SWEEP + '[[matrix]]\nmethod = "scratch"\n')
    monkeypatch.setattr(sweep, "print_estimates", lambda requests, jobs: measured.append(len(requests)) or 0)
    words = ["sweep", path, "--data", hippocampus_phantom, "--runs", tmp_path / "runs", "--dry-run"]
    assert main([str(word) for word in words] + ["--estimate"] * asked) == 0
    assert measured == [1] * asked


def test_a_misspelt_preset_is_one_line(tmp_path, capsys):
    (tmp_path / "s.toml").write_text(TINY_SWEEP)
    assert main(["sweep", str(tmp_path / "s.toml"), "--preset", "papr", "--runs", str(tmp_path), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "unknown preset 'papr': did you mean 'paper'?" in line


def test_a_run_of_two_cells_is_reported_once_and_a_damaged_one_is_said(tmp_path, monkeypatch, capsys):
    whole, damaged = write_run(tmp_path / "runs", seed=0), write_run(tmp_path / "runs", seed=1)
    (damaged / "cases.csv").unlink()
    outcomes = [cells.Outcome(None, folder, "", 1.0) for folder in (whole, damaged, whole)]
    monkeypatch.setattr(cells, "select_cells", lambda *arguments: ([], outcomes))
    arguments = argparse.Namespace(
        estimate=False, dry_run=False, retry=False, launcher="local", slurm=[], processes=1, jobs=1
    )
    reported = []
    assert sweep.run_cells([], arguments, tmp_path / "notes", reported.extend) == 2
    assert [run.run_id for run in reported] == [whole.name]
    assert "cases.csv" in capsys.readouterr().err
