"""Runs side by side."""

from harness.cli.main import main
from tests.harness.commands import folder_of, make_run


def test_panels_show_the_runs_side_by_side(predicted_runs, hippocampus_phantom, tmp_path, capsys):
    out = tmp_path / "panels.png"
    names = [folder_of(predicted_runs, method).name for method in ("scratch", "simmim")]
    words = ["leaderboard", "panels", *names, "--runs", str(predicted_runs), "--data", str(hippocampus_phantom)]
    assert main([*words, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("hippocampus_") >= 1
    assert main([*words, "--out", str(out), "--case", "nobody"]) == 2
    assert "'nobody' is no test case" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "panels.txt")]) == 2
    assert "written as .png or .svg" in capsys.readouterr().err


def test_panels_need_predictions(hippocampus_phantom, tmp_path, capsys):
    folder = make_run(tmp_path, hippocampus_phantom)
    words = ["leaderboard", "panels", folder.name, "--runs", str(tmp_path), "--data", str(hippocampus_phantom)]
    assert main([*words, "--out", str(tmp_path / "p.png")]) == 2
    assert "--save-predictions" in capsys.readouterr().err
