"""Tables from hand-made runs: what is compared with what, what is left out, what is escaped."""

import json

import pandas as pd
import pytest

from leaderboards import board, records, reported, table
from tests.leaderboards.made import built, tables, write_run


def test_difference_to_scratch_is_paired_and_empty_for_scratch(tmp_path):
    write_run(tmp_path, "scratch", dice=0.8)
    write_run(tmp_path, "better", dice=0.85)
    frame = built(tmp_path).set_index(["method", "target"])
    row = frame.loc["better", "a"]
    assert row["delta_dice_vs_scratch"] == pytest.approx(0.05)
    # The per-case noise is the same in both, so the paired interval has no width; the unpaired one has.
    assert row["delta_ci_low"] == pytest.approx(row["delta_ci_high"])
    assert row["dice_ci_high"] - row["dice_ci_low"] > 0.01
    assert frame.loc["better", "average"]["delta_dice_vs_scratch"] == pytest.approx(0.025)
    assert pd.isna(frame.loc["scratch", "a"]["delta_dice_vs_scratch"])
    assert (row["rank"], frame.loc["scratch", "a"]["rank"]) == (1, 2)


def test_empty_cases_are_left_out_and_counted(tmp_path):
    write_run(tmp_path)
    frame = built(tmp_path).set_index("target")
    assert frame.loc["a", "n_cases"] == 8
    assert frame.loc["b", "n_cases"] == 7
    assert frame.loc["b", "dice"] == pytest.approx(0.5)


@pytest.mark.parametrize(
    "other", [{"preset": "paper"}, {"fingerprint": "e" * 32}, {"overrides": {"finetune.steps": "9"}}]
)
def test_what_differs_shares_no_table(tmp_path, other):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "better", dice=0.9, **other)
    frame = built(tmp_path)
    assert frame["delta_dice_vs_scratch"].isna().all()
    assert (frame["rank"] == 1).all()


def test_changed_method_settings_are_another_row(tmp_path):
    write_run(tmp_path, "m")
    write_run(tmp_path, "m", overrides={"method.mask_ratio": "0.6"})
    assert set(built(tmp_path)["method"]) == {"m", "m{mask_ratio=0.6}"}


def test_p_value_needs_seeds_and_cases(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path / "few", "scratch", seed, cases=5)
        write_run(tmp_path / "few", "better", seed, dice=0.9, cases=5)
        write_run(tmp_path / "many", "scratch", seed)
        write_run(tmp_path / "many", "better", seed, dice=0.9)
    assert built(tmp_path / "few")["p_value_holm"].isna().all()
    frame = built(tmp_path / "many").set_index(["method", "target"])
    assert frame.loc["better", "a"]["p_value_holm"] == pytest.approx(2 / 2**8)
    assert frame.loc["better", "a"]["n_seeds"] == 2


def test_the_difference_uses_the_seeds_that_both_have(tmp_path):
    write_run(tmp_path, "scratch", 0)
    write_run(tmp_path, "better", 0, dice=0.9)
    write_run(tmp_path, "better", 1, dice=0.2)
    write_run(tmp_path, "other", 5, dice=0.9)
    frame = built(tmp_path).set_index(["method", "target"])
    assert frame.loc["better", "a"]["delta_dice_vs_scratch"] == pytest.approx(0.1)
    assert pd.isna(frame.loc["other", "a"]["delta_dice_vs_scratch"])


def test_broken_records_are_named(tmp_path):
    folder = write_run(tmp_path)
    for number, text in enumerate(["", "[]", '{"schema": 2}', '{"schema": 1}']):
        (tmp_path / f"bad{number}").mkdir()
        (tmp_path / f"bad{number}" / "record.json").write_text(text)
    (folder / "cases.csv").unlink()
    runs, problems = records.load_runs([tmp_path])
    assert not runs
    assert len(problems) == 5
    assert all("record.json" in problem for problem in problems)


