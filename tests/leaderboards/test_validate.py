"""Checks of records and CSVs from anywhere: what was changed by hand is found, what was not passes."""

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from harness.cli.main import main
from leaderboards import records, table, validate
from tests.leaderboards.made import built, write_run

PUBLISHED = Path(__file__).parents[2] / "leaderboards" / "published"


@pytest.fixture
def board(tmp_path):
    """A folder of runs and its CSV."""
    for seed in (0, 1):
        write_run(tmp_path / "runs", "scratch", seed)
        write_run(tmp_path / "runs", "better", seed, dice=0.85)
    table.write(built(tmp_path / "runs"), tmp_path / "board.csv")
    return tmp_path


def loaded(board):
    return records.load_runs([board / "runs"])[0]


def test_what_the_harness_wrote_is_valid(board, capsys):
    for folder in (board / "runs").iterdir():
        assert validate.check_run(folder) == []
    problems, recomputed = validate.check_csv(board / "board.csv", loaded(board))
    assert problems == []
    assert recomputed == "6 rows recomputed from 4 runs"
    assert main(["leaderboard", "validate", str(board / "runs"), str(board / "board.csv")]) == 0
    assert "6 rows recomputed from 4 runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: r["metrics"]["a"].update(dice=0.99), "a dice is 0.99, its cases give"),
        (lambda r: r["metrics"]["average"].update(hd95=0.1), "average hd95 is 0.1, its cases give 3"),
        (lambda r: r["metrics"]["b"].update(n_cases=8), "b n_cases is 8, its cases give 7"),
        (lambda r: r["metrics"]["a"].update(n_missed=1), "a n_missed is 1, its cases give 0"),
        (lambda r: r["metrics"]["a"].update(n_empty=3, n_spurious=2), "a n_spurious is 2, its cases give 0"),
        (lambda r: r["metrics"]["a"].update(dice="0.8"), "metrics.a.dice: Input should be a valid number"),
        (lambda r: r["data"].update(pretrain=["c3"]), "1 test cases were trained or pre-trained on"),
        (lambda r: r["data"].update(overlap=[["scan", "c3"]]), "1 test cases were trained or pre-trained on"),
        (lambda r: r["data"].pop("pretrain"), "data has no list of the pretrain cases"),
        (lambda r: r.pop("digests"), "digests has none of cases.csv"),
        (lambda r: r.update(metric_policy="best-of-all"), "which this version does not know"),
        (lambda r: r["metric_definitions"].update(hd95="pooled"), "HD95 is said to be 'pooled'"),
        (lambda r: r.update(config={"overrides": {"finetune.steps": "9"}}), "overrides is {}, its configuration says"),
        (lambda r: r["data"].update(test=["c0"]), "data.test names 1 cases"),
        (lambda r: r["data"].update(n_train=7), "data.n_train is 7, the list has 2"),
        (lambda r: r["data"].update(train=["c1", "y"]), "1 test cases were trained or pre-trained on"),
        (lambda r: r["data"].update(train=3), "data.train: Input should be a valid list"),
        (lambda r: r.update(config={"method": "other"}), "method is 'scratch', its configuration says 'other'"),
        (lambda r: r.update(metric_policy="empty-is-perfect-v1"), "has no Dice, which empty-is-perfect-v1 gives"),
        (lambda r: r.update(run_id="another"), "run_id is 'another', the folder is called"),
        (lambda r: r.update(digests=[]), "digests is no table"),
    ],
)
def test_a_hand_edited_record_is_found(tmp_path, change, says):
    import re

    folder = write_run(tmp_path)
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))
    found = validate.check_run(folder)
    assert len(found) >= 1
    assert re.search(says, "\n".join(found))


def test_a_case_that_was_improved_by_hand_is_found_twice(tmp_path):
    folder = write_run(tmp_path)
    text = (folder / "cases.csv").read_text()
    (folder / "cases.csv").write_text(text.replace("c2,b,scored,0.5", "c2,b,scored,0.9"))
    found = "\n".join(validate.check_run(folder))
    assert "cases.csv was changed after the run" in found
    assert "b dice is 0.5, its cases give" in found


