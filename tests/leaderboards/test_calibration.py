"""The calibration controls: headroom, shares of it, and what a table says where it cannot tell anything."""

import numpy as np
import pandas as pd
import pytest

from leaderboards import statistics
from leaderboards.calibration import Calibration, share_text
from tests.leaderboards.made import built, called, simulated, tables, write_run


@pytest.mark.parametrize(("headroom", "least", "most"), [(0.0, 0.96, 1.0), (0.06, 0.0, 0.02)])
def test_insensitive_is_said_where_there_is_nothing_to_gain(headroom, least, most):
    """Without headroom in all but the 2.5 % in which an interval of 95 % lies above 0 by luck."""
    rng, number = np.random.default_rng(3), 400
    pairs = [tuple(reversed(simulated(rng, headroom))) for _ in range(number)]
    said = 0
    for estimate in statistics.differences(pairs):
        interval = tuple(float(end[-1]) for end in (estimate.mean, estimate.low, estimate.high))
        said += Calibration("unet", headroom=interval).insensitive
    assert least <= said / number <= most


@pytest.fixture
def runs(tmp_path):
    """Scratch 0.7, both calibration controls, and a method that gains half of the headroom; three seeds."""
    for seed in (0, 1, 2):
        luck = 0.002 * (seed - 1)
        write_run(tmp_path, "scratch", seed, dice=0.7 + luck, rules=2)
        write_run(tmp_path, "supervised", seed, dice=0.8 - luck, rules=2, uses_labels=True)
        write_run(tmp_path, "untrained", seed, dice=0.7 - luck, rules=2)
        write_run(tmp_path, "m", seed, dice=0.75, rules=2)
    return tmp_path


def test_controls_are_neither_ranked_nor_tested(runs):
    frame = built(runs)
    average = frame[frame["target"] == "average"].set_index("method")
    assert average["rank"].dropna().to_dict() == {"m": 1, "scratch": 2}
    assert average["p_value_holm"].dropna().index.to_list() == ["m"]
    assert average["control"].to_dict() == {
        "m": "",
        "scratch": "matched",
        "supervised": "positive",
        "untrained": "negative",
    }
    assert average.loc["supervised", "delta_dice_vs_scratch"] == pytest.approx(0.05, abs=1e-6)
    assert "neither ranked nor tested" in average.loc["supervised", "note"]


def test_a_method_has_its_share_of_the_headroom(runs):
    frame = built(runs)
    row = frame[(frame["method"] == "m") & (frame["target"] == "average")].iloc[0]
    assert row["headroom_share"] == pytest.approx(0.5, abs=1e-6)
    assert row["headroom_share_ci_low"] < 0.5 < row["headroom_share_ci_high"]
    others = frame[(frame["method"] != "m") | (frame["target"] != "average")]
    assert others["headroom_share"].isna().all()


def test_the_table_says_what_the_controls_say(runs, capsys):
    said = called(capsys, "leaderboard", "build", "--runs", runs)
    assert "of headroom [95 % CI]" in said
    assert "unet: headroom +0.0500" in said
    assert "luck, as it must be" in said
    assert pd.read_csv(runs / "leaderboard.csv")["control"].value_counts()["positive"] == 3


def test_a_table_that_cannot_tell_anything_says_so(tmp_path, capsys):
    for seed, luck in enumerate((-0.05, 0.0, 0.06)):
        write_run(tmp_path, "scratch", seed, dice=0.7, rules=2)
        write_run(tmp_path, "supervised", seed, dice=0.7 + luck, rules=2, uses_labels=True)
        write_run(tmp_path, "untrained", seed, dice=0.6, rules=2)
        write_run(tmp_path, "m", seed, dice=0.75, rules=2)
    (only,) = tables(tmp_path)
    (calibration,) = only.calibrations
    assert calibration.insensitive
    assert calibration.miscalibrated == ["untrained"]
    assert calibration.shares == {}
    said = called(capsys, "leaderboard", "build", "--runs", tmp_path)
    assert "unet: INSENSITIVE" in said
    assert "unet: MIS-CALIBRATED" in said
    assert "of headroom" not in said.splitlines()[1]