def test_one_id_with_two_contents_is_a_conflict_and_neither_is_used(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    write_run(tmp_path / "b", "other")
    path = next((tmp_path / "b").glob("*scratch*/record.json"))
    path.write_text(path.read_text().replace("60.0", "61.0"))
    before = path.read_text()
    runs, problems = records.load_runs([tmp_path / "a", tmp_path / "b"])
    assert "with other content" in problems[0]
    assert [run.record["method"] for run in runs] == ["other"]
    assert path.read_text() == before


def test_the_same_run_from_two_labs_is_one(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    runs, problems = records.load_runs([tmp_path / "a", tmp_path / "b", tmp_path / "a"])
    assert (len(runs), problems) == (1, [])


@pytest.mark.parametrize("name", ["=HYPERLINK(1)", "+1", "-1", "@x", "\t=1"])
def test_text_that_a_spreadsheet_would_run_is_escaped(tmp_path, name):
    write_run(tmp_path, name)
    table.write(built(tmp_path), tmp_path / "board.csv")
    assert set(pd.read_csv(tmp_path / "board.csv")["method"]) == {f"'{name}"}


def test_markdown_and_latex_escape_what_they_would_take_for_markup(tmp_path):
    write_run(tmp_path, "<script>a|b_c&d%{x}\\")
    frame = built(tmp_path)
    table.write(frame, tmp_path / "board.md")
    table.write(frame, tmp_path / "board.tex")
    assert r"&lt;script&gt;a\|b\_c&amp;d%\{x\}\\" in (tmp_path / "board.md").read_text()
    assert r"<script>a|b\_c\&d\%\{x\}\textbackslash{}" in (tmp_path / "board.tex").read_text()
    with pytest.raises(table.EndingError, match="due is"):
        table.write(frame, tmp_path / "board.xlsx")


def test_a_name_does_not_move_the_terminals_cursor(tmp_path):
    write_run(tmp_path, "a\x1b[2Jb\nc")
    assert "\x1b" not in table.render(tables(tmp_path))


def test_every_row_says_why_it_has_no_p_value(tmp_path):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "one_seed")
    write_run(tmp_path, "alone", backbone="other")
    notes = built(tmp_path).set_index("method")["note"].to_dict()
    assert notes["one_seed"].startswith("no p-value: one seed")
    assert notes["alone"].startswith("no scratch run to compare with")
    assert notes["scratch"] == "the control"
    assert "no p-value: one seed" in table.render(tables(tmp_path))


def test_of_two_runs_of_a_seed_the_later_one_counts(tmp_path):
    write_run(tmp_path, "m", dice=0.9)
    write_run(tmp_path, "m", dice=0.7, run_id="later", finished="2026-02-01T00:00:00Z")
    row = built(tmp_path).set_index("target").loc["a"]
    assert (row["n_seeds"], row["run_ids"]) == (1, "later")
    assert "older runs" in row["note"]


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"preset": "paper"}, "preset"),
        ({"task_version": "2"}, "task"),
        ({"metric_policy": "empty-is-skipped-v1"}, "metric_policy"),
        ({"data": {"fingerprint": "e" * 32}}, "data"),
        ({"label_fraction": 0.5}, "label_fraction"),
        ({"protocol": "frozen"}, "protocol"),
        ({"mode": "generic"}, "mode"),
    ],
)
def test_what_keeps_two_runs_apart_is_named(tmp_path, change, field):
    first = records.load_run(write_run(tmp_path, "a"))
    second = records.load_run(write_run(tmp_path, "b", **change))
    (difference,) = board.differing(first, second)
    assert difference.startswith(field)
    assert len({each.key for each in tables(tmp_path)}) == 2


def test_reported_rows_stand_beside_and_have_no_rank():
    rows = reported.rows(["btcv", "msd_liver", "brats@2"])
    assert set(rows["source"]) == {"reported"}
    assert rows[["rank", "p_value_holm", "n_seeds"]].isna().all().all()
    liver = rows[(rows["task"] == "msd_liver") & (rows["target"] == "average") & (rows["backbone"] == "segresnet")]
    assert "printed columns average 8.06" in liver["note"].iloc[0]
    assert liver["hd95_mm"].iloc[0] == 25.31
    assert rows["dice"].dropna().between(0, 1).all()
    assert reported.rows(["msd_hippocampus"]).empty


