"""Imported results stand beside measured rows of the same cases, and change nothing about them."""

import dataclasses

import numpy as np
import pytest

from leaderboards import board, compare, curves, table, website
from leaderboards.records import RecordError, load_run, load_runs
from leaderboards.validate import check_csv
from tests.leaderboards.made import sign, write_run

OTHER = {"imported": {"kind": "label maps", "note": "16 epochs"}, "preset": "imported"}


@pytest.fixture
def runs(tmp_path):
    for seed in range(3):
        write_run(tmp_path, "scratch", seed, 0.80)
        write_run(tmp_path, "mae", seed, 0.82)
    return tmp_path


def read(folder):
    return load_runs([folder])[0]


def without_estimates(tables):
    """The rows of the measured methods, with every number but intervals' random ends."""
    return {
        (group.method, name): value
        for each in tables
        for group in each.groups
        if not group.imported
        for name, value in dataclasses.asdict(group).items()
        if name in ("p", "note")
    }


def test_an_imported_row_is_neither_ranked_nor_tested_and_changes_no_test(runs):
    before = board.gather(read(runs))
    write_run(runs, "nnU-Net", 0, 0.9, backbone="-", **OTHER)
    (after,) = board.gather(read(runs))
    assert [group.method for group in after.groups] == ["mae", "nnU-Net (imported)", "scratch"]
    assert after.ranks() == [1, None, 2]
    imported = after.groups[1]
    assert np.isnan(imported.p).all()
    assert imported.delta is None
    assert "imported (label maps, scored here): neither ranked nor tested; 16 epochs" in imported.note
    np.testing.assert_equal(without_estimates([after]), without_estimates(before))
    assert after.key[2] == "demo"


def test_it_stands_in_every_table_of_the_same_cases_and_else_in_its_own(runs):
    write_run(runs, "scratch", 0, 0.7, preset="small")
    write_run(runs, "nnU-Net", 0, 0.9, backbone="-", **OTHER)
    write_run(runs, "other", 0, 0.9, cases=5, backbone="-", **OTHER)
    write_run(runs, "third", 0, 0.9, fingerprint="e" * 32, backbone="-", **OTHER)
    rows = {
        (each.key[2], each.key[1], len(each.groups[0].runs[0].cases)): [group.method for group in each.groups]
        for each in board.gather(read(runs))
    }
    assert rows[("demo", "real:ffffffff", 8)] == ["mae", "nnU-Net (imported)", "scratch"]
    assert rows[("small", "real:ffffffff", 8)] == ["nnU-Net (imported)", "scratch"]
    assert rows[("imported", "real:ffffffff", 5)] == ["other (imported)"]
    assert rows[("imported", "real:eeeeeeee", 8)] == ["third (imported)"]


def test_no_import_passes_for_the_control(runs):
    """Another software's scratch must not become what our methods are compared with."""
    write_run(runs, "scratch", 0, 0.1, run_id="imported-scratch", **OTHER)
    (only,) = board.gather(read(runs))
    mae = next(group for group in only.groups if group.method == "mae")
    assert mae.delta.mean[-1] == pytest.approx(0.01, abs=0.001)  # the other target is the same
    assert [group.method for group in only.groups] == ["mae", "scratch", "scratch (imported)"]
    assert [group.control for group in only.groups] == ["", "matched", ""]


def test_the_csv_says_imported_and_is_recomputed(runs, tmp_path):
    write_run(runs, "nnU-Net", 0, 0.9, backbone="-", **OTHER)
    tables = board.gather(read(runs))
    frame = table.build(tables)
    assert set(frame[frame["method"] == "nnU-Net (imported)"]["source"]) == {"imported"}
    table.write(frame, tmp_path / "board.csv")
    problems, said = check_csv(tmp_path / "board.csv", read(runs))
    assert problems == []
    assert "recomputed from 7 runs" in said
    text = (tmp_path / "board.csv").read_text()
    (tmp_path / "board.csv").write_text(text.replace(",imported,", ",borrowed,"))
    assert "give measured, imported or reported" in check_csv(tmp_path / "board.csv", read(runs))[0][0]
    assert "nnU-Net (imported)" in table.markdown(frame)
    assert table.markdown(frame).count("###") == 1