CELLS = [
    ("dice", "1.2", "dice is '1.2', give a number in 0..1"),
    ("dice", "nan", "dice is 'nan'"),
    ("hd95_mm", "inf", "hd95_mm is 'inf'"),
    ("hd95_mm", "-1", "hd95_mm is '-1'"),
    ("p_value_holm", "2", "p_value_holm"),
    ("rank", "first", "rank is 'first'"),
    ("source", "guessed", "source is 'guessed'"),
    ("dice", "0.95", "dice lies outside its interval"),
    ("dice_ci_low", "0.7", "its cases give"),
    ("delta_dice_vs_scratch", "0.049", "delta_dice_vs_scratch lies outside its interval"),
    ("rank", "1", "rank is 1"),
    ("n_missed", "3", "n_missed is 3"),
    ("run_ids", "", "names no run"),
    ("note", "well known", "note is 'well known'"),
    ("surface_tolerance_mm", "99", "the average Dice is"),
    ("label_fraction", "", "the average Dice is"),
    ("dice", "0_0", "dice is '0_0'"),
]


@pytest.mark.parametrize(("column", "value", "says"), CELLS)
def test_a_hand_edited_cell_is_found(board, column, value, says):
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    # The second average row: better, or scratch, whichever does not have rank 1.
    line = frame.index[(frame["target"] == "a") & (frame["rank"] == "2")][0]
    if column == "delta_dice_vs_scratch":
        line = frame.index[(frame["target"] == "a") & (frame["method"] == "better")][0]
    frame.loc[line, column] = value
    frame.to_csv(board / "board.csv", index=False)
    found, _ = validate.check_csv(board / "board.csv", loaded(board))
    assert any(says in problem for problem in found), found


def test_an_average_that_is_not_its_targets_is_found(board):
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    line = frame.index[frame["target"] == "average"][0]
    frame.loc[line, ["dice", "dice_ci_high"]] = ["0.7", "0.9"]
    frame.to_csv(board / "board.csv", index=False)
    found, _ = validate.check_csv(board / "board.csv", [])
    assert "the average Dice is 0.7" in found[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda text: text.replace(",", ";"), "separated by semicolons"),
        (lambda text: text.replace(",", "\t"), "separated by tabs"),
        (lambda text: text.replace("hd95_mm", "hd95"), "lacks the columns hd95_mm"),
        (lambda text: text.replace("task,data", "data,task"), "another order"),
        (lambda text: text[: len(text) // 2], "is it truncated"),
        (lambda text: text + text.splitlines()[1] + "\n", "a second row of"),
        (lambda text: "", "lacks the columns"),
        (lambda text: text.splitlines()[0] + "\n", "has no rows"),
        (lambda text: text.replace("note", "task", 1), "has a column twice"),
        (lambda text: text.encode("utf-16"), "invalid start byte|codec"),
    ],
)
def test_a_csv_in_another_dialect_is_named(board, change, says):
    import re

    changed = change((board / "board.csv").read_text())
    (board / "board.csv").write_bytes(changed if isinstance(changed, bytes) else changed.encode())
    found, _ = validate.check_csv(board / "board.csv", loaded(board))
    assert re.search(says, "\n".join(found)), found


def test_a_spreadsheets_byte_order_mark_and_line_ends_do_no_harm(board):
    text = (board / "board.csv").read_text()
    (board / "board.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert validate.check_csv(board / "board.csv", loaded(board))[0] == []


def test_without_the_runs_it_says_what_it_could_not_do(board):
    found, recomputed = validate.check_csv(board / "board.csv", [])
    assert found == []
    assert recomputed.startswith("not recomputed: none of its 4 runs is at hand")
    found, _ = validate.check_csv(board / "board.csv", loaded(board)[:1])
    assert "3 of its 4 runs are not at hand" in found[0]


def test_the_best_seeds_alone_are_noticed(board):
    write_run(board / "runs", "better", 2, dice=0.6)
    found, recomputed = validate.check_csv(board / "board.csv", loaded(board))
    assert found == []
    assert recomputed.endswith("1 more runs of these rows are at hand and not in it")


@pytest.mark.parametrize(("column", "value"), [("label_fraction", ""), ("surface_tolerance_mm", "99")])
def test_a_hand_edited_column_is_found(board, column, value):
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    frame[column] = value
    frame.to_csv(board / "board.csv", index=False)
    found, _ = validate.check_csv(board / "board.csv", loaded(board))
    assert any("its runs give no such row" in problem for problem in found), found


def test_two_tolerances_are_two_tables(board):
    """Surface Dice alone tells them apart; the seventh digit does."""
    for tolerance in (2.0, 2.0000001):
        write_run(board / "runs", "scratch", 0, metric_definitions={"surface_dice_tolerance_mm": tolerance})
    table.write(built(board / "runs"), board / "board.csv")
    assert validate.check_csv(board / "board.csv", loaded(board)) == ([], "12 rows recomputed from 6 runs")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["record.json", "cases.csv", "weights.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero")])