def test_the_pages_say_it_too(runs, capsys):
    called(capsys, "leaderboard", "publish", "--runs", runs, "--out", runs / "site")
    page = (runs / "site" / "tables" / "1.html").read_text()
    assert '<th scope="col">of headroom</th>' in page
    assert "unet: headroom +0.0500" in page
    assert "on the Pareto front: scratch (unet), m (unet)" in page  # supervised is better than both, and no choice


def test_without_controls_there_is_no_calibration(tmp_path):
    write_run(tmp_path, "scratch")
    write_run(tmp_path, "m")
    assert tables(tmp_path)[0].calibrations == []


def test_controls_serve_the_tables_of_every_mode(tmp_path):
    for method in ("scratch", "untrained"):
        write_run(tmp_path, method, rules=2)
    write_run(tmp_path, "supervised", rules=2, uses_labels=True)
    write_run(tmp_path, "m", rules=2, mode="generic")
    generic = next(each for each in tables(tmp_path) if each.shared("mode") == "generic")
    assert [group.method for group in generic.groups] == ["m", "scratch", "supervised", "untrained"]


def test_without_an_interval_nothing_is_said():
    calibration = Calibration("unet", "supervised", (0.1, np.nan, np.nan), {"untrained": (-0.1, np.nan, np.nan)})
    assert (calibration.insensitive, calibration.miscalibrated, calibration.sentences()) == (False, [], [])


def test_one_seed_says_nothing(tmp_path):
    """Its luck cannot be told from anything."""
    for method, dice in (("scratch", 0.7), ("untrained", 0.71), ("supervised", 0.8), ("m", 0.75)):
        write_run(tmp_path, method, dice=dice, rules=2, uses_labels=method == "supervised")
    assert tables(tmp_path)[0].calibrations == []


def test_of_several_positive_controls_the_one_that_gains_most_counts(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, dice=0.7, rules=2)
        write_run(tmp_path, "supervised", seed, dice=0.75, rules=2, uses_labels=True)
        best = {"pretrain.steps": "1000"}
        write_run(tmp_path, "supervised", seed, dice=0.9, rules=2, uses_labels=True, overrides=best)
        write_run(tmp_path, "m", seed, dice=0.8, rules=2)
    (only,) = tables(tmp_path)
    (calibration,) = only.calibrations
    assert calibration.positive == "supervised{pretrain.steps=1000}"
    assert calibration.headroom[0] == pytest.approx(0.1)
    assert calibration.shares["m"][0] == pytest.approx(0.5)
    assert "(supervised{pretrain.steps=1000} minus scratch)" in only.sentences[0]


def test_every_negative_control_is_judged(tmp_path):
    for seed in (0, 1):
        write_run(tmp_path, "scratch", seed, dice=0.7 + 0.002 * seed, rules=2)
        write_run(tmp_path, "untrained", seed, dice=0.702 - 0.002 * seed, rules=2)
        write_run(tmp_path, "untrained", seed, dice=0.8, rules=2, transfer={"requested": "encoder"})
    (calibration,) = tables(tmp_path)[0].calibrations
    assert calibration.miscalibrated == ["untrained{transfer=encoder}"]
    assert len(calibration.sentences()) == 2


def test_a_method_without_all_seeds_of_the_headroom_has_no_share(tmp_path):
    """At its own seeds the headroom may be nothing, and the share anything."""
    for seed in range(4):
        write_run(tmp_path, "scratch", seed, dice=0.7, rules=2)
        write_run(tmp_path, "supervised", seed, dice=0.8 + 0.01 * seed, rules=2, uses_labels=True)
        write_run(tmp_path, "whole", seed, dice=0.75, rules=2)
    for seed in range(2):
        write_run(tmp_path, "part", seed, dice=0.75, rules=2)
    assert tables(tmp_path)[0].calibrations[0].shares.keys() == {"whole"}


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (None, "-"),
        ((0.5, 0.25, 0.75), "50% [25%, 75%]"),
        ((0.5, np.nan, np.nan), "50%"),
        ((-0.5, -np.inf, np.inf), "-50% [unbounded]"),
    ],
)
def test_a_share_as_text(share, text):
    assert share_text(share) == text


def test_a_scratch_with_settings_of_its_own_calibrates_nothing(tmp_path):
    for seed in range(2):
        write_run(tmp_path, "scratch", seed, rules=2, overrides={"method.x": "1"})
        write_run(tmp_path, "untrained", seed, rules=2)
    assert tables(tmp_path)[0].calibrations == []
