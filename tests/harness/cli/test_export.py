"""`harness export`: which run, which form, and where to."""

import json

import pytest
from safetensors.torch import load_file

from tests.harness.commands import fails, folder_of, harness


def test_weights_go_to_a_folder_named_after_the_run_and_the_form(finished_simmim, tmp_path, monkeypatch, capsys):
    run = folder_of(finished_simmim, "simmim")
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    harness("export", "--run", run.name[:-3], "--format", "safetensors", "--runs", finished_simmim)
    said = capsys.readouterr().out.split()
    out = f"{run.name}-safetensors"
    names = ("README.md", "pipeline.json", "weights.lineage.safetensors", "weights.safetensors")
    assert said == [f"{out}/{name}" for name in names]
    there, here = (load_file(path) for path in (run / "weights.safetensors", tmp_path / said[3]))
    assert there.keys() == here.keys()
    assert all(bool((there[key] == here[key]).all()) for key in there)
    card = (tmp_path / said[0]).read_text()
    record = json.loads((run / "record.json").read_text())
    assert record["data"]["licence"] in card.replace("\\", "")
    # A second time nothing is overwritten.
    words = ["export", "--run", run, "--format", "safetensors"]
    assert "is there already: give a new folder with --out" in fails(capsys, *words)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--run", "simmim-nowhere", "--format", "monai"], "unknown run in"),
        (["--run", "x", "--format", "pickle"], "unknown value of --format 'pickle'"),
        (["--run", "x"], "--format"),
        (["--format", "monai"], "--run"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_written(words, says, tmp_path, capsys):
    assert says in fails(capsys, "export", *words, "--runs", tmp_path, "--out", tmp_path / "out")
    assert not list(tmp_path.iterdir())