def test_what_is_no_regular_file_is_not_read(tmp_path, name, make):
    """A pipe would be waited for, and /dev/zero read, without end."""
    folder = write_run(tmp_path, digests={"weights.safetensors": "x"})
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert any("is no regular file" in problem for problem in validate.check_run(folder))


def test_no_more_than_the_largest_record_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "LARGEST", 100)
    assert "more than the 100 bytes" in validate.check_run(write_run(tmp_path))[0]


def test_rows_that_were_taken_out_or_called_reported_are_found(board):
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    frame[frame["method"] != "scratch"].to_csv(board / "board.csv", index=False)
    write_run(board / "runs", "scratch", 9)
    found, _ = validate.check_csv(board / "board.csv", loaded(board))
    assert any("no scratch run to compare with" in problem for problem in found)
    frame[frame["target"] != "b"].to_csv(board / "board.csv", index=False)
    assert validate.check_csv(board / "board.csv", loaded(board))[0]
    frame["source"] = "reported"
    frame[["rank", "p_value_holm", "run_ids"]] = ""
    frame.to_csv(board / "board.csv", index=False)
    assert "no such result is known to be reported" in validate.check_csv(board / "board.csv", loaded(board))[0][0]


def test_every_row_of_the_board_is_checked_against_its_cases(board):
    """Any number of the CSV that is moved by a thousandth is found."""
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    numbers = [
        name for name in validate.NUMBERS if name not in ("n_seeds", "rank", "n_cases", "n_missed", "n_test_seen")
    ]
    rng = np.random.default_rng(0)
    for column in numbers:
        filled = frame.index[frame[column] != ""]
        if column == "label_fraction" or not len(filled):
            continue
        line = rng.choice(filled)
        changed = frame.copy()
        changed.loc[line, column] = f"{float(frame.loc[line, column]) * 1.001 + 1e-4:.6g}"
        changed.to_csv(board / "changed.csv", index=False)
        assert validate.check_csv(board / "changed.csv", loaded(board))[0], column


@pytest.mark.parametrize(
    "place", sorted(path.parent for path in PUBLISHED.glob("*/leaderboard.csv")), ids=lambda p: p.name
)
def test_what_is_published_follows_from_its_cases(place, capsys):
    assert main(["leaderboard", "validate", str(place), "--runs", str(place / "runs")]) == 0
    said = capsys.readouterr().out
    assert "runs, valid" in said
    assert "rows recomputed from" in said


def test_the_command_names_what_is_no_record(tmp_path, capsys):
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "text.txt").write_text("")
    assert main(["leaderboard", "validate", str(tmp_path / "unfinished"), "--runs", str(tmp_path)]) == 2
    assert "no record.json in it" in capsys.readouterr().err
    for name in ("missing", "missing.csv", "text.txt"):
        assert main(["leaderboard", "validate", str(tmp_path / name), "--runs", str(tmp_path)]) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