def test_an_imported_row_with_a_rank_is_refused(runs, tmp_path):
    write_run(runs, "nnU-Net", 0, 0.9, backbone="-", **OTHER)
    frame = table.build(board.gather(read(runs)))
    frame.loc[frame["source"] == "imported", "rank"] = 1
    table.write(frame, tmp_path / "board.csv")
    assert any("an imported row has a rank" in problem for problem in check_csv(tmp_path / "board.csv", read(runs))[0])


def test_dice_alone_is_allowed_for_a_summary_only(tmp_path):
    place = write_run(tmp_path, "nnU-Net", 0, 0.9, imported={"kind": "summary.json"}, preset="imported")
    with pytest.raises(RecordError, match="imported without distances has some"):
        load_run(place)
    text = (place / "cases.csv").read_text().splitlines()
    header = text[0].split(",")
    cells = [dict(zip(header, line.split(","), strict=True)) for line in text[1:]]
    lines = [",".join({**row, "hd95_mm": "", "surface_dice": ""}.values()) for row in cells]
    (place / "cases.csv").write_text("\n".join([text[0], *lines]) + "\n")
    sign(place)
    assert np.isnan(load_run(place).hd95).all()
    record = (place / "record.json").read_text().replace('"summary.json"', '"label maps"')
    (place / "record.json").write_text(record)
    with pytest.raises(RecordError, match="no Dice or no HD95"):
        load_run(place)


def test_comparing_with_an_imported_row_has_no_p_value_and_needs_the_same_cases_only(runs):
    write_run(runs, "nnU-Net", 0, 0.9, **OTHER)
    write_run(runs, "nnU-Net", 1, 0.9, **OTHER)
    write_run(runs, "other", 0, 0.9, cases=5, **OTHER)
    everything = read(runs)
    (made,) = compare.compare_methods(board.gather(everything), "nnU-Net (imported)", "scratch")
    assert made.summary["p"].isna().all()
    assert made.summary["difference"].iloc[-1] == pytest.approx(0.05, abs=0.001)
    assert "neither ranked nor tested" in made.note
    by_name = {(run.method, run.seed): run for run in everything}
    assert compare.compare_runs(by_name["scratch", 0], by_name["nnU-Net (imported)", 0]).seeds == [0]
    with pytest.raises(board.NotComparableError, match="differ in test_cases"):
        compare.compare_runs(by_name["scratch", 0], by_name["other (imported)", 0])


def test_no_curve_holds_an_imported_row(runs):
    """Also where it is named as a measured method is."""
    for seed in range(3):
        write_run(runs, "mae", seed, 0.7, label_fraction=0.5)
    (before,) = curves.find(board.gather(read(runs)))
    write_run(runs, "mae", 0, 0.99 - 0.09, run_id="imported-mae", **OTHER)
    (after,) = curves.find(board.gather(read(runs)))
    assert after.left_out == []
    assert [(each.name, each.points) for each in after.curves] == [(each.name, each.points) for each in before.curves]
    assert [each.area[0] for each in after.curves] == [each.area[0] for each in before.curves]


def test_the_page_of_an_imported_result_says_where_it_comes_from(runs, tmp_path):
    place = write_run(
        runs, "nnU-Net", 0, 0.9, imported={"kind": "label maps", "note": "<b>16</b> epochs"}, preset="imported"
    )
    website.publish(read(runs), tmp_path / "site", title="x")
    page = (tmp_path / "site" / "runs" / place.name / "index.html").read_text()
    assert "Imported from other software (label maps): &lt;b&gt;16&lt;/b&gt; epochs." in page
    assert "harness reproduce" not in page
