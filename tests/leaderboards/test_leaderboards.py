"""Tables and statistics from hand-made runs."""

import json

import numpy as np
import pandas as pd
import pytest

from leaderboards import records, statistics, table


def write_run(folder, method="scratch", seed=0, dice=0.8, preset="demo", fingerprint="f" * 32, overrides=None, cases=8):
    """A run folder with two targets; `dice` is the mean of target a, b is empty in the first case."""
    rng = np.random.default_rng(1)
    rows = []
    for case in range(cases):
        noise = rng.normal(0, 0.02)
        rows.append({"case": f"c{case}", "target": "a", "dice": dice + noise, "hd95_mm": 2.0, "status": "scored"})
        empty = case == 0
        rows.append(
            {
                "case": f"c{case}",
                "target": "b",
                "dice": None if empty else 0.5,
                "hd95_mm": None if empty else 4.0,
                "status": "empty" if empty else "scored",
            }
        )
    run_id = f"t-{method}-{preset}-{seed}-{fingerprint[:2]}-{len(overrides or {})}"
    record = {
        "schema": 1,
        "run_id": run_id,
        "method": method,
        "backbone": "unet",
        "task": "t",
        "task_version": "1",
        "mode": "task-specific",
        "protocol": "finetune",
        "preset": preset,
        "overrides": overrides or {},
        "label_fraction": 1.0,
        "seed": seed,
        "data": {"source": "real", "fingerprint": fingerprint},
        "metrics": {"a": {}, "b": {}, "average": {}},
        "metric_policy": "p",
        "timing": {"pretrain_step": None, "seconds": {}},
    }
    (folder / run_id).mkdir(parents=True)
    (folder / run_id / "record.json").write_text(json.dumps(record))
    pd.DataFrame(rows).to_csv(folder / run_id / "cases.csv", index=False)
    return folder / run_id


def built(folder):
    runs, problems = records.load_runs([folder])
    assert not problems
    return table.build(runs)


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


def test_holm():
    assert statistics.holm([0.01, None, 0.04, 0.03]) == [
        pytest.approx(0.03),
        None,
        pytest.approx(0.06),
        pytest.approx(0.06),
    ]


def test_interval_covers_a_normal_mean():
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        low, high = statistics.interval(rng.normal(0.5, 0.1, (1, 40, 1)))
        hits += low <= 0.5 <= high
    assert 0.88 <= hits / 200 <= 0.99


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


def test_one_id_with_two_contents_is_a_conflict(tmp_path):
    write_run(tmp_path / "a")
    write_run(tmp_path / "b")
    path = next((tmp_path / "b").glob("*/record.json"))
    path.write_text(path.read_text().replace('"seed": 0', '"seed": 7'))
    _, problems = records.load_runs([tmp_path / "a", tmp_path / "b"])
    assert "with other content" in problems[0]


def test_text_that_a_spreadsheet_would_run_is_escaped(tmp_path):
    write_run(tmp_path, "=HYPERLINK(1)")
    table.write_csv(built(tmp_path), tmp_path / "board.csv")
    assert set(pd.read_csv(tmp_path / "board.csv")["method"]) == {"'=HYPERLINK(1)"}
