"""Results as pandas frames and figures."""

import numpy as np
import pandas as pd
import pytest

import leaderboards as lb
from harness import UserError
from tests.leaderboards.made import built, three_fractions, write_run


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        for method, dice in (("scratch", 0.7), ("better", 0.8)):
            write_run(tmp_path / "runs", method, seed, dice=dice, memory={"run": {"host_peak_gib": 1.5}})
    return tmp_path / "runs"


def test_rows_are_those_of_the_command(runs):
    pd.testing.assert_frame_equal(lb.load(runs).rows(), built(runs))
    assert "better" in str(lb.load(runs))
    assert repr(lb.load(runs)) == "<4 runs in 1 table>"
    assert "<td>better</td>" in lb.load(runs)._repr_html_()


def test_cases_are_those_of_the_files(runs):
    cases = lb.load(runs).cases()
    for run_id, rows in cases.groupby("run_id"):
        written = pd.read_csv(runs / run_id / "cases.csv").sort_values(["case", "target"], ignore_index=True)
        own = rows.sort_values(["case", "target"], ignore_index=True)
        for column in ("case", "target", "status", "dice", "hd95_mm", "surface_dice"):
            assert own[column].equals(written[column]), column
    assert cases["dice"].isna().sum() == 4  # target b is empty in the first case of each run


def test_costs_are_those_of_the_records(runs):
    costs = lb.load(runs).costs().set_index(["method", "seed"])
    assert costs.loc[("better", 0), "pretrain_seconds"] == 100
    assert np.isnan(costs.loc[("scratch", 1), "pretrain_seconds"])
    assert costs.loc[("better", 1), "pretrain_step_ms"] == 100
    assert (costs["host_peak_gib"] == 1.5).all()


def test_runs_are_chosen_by_their_fields(runs):
    results = lb.load(runs)
    assert {run.record["method"] for run in results.only(method="b*").runs} == {"scratch", "better"}
    assert {run.seed for run in results.only(seed=1).runs} == {1}
    assert len(results.only(seed=[0, 1], label_fraction=1.0).runs) == 4
    with pytest.raises(UserError, match="seed=7 leaves no run: seed is one of 0, 1"):
        results.only(seed=7)


def test_one_run_and_several_folders(runs, tmp_path):
    (folder, *_) = sorted(runs.iterdir())
    assert [run.folder for run in lb.load(folder).runs] == [folder]
    write_run(tmp_path / "others", "third")
    assert len(lb.load(runs, str(tmp_path / "others")).runs) == 5
    with pytest.raises(UserError, match="is not a folder"):
        lb.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no finished run"):
        lb.load(tmp_path / "empty")


def test_a_record_that_cannot_be_used_is_a_problem(runs):
    (folder, *_) = sorted(runs.iterdir())
    (folder / "record.json").write_text("{}")
    results = lb.load(runs)
    assert len(results.runs) == 3
    assert "not a run record" in results.problems[0]
    assert results.only(seed=[0, 1]).problems == results.problems
    assert lb.load(folder).problems == results.problems


def test_a_published_site_is_a_folder_of_its_runs(runs, tmp_path):
    lb.load(runs).publish(tmp_path / "site")
    pd.testing.assert_frame_equal(lb.load(tmp_path / "site").rows(), lb.load(runs).rows())


def test_comparisons_curves_figures_and_sites(runs, tmp_path):
    results = lb.load(runs)
    (comparison,) = results.compare("better", "scratch")
    assert comparison.summary.set_index("target").loc["a", "difference"] == pytest.approx(0.1)
    drawn = results.figures(tmp_path / "figures")
    assert {path.stem for path in drawn} >= {"difference", "dice", "pareto"}
    assert all(path.is_file() and text for path, text in drawn.items())
    assert results.publish(tmp_path / "site") == 1 + 1 + 4
    (curves,) = lb.load(three_fractions(tmp_path / "fractions")).curves()
    assert curves.curves[0].points == (0.1, 0.5, 1.0)
    with pytest.raises(UserError, match="unknown axis"):
        results.curves("labels")
