"""`harness tune`: the same trials for every method, in one command."""

import json

from harness.cli.main import main
from tests.conftest import TINY, TINY_BUDGET
from tests.harness.commands import fails

SETTINGS = [word for pair in (*TINY["unet"], *TINY_BUDGET, "finetune.steps=3") for word in ("--set", pair)]


def words(data, runs, *more) -> list[str]:
    """Tune scratch and untrained over two learning rates."""
    methods = ("--method", "scratch", "--method", "untrained")
    grid = ("--grid", "finetune.lr=1e-9,3e-3")
    return [
        str(word)
        for word in ("tune", *methods, "--task", "msd_hippocampus", *grid, "--data", data, "--runs", runs, *more)
    ]


def test_it_prints_the_trials_of_each_method_and_one_table(sixteen_cases, tmp_path, capsys):
    assert main(words(sixteen_cases, tmp_path, *SETTINGS)) == 0
    out = capsys.readouterr().out
    for method in ("scratch", "untrained"):
        assert f"{method}: 2 trials, * is chosen on 2 validation cases; no test case was used" in out
    assert out.count("finetune, tuned(2)") == 1
    assert sum(line.startswith("*") for line in out.splitlines()) == 2
    assert main(words(sixteen_cases, tmp_path, *SETTINGS, "--json")) == 0
    answer = json.loads(capsys.readouterr().out)
    assert set(answer) == {"scratch", "untrained"}
    assert answer["scratch"]["grid"] == "finetune.lr=1e-9,3e-3"


def test_nothing_is_computed_where_one_of_the_methods_cannot_be_tuned(sixteen_cases, tmp_path, capsys):
    said = fails(capsys, *words(sixteen_cases, tmp_path, *SETTINGS, "--method", "nonsense"))
    assert "nonsense" in said
    assert "empty" in fails(capsys, *words(sixteen_cases, tmp_path, *SETTINGS, "--grid", ""))
    assert not list(tmp_path.glob("msd_hippocampus-*"))


def test_a_blank_grid_is_not_taken_for_none(sixteen_cases, tmp_path, capsys):
    run = ("run", "--method", "scratch", "--task", "msd_hippocampus", "--data", sixteen_cases, "--runs", tmp_path)
    assert "--tune is blank" in fails(capsys, *run, "--tune", " ")
