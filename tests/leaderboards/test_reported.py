"""Results that the paper prints, beside measured ones."""

import csv
from pathlib import Path

import pandas as pd
import pytest

from leaderboards import reported, table
from tests.leaderboards.made import called, write_run

PRINTED = Path(__file__).parents[2] / "leaderboards" / "reported" / "hybridmim.csv"


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
    with PRINTED.open(encoding="utf-8", newline="") as file:
        written = [entry for entry in csv.DictReader(file) if entry["metric"] in ("dice", "hd95")]
    rows = reported.rows(reported.known_tasks())
    assert rows["dice"].notna().sum() + rows["hd95_mm"].notna().sum() == len(written)
    fraction = rows[(rows["method"] == "unetformer") & (rows["label_fraction"] == 0.2)]
    assert fraction["dice"].tolist() == [pytest.approx(0.8113)]


def test_reported_results_stand_beside(capsys, tmp_path):
    write_run(tmp_path, task="btcv")
    said = called(capsys, "leaderboard", "build", "--runs", tmp_path, "--with-reported")
    assert "reported elsewhere" in said
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    assert set(frame["source"]) == {"measured", "reported"}
    assert frame.loc[frame["source"] == "reported", ["rank", "p_value_holm"]].isna().all().all()
    assert called(capsys, "leaderboard", "validate", tmp_path / "leaderboard.csv", "--runs", tmp_path)
    write_run(tmp_path / "other")
    assert "nothing is reported for t;" in called(
        capsys, "leaderboard", "build", "--runs", tmp_path / "other", "--with-reported"
    )


def test_the_tasks_are_the_papers_four():
    assert reported.known_tasks() == ["brats", "btcv", "msd_liver", "msd_spleen"]


@pytest.mark.parametrize(
    ("task", "method", "backbone", "mode", "target", "dice"),
    [
        ("btcv", "scratch", "segresnet", "task-specific", "average", 0.8129),
        ("btcv", "models_genesis", "genesis_unet3d", "generic", "right_kidney", 0.9352),
        ("msd_liver", "scratch", "segresnet", "task-specific", "tumor", 0.4826),
    ],
)
def test_printed_percent_become_fractions(task, method, backbone, mode, target, dice):
    """Read off the paper's tables; official weights are pre-trained on other scans."""
    rows = reported.rows([task]).set_index(["method", "backbone", "mode", "target"])
    assert rows.loc[(method, backbone, mode, target), "dice"].item() == pytest.approx(dice)


def test_printed_averages_are_those_of_the_printed_targets():
    """A number that was copied wrongly would show here; one that the paper itself has wrong is noted."""
    rows = reported.rows(reported.known_tasks())
    compared = 0
    for _, group in rows[rows["label_fraction"] == 1].groupby(["task", "method", "backbone", "mode"]):
        targets, average = (group[(group["target"] == "average") == last] for last in (False, True))
        for column, rounding in (("dice", 0.00021), ("hd95_mm", 0.021)):
            if len(average) != 1 or average[column].isna().any() or targets[column].isna().all():
                continue
            noted = "average" in average["note"].item() and column == "hd95_mm"
            difference = abs(targets[column].mean() - average[column].item())
            assert (difference > rounding) == noted, group[["method", "backbone", column, "note"]]
            compared += 1
    assert compared > 30


def test_official_weights_and_the_place_in_the_paper_are_said():
    rows = reported.rows(["btcv"])
    official = rows[rows["note"].str.contains("official weights")]
    assert set(official["method"]) == {"models_genesis", "transvw"}
    assert rows["note"].str.startswith("Xing et al. 2023, HybridMIM, table I").all()


def test_a_note_on_the_average_takes_no_target_from_its_row():
    rows = reported.rows(["msd_liver"])
    assert rows["note"].str.contains("printed columns average").any()
    (line,) = [line for line in table.markdown(rows).splitlines() if "printed columns average" in line]
    assert "0.9553" in line
