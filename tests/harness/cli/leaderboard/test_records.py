"""`--filter`: which runs a table is made of."""

import json

import pytest

from tests.harness.commands import fails, harness
from tests.leaderboards.made import write_run


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        for method in ("scratch", "hybridmim", "voco", "volume_fusion"):
            write_run(tmp_path / "runs", method, seed)
    write_run(tmp_path / "runs", "hybridmim", 0, task="other")
    return tmp_path / "runs"


def rows(capsys, runs, *filters) -> set:
    """Task, method and number of seeds of the rows that are left."""
    words = [word for text in filters for word in ("--filter", text)]
    capsys.readouterr()
    harness("leaderboard", "build", "--runs", runs, "--json", *words)
    return {(row["task"], row["method"], row["n_seeds"]) for row in json.loads(capsys.readouterr().out)}


def test_a_filter_of_methods_leaves_scratch(runs, capsys):
    assert rows(capsys, runs, "method=voco") == {("t", "scratch", 2), ("t", "voco", 2)}
    assert rows(capsys, runs, "method=vo*") == {("t", "scratch", 2), ("t", "voco", 2), ("t", "volume_fusion", 2)}


def test_values_are_alternatives_and_filters_add_up(runs, capsys):
    left = rows(capsys, runs, "method=voco,hybridmim", "seed=1")
    assert left == {("t", "scratch", 1), ("t", "voco", 1), ("t", "hybridmim", 1)}
    assert rows(capsys, runs, "task=other") == {("other", "hybridmim", 1)}
    assert rows(capsys, runs, "label_fraction=1", "task=o*") == {("other", "hybridmim", 1)}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tsk=t", "unknown field of runs 'tsk': did you mean 'task'?"),
        ("task", "--filter task is not FIELD=VALUE"),
        ("task=brats", "task=brats leaves no run: task is one of other, t"),
        ("method=hybridmin", "method=hybridmin leaves no run: method is one of hybridmim, scratch"),
    ],
)
def test_wrong_filters_are_answered_in_words(text, says, runs, capsys):
    assert says in fails(capsys, "leaderboard", "build", "--runs", runs, "--filter", text)