DRAWN = {"label_subset": "per seed"}
CURVE = [[1, 0.5], [2, 0.6]]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data": DRAWN | {"validation": ["c0"]}}, "1 validation cases are test cases"),
        ({"data": DRAWN | {"validation": ["x"]}}, "1 validation cases are train cases"),
        ({"data": DRAWN | {"validation": ["v"]}, "validation": {"cases": ["w"], "curve": CURVE}}, "not the same ones"),
        ({"data": DRAWN, "validation": {"curve": CURVE}}, "a curve without cases"),
        (
            {
                "data": DRAWN | {"validation": ["v"]},
                "validation": {"cases": ["v"], "curve": CURVE},
                "config": {"finetune": {"steps": 1}},
            },
            "a step beyond the 1 of fine-tuning",
        ),
        ({"data": DRAWN | {"train": ["x", "x"]}}, "data.train names a case twice"),
        ({"data": {"label_subset": "first"}}, "first belongs to rules 1"),
        ({"data": {"label_subset": "per seed"}, "rules": 1}, "first belongs to rules 1"),
        ({"data": DRAWN, "method": "supervised"}, "supervised uses labels"),
        ({"data": DRAWN, "method": "untrained", "uses_labels": True}, "untrained pre-trains nothing"),
        ({"data": DRAWN, "method": "scratch", "uses_labels": True}, "scratch pre-trains nothing"),
    ],
)
def test_a_record_that_cannot_be_is_found(tmp_path, changes, says):
    changes = {"rules": 2} | changes
    folder = write_run(tmp_path, changes.pop("method", "m"), **changes)
    assert any(says in problem for problem in validate.check_run(folder)), validate.check_run(folder)


def test_a_record_of_now_is_valid(tmp_path):
    whole = {"data": DRAWN | {"validation": ["v"]}, "validation": {"cases": ["v"], "curve": CURVE}, "rules": 2}
    assert validate.check_run(write_run(tmp_path, "m", **whole)) == []


@pytest.mark.parametrize(
    ("lineage", "overlap", "says"),
    [
        ({"generations": [], "num_scans": 1}, [], None),
        ({"foreign": [{"file": "w.pt", "digest": "0" * 32}]}, [], "its lineage says that nobody knows"),
        ({"num_without_signatures": 3}, [], "its lineage says that nobody knows"),
        (None, 5, "data.overlap"),
        (None, [[["a"], {}]], "data.overlap"),
    ],
)
def test_a_lineage_of_any_form_that_is_allowed_is_checked(lineage, overlap, says, tmp_path):
    folder = write_run(tmp_path / "runs")
    record = json.loads((folder / "record.json").read_text())
    record["lineage"] = lineage
    record["data"]["overlap"] = overlap
    (folder / "record.json").write_text(json.dumps(record))
    problems = validate.check_run(folder)
    assert problems == [] if says is None else says in problems[0]


def test_a_board_is_valid_without_the_older_runs_that_it_leaves_out(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "runs", "scratch", seed)
    write_run(tmp_path / "runs", "scratch", 1, dice=0.7, finished="2025-01-01T00:00:00Z")
    frame = built(tmp_path / "runs")
    assert frame["note"].str.contains("1 older runs of the same seeds left out").all()
    table.write(frame, tmp_path / "board.csv")
    problems, recomputed = validate.check_csv(tmp_path / "board.csv", loaded(tmp_path))
    assert problems == []
    assert recomputed.startswith("3 rows recomputed from 2 runs")


def test_an_interval_of_a_difference_may_be_wide(board):
    """Three folds of which one misses a target have an interval beyond -1 to 1."""
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    frame.loc[frame["method"] == "better", "delta_ci_low"] = "-2.08"
    frame.to_csv(board / "board.csv", index=False)
    assert validate.check_csv(board / "board.csv", [])[0] == []


@pytest.mark.parametrize("config", [{"finetune": []}, {"finetune": {"steps": "9"}}, []])
def test_a_configuration_of_anything_is_no_bug(tmp_path, config):
    folder = write_run(
        tmp_path, config=config, validation={"cases": ["z"], "curve": [[1, 0.5]]}, data={"validation": ["z"]}
    )
    assert all("beyond" not in problem for problem in validate.check_run(folder))


def test_a_note_that_ends_like_that_of_older_runs_is_compared(board):
    frame = pd.read_csv(board / "board.csv", dtype=str, keep_default_na=False)
    frame.loc[0, "note"] = "well known, as older runs of the same seeds left out"
    frame.to_csv(board / "board.csv", index=False)
    assert "note is 'well known" in validate.check_csv(board / "board.csv", loaded(board))[0][0]
