"""Runs that ended before fine-tuning had converged are marked; converged runs are not."""

import json

import numpy as np
import pytest

from leaderboards import convergence, records
from tests.leaderboards.made import built, called, tables, write_run


def curve(last, steps=400):
    """A Dice loss that falls from 0.8 and stays at `last` for the last tenth."""
    losses = np.linspace(0.8, last, steps)
    losses[-steps // 10 :] = last
    return losses


def write_history(folder, losses):
    steps = [{"stage": "pretrain", "step": 1, "loss": 9.0, "terms": {"dice": 0.9}}]
    steps += [
        {"stage": "finetune", "step": step, "loss": 2.0, "terms": {"dice": loss}} for step, loss in enumerate(losses, 1)
    ]
    (folder / "history.jsonl").write_text("\n".join(map(json.dumps, steps)) + "\n")


# What was measured on hippocampi: 400 steps at a learning rate of 0.001, 400 at 0.005, and 2000 at 0.003.
@pytest.mark.parametrize(("loss", "dice", "marked"), [(0.45, 0.82, True), (0.16, 0.83, False), (0.12, 0.876, False)])
def test_the_rule_on_what_was_measured(tmp_path, loss, dice, marked):
    """Target b of the made-up runs has 0.5, so that target a is set for the average."""
    folder = write_run(tmp_path, "scratch", dice=0.9)
    write_history(folder, curve(loss))
    record = json.loads((folder / "record.json").read_text())
    record["metrics"]["average"]["dice"] = dice
    (folder / "record.json").write_text(json.dumps(record))
    run = records.load_run(folder)
    assert convergence.soft_dice(run) == pytest.approx(1 - loss)
    assert bool(convergence.unconverged([run])) is marked


def test_the_record_counts_more_than_the_history(tmp_path):
    folder = write_run(tmp_path, "scratch", final_soft_dice=0.3)
    write_history(folder, curve(0.1))
    run = records.load_run(folder)
    assert convergence.soft_dice(run) == 0.3
    assert convergence.unconverged([run]).startswith("not converged (seed 0): soft Dice 0.30")


@pytest.mark.parametrize(
    "text", ["", "no json\n", "[]\n", '{"stage": "finetune", "terms": {}}\n', '{"stage": "pretrain"}\n']
)
def test_a_foreign_history_says_nothing(tmp_path, text):
    folder = write_run(tmp_path, "scratch")
    (folder / "history.jsonl").write_text(text)
    assert convergence.soft_dice(records.load_run(folder)) is None
    assert built(tmp_path)["note"].to_list() == ["the control"] * 3


def test_a_missing_history_says_nothing(tmp_path):
    folder = write_run(tmp_path, "scratch")
    (folder / "history.jsonl").unlink()
    assert convergence.unconverged([records.load_run(folder)]) == ""


def test_row_and_table_say_it(tmp_path, capsys):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, final_soft_dice=0.9)
        write_run(tmp_path, "m", seed, final_soft_dice=0.3 + 0.4 * seed)
    (only,) = tables(tmp_path)
    assert only.sentences[0].startswith("NOT CONVERGED: the fine-tuning of 1 of 2 rows")
    notes = built(tmp_path).set_index("method")["note"]
    assert all(note.startswith("not converged (seed 0)") for note in notes["m"])
    assert set(notes["scratch"]) == {"the control"}
    assert "NOT CONVERGED" in called(capsys, "leaderboard", "build", "--runs", tmp_path)