def test_every_reported_dice_and_hd95_becomes_one_value():
    written = [entry for entry in reported._entries() if entry["metric"] in ("dice", "hd95")]
    rows = reported.rows(reported.known_tasks())
    assert rows["dice"].notna().sum() + rows["hd95_mm"].notna().sum() == len(written)
    fraction = rows[(rows["method"] == "unetformer") & (rows["label_fraction"] == 0.2)]
    assert fraction["dice"].tolist() == [pytest.approx(0.8113)]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("run_id", "../x"),
        ("run_id", ""),
        ("seed", -1),
        ("seed", True),
        ("seed", 2**63),
        ("label_fraction", 0),
        ("label_fraction", float("nan")),
        ("label_fraction", "all"),
        ("data", []),
        ("data", {"source": "moon", "fingerprint": ""}),
        ("metrics", {}),
        ("overrides", None),
        ("method", 3),
        ("backbone", ""),
        ("task", "t" * 2000),
        ("timing", "fast"),
        ("timing", {"seconds": {}, "pretrain_step": "text"}),
        ("timing", {"seconds": {}, "pretrain_step": {"step": {"p50_ms": None}}}),
        ("timing", {"seconds": {"pretrain": "slow"}}),
        ("timing", {"seconds": {"finetune": -1}}),
        ("timing", {"pretrain_step": None}),
        ("metric_definitions", ["hd95"]),
        ("metric_definitions", {"surface_dice_tolerance_mm": "=1+1"}),
        ("data", {"source": "real", "fingerprint": "f", "n_test_seen": "3"}),
        ("data", {"source": "real", "fingerprint": "f", "n_test_seen": -1}),
        ("data", {"source": "real", "fingerprint": "f"}),
        ("data", {"source": "real", "fingerprint": "f", "n_test_seen": 0, "corpora": [3]}),
        ("metrics", {"a": [], "b": {}}),
        ("metrics", {"a": {"dice": 10**400}}),
        ("metrics", {"a\x00": {}}),
        ("overrides", {"method.x": 1}),
        ("environment", "a machine"),
        ("environment", {"git": "dirty"}),
        ("files", [1]),
        ("finished", "9999"),
        ("backbone", "half \ud800"),
    ],
)
def test_hand_edited_records_are_named_and_left_out(tmp_path, field, value):
    place = write_run(tmp_path)
    record = json.loads((place / "record.json").read_text()) | {field: value}
    (place / "record.json").write_text(json.dumps(record))
    runs, problems = records.load_runs([tmp_path])
    assert not runs
    assert len(problems) == 1
    assert str(place) in problems[0]


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("c1,a,scored,0.8", "c1,a,scored,nan#", "could not convert|not finite"),
        ("hd95_mm", "hd95_mm;", "header"),
        ("c1,a,scored", "c2,a,scored", "one row per case"),
        ("c1,a,scored", "c1,z,scored", "no target"),
        ("c1,a,scored", "c1,a,fine", "no target of the record or no status"),
        ("c1,a,scored,", "c1,a,scored,1", "leaves 0..1"),
        ("c1,a,scored,", "c1,a,missed,", "Dice other than 0"),
        (",2.0,0.9", ",-2.0,0.9", "leaves 0..1e"),
        (",2.0,0.9", ",inf,0.9", "not finite"),
        (",2.0,0.9", ",nan,0.9", "not finite"),
        (",2.0,0.9", ",,0.9", "no HD95"),
        (",2.0,0.9", ",2.0", "truncated"),
        (",2.0,0.9", ",2_0.0,0.9", "no plain number"),
        (",2.0,0.9", ",٢.٠,0.9", "no plain number"),
        (",2.0,0.9", ",1e308,0.9", "leaves 0..1e"),
        (",2.0,0.9", ",2.0,", "some scored cases have a surface Dice"),
        ("c0,b,empty,,,", "c0,b,empty,1.0,0.0,1.0", "does not give"),
        ("c1,b,scored,0.5,4.0,0.7", "c1,b,missed,0.0,0.0,0.0", "an HD95 of 0"),
        ("c1,b,scored,0.5,4.0,0.7", "c1,b,missed,0.0,9.0,0.9", "or a surface Dice"),
        ("c1,b,scored,0.5,", "c1,b,scored,1.0,", "a Dice of 1 has an HD95 above 0"),
        ("c1,a", ",a", "a case has no name"),
        ("c1,a", "c\x001,a", "cannot be printed"),
    ],
)
def test_hand_edited_cases_are_named_and_left_out(tmp_path, old, new, says):
    import re

    place = write_run(tmp_path)
    text = (place / "cases.csv").read_text()
    assert old in text
    (place / "cases.csv").write_text(text.replace(old, new, 1))
    runs, problems = records.load_runs([tmp_path])
    assert not runs
    assert re.search(says, problems[0])


def test_names_with_commas_and_quotes_are_read(tmp_path):
    place = write_run(tmp_path)
    text = (place / "cases.csv").read_text()
    (place / "cases.csv").write_text(text.replace("c1,", '"c,""1",'))
    assert 'c,"1' in records.load_run(place).cases


def test_the_largest_seed_of_a_run_is_read(tmp_path):
    write_run(tmp_path, seed=2**63 - 1)
    assert [run.seed for run in records.load_runs([tmp_path])[0]] == [2**63 - 1]
