"""Are claims as often false as their probability says? Against quadrature, and in simulations with a known answer."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import integrate, stats

from leaderboards import statistics
from leaderboards.suites.claims import PRIOR, all_claims, claims_against_scratch, probability_false
from tests.leaderboards.made import simulated
from tests.leaderboards.suites.test_consensus import suite_of

REPORTED = Path(__file__).parents[3] / "leaderboards" / "reported" / "hybridmim.csv"


def test_the_prior_is_the_spread_of_the_differences_that_the_paper_reports():
    frame = pd.read_csv(REPORTED)
    frame = frame[(frame["target"] == "average") & (frame["metric"] == "dice") & (frame["unit"] == "percent")]
    differences = []
    for _, rows in frame.groupby(["table", "dataset", "backbone"]):
        control = rows[rows["method"] == "scratch"]["value"]
        if len(control) == 1:
            differences += ((rows[rows["method"] != "scratch"]["value"] - control.iloc[0]) / 100).tolist()
    assert len(differences) == 22
    assert np.sqrt(np.mean(np.square(differences))) == pytest.approx(0.0146, abs=5e-5)
    assert pytest.approx(0.0146, abs=5e-4) == PRIOR


@pytest.mark.parametrize(
    ("mean", "error", "freedom"),
    [(0.01, 0.005, 4.0), (0.0, 0.01, 9.0), (0.05, 0.002, 3.0), (0.002, 0.05, 2.0), (0.2, 0.0005, 30.0)],
)
def test_the_probability_is_that_of_quadrature(mean, error, freedom):
    def density(truth):
        return stats.norm.pdf(truth, 0, PRIOR) * stats.t.pdf((mean - truth) / error, freedom)

    points = [0, mean, mean - 3 * error, mean + 3 * error]
    below, _ = integrate.quad(density, -0.3, 0, limit=500, points=[each for each in points if -0.3 < each < 0] or None)
    above, _ = integrate.quad(density, 0, 0.5, limit=500, points=[each for each in points if 0 < each < 0.5] or None)
    assert probability_false(mean, error**2, freedom) == pytest.approx(below / (below + above), rel=0.01, abs=1e-7)


def test_without_spread_a_claim_is_certain_and_without_a_test_unknown():
    assert probability_false(0.1, 0.0, 3.0) == 0
    assert probability_false(-0.1, 0.0, 3.0) == 1
    assert probability_false(0.0, 0.0, 3.0) == 0.5
    assert np.isnan(probability_false(0.1, np.nan, 3.0))


@pytest.mark.parametrize("luck", [0.004, 0.012])
def test_claims_are_false_as_often_as_they_say(luck):
    """True differences are drawn from the prior; of the claims that say 10 %, a tenth is false, and so on."""
    rng, said, false = np.random.default_rng(3), [], []
    for _ in range(500):
        truth = rng.normal(0, PRIOR, 3)
        control, *rows = simulated(rng, *truth, seed_spread=luck)
        pooled = statistics.luck([control, *rows])
        for gain, row in zip(truth, rows, strict=True):
            mean, variance, freedom = statistics.moments(row, control, pooled)
            said.append(probability_false(abs(mean), variance, freedom))
            false.append(gain * np.sign(mean) <= 0)
    said, false = np.array(said), np.array(false)
    for low, high in ((0, 0.02), (0.02, 0.1), (0.1, 0.25), (0.25, 0.5)):
        members = (said >= low) & (said < high)
        print(
            f"luck {luck}: {members.sum()} claims said to be false with {said[members].mean():.3f}: {false[members].mean():.3f}"
        )
        assert false[members].mean() == pytest.approx(
            said[members].mean(), abs=0.01 + 3 * np.sqrt(high * (1 - high) / members.sum())
        )


def test_moments_are_those_of_crossed_seeds_and_cases():
    first, second, third = simulated(np.random.default_rng(0), 0.01, 0.03)
    pooled = statistics.luck([first, second, third])
    mean, variance, freedom = statistics.moments(third, first, pooled)
    difference = (third - first)[..., 0]
    assert mean == pytest.approx(difference.mean())
    seeds, cases = 2 * pooled.variance[-1] / 3, difference.mean(axis=0).var(ddof=1) / 24
    assert variance == pytest.approx(seeds + cases)
    assert freedom == pytest.approx((seeds + cases) ** 2 / (seeds**2 / 6 + cases**2 / 23))


def test_moments_of_pooled_folds_are_those_of_their_interval():
    first, third = simulated(np.random.default_rng(0), 0.03, seeds=1)
    folds = tuple(np.arange(24) % 4)
    mean, variance, freedom = statistics.moments(third, first, statistics.luck([first], folds))
    (interval,) = statistics.differences([(third, first)], folds)
    half = stats.t.ppf(0.975, freedom) * np.sqrt(variance)
    assert freedom == 3
    assert (mean - half, mean + half) == (pytest.approx(interval.low[-1]), pytest.approx(interval.high[-1]))


def test_claims_are_corrected_over_all_tables_and_pairs(tmp_path):
    made = suite_of(tmp_path)
    names = ["better (unet)", "scratch (unet)", "worse (unet)"]
    found = all_claims(made, names)
    assert [claim.table for claim in found] == [0] * 3 + [1] * 3 + [2] * 3 + [None] * 3
    assert all(claim.difference >= 0 and claim.false <= 0.5 for claim in found)
    raw = []
    for table in made:
        dice = {group.name: np.stack([run.dice for run in group.runs]) for group in table.groups}
        for first, second in (names[:2], names[::2], names[1:]):
            raw.append(statistics.p_values([(dice[first], dice[second])], statistics.luck(list(dice.values())))[0][-1])
    assert [claim.p for claim in found[:9]] == pytest.approx(statistics.holm(raw))
    fewer = claims_against_scratch(made, names)
    assert len(fewer) == 2 * 3 + 2
    assert {name for claim in fewer for name in (claim.first, claim.second)} == set(names)


def test_the_claim_over_all_tables_has_their_mean_and_spread(tmp_path):
    made = suite_of(tmp_path)
    *each, overall = all_claims(made, ["better (unet)", "worse (unet)"])
    assert overall.difference == pytest.approx(np.mean([claim.difference for claim in each]))
    moments = []
    for table in made:
        dice = {group.name: np.stack([run.dice for run in group.runs]) for group in table.groups}
        moments.append(statistics.moments(dice["better (unet)"], dice["worse (unet)"], table.luck))
    variances, freedoms = np.array([part[1] for part in moments]), np.array([part[2] for part in moments])
    freedom = variances.sum() ** 2 / (variances**2 / freedoms).sum()
    error = np.sqrt(variances.sum()) / 3
    assert overall.high - overall.low == pytest.approx(2 * stats.t.ppf(0.975, freedom) * error)
    assert overall.false == pytest.approx(probability_false(overall.difference, error**2, freedom))
    assert overall.false < min(claim.false for claim in each)


def test_a_claim_seen_from_the_other_side(tmp_path):
    claim = all_claims(suite_of(tmp_path), ["better (unet)", "worse (unet)"])[0]
    turned = claim.of(claim.second)
    assert (turned.first, turned.second, turned.difference) == (claim.second, claim.first, -claim.difference)
    assert (turned.low, turned.high, turned.false) == (-claim.high, -claim.low, 1 - claim.false)
    assert claim.of(claim.first) is claim
    assert turned.of(claim.first).difference == claim.difference


def test_a_claim_is_that_of_the_better_method_whatever_the_order(tmp_path):
    made = suite_of(tmp_path)
    for names in (["better (unet)", "worse (unet)"], ["worse (unet)", "better (unet)"]):
        found = all_claims(made, names)
        assert {(claim.first, claim.second) for claim in found} == {("better (unet)", "worse (unet)")}
        assert all(claim.difference > 0 for claim in found)


def test_one_seed_makes_no_claim(tmp_path):
    found = all_claims(suite_of(tmp_path, seeds=1), ["better (unet)", "worse (unet)"])
    assert np.isnan([[claim.p, claim.false, claim.low] for claim in found]).all()
