"""Runs from anywhere: what is damaged is named and left out, and what is whole is read as it stands."""

import json
import re

import numpy as np
import pandas as pd
import pytest

from leaderboards import records
from tests.leaderboards.made import called, sign, write_run


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


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("c1,a,scored,0.8", "c1,a,scored,nan#", "could not convert|not finite"),
        ("hd95_mm", "hd95_mm;", "header"),
        ("c1,a,scored", "c2,a,scored", "needs one row"),
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
    sign(place)
    assert 'c,"1' in records.load_run(place).cases


def test_the_largest_seed_of_a_run_is_read(tmp_path):
    write_run(tmp_path, seed=2**63 - 1)
    assert [run.seed for run in records.load_runs([tmp_path])[0]] == [2**63 - 1]


def test_folders_of_several_labs_are_merged(capsys, tmp_path):
    write_run(tmp_path / "a", "scratch")
    write_run(tmp_path / "b", "better")
    out = tmp_path / "board.csv"
    called(capsys, "leaderboard", "build", "--from", tmp_path / "a", "--from", tmp_path / "b", "--out", out)
    assert set(pd.read_csv(out)["method"]) == {"scratch", "better"}


def test_a_conflict_between_labs_is_named_and_nothing_is_overwritten(capsys, tmp_path):
    write_run(tmp_path / "a", "scratch")
    place = write_run(tmp_path / "b", "scratch")
    write_run(tmp_path / "b", "better")
    record = json.loads((place / "record.json").read_text()) | {"finished": "2027-01-01T00:00:00Z"}
    (place / "record.json").write_text(json.dumps(record))
    words = ["leaderboard", "build", "--from", tmp_path / "a", "--from", tmp_path / "b", "--out", tmp_path / "o.csv"]
    said = called(capsys, *words, status=2)
    assert "is also in" in said
    assert str(tmp_path / "a") in said
    assert set(pd.read_csv(tmp_path / "o.csv")["method"]) == {"better"}
    assert json.loads((place / "record.json").read_text()) == record


def test_a_folder_without_runs_is_named(capsys, tmp_path):
    assert "no finished run" in called(capsys, "leaderboard", "build", "--runs", tmp_path, status=2)
    assert "is not a folder" in called(capsys, "leaderboard", "build", "--runs", tmp_path / "x", status=2)


def test_values_are_those_of_the_table_of_cases_in_whatever_order_it_has(tmp_path):
    place = write_run(tmp_path)
    frame = pd.read_csv(place / "cases.csv")
    frame.loc[(frame["case"] == "c3") & (frame["target"] == "a"), ["status", "dice", "hd95_mm"]] = ["missed", 0.0, 50.0]
    frame.loc[(frame["case"] == "c3") & (frame["target"] == "a"), "surface_dice"] = np.nan
    frame.sample(frac=1, random_state=0).to_csv(place / "cases.csv", index=False)
    sign(place)
    run = records.load_run(place)
    assert run.cases == tuple(sorted(set(frame["case"])))
    assert run.targets == ("a", "b")
    for found, column in ((run.dice, "dice"), (run.hd95, "hd95_mm"), (run.surface_dice, "surface_dice")):
        np.testing.assert_array_equal(found, frame.pivot(index="case", columns="target", values=column).to_numpy())
    words = np.array(["scored", "missed", "spurious", "empty"])[run.status]
    assert (words == frame.pivot(index="case", columns="target", values="status").to_numpy()).all()
    assert np.argwhere(run.missed).tolist() == [[3, 0]]


def test_a_run_is_named_by_what_was_changed(tmp_path):
    """Files by name and digest, not by the path that they had; corpora by what is in them."""
    overrides = {
        "method.ratio": "0.6",
        "method.weights": "/home/me/w.pt",
        "backbone.features": "4",
        "finetune.steps": "9",
    }
    data = {"corpora": [{"name": "luna16", "fingerprint": "aa"}, {"name": "mine", "fingerprint": "bb"}], "split": "1/5"}
    run = records.load_run(write_run(tmp_path, "m", overrides=overrides, files={"weights": "0123456789"}, data=data))
    assert run.method == "m{ratio=0.6, weights=w.pt@01234567, corpus=luna16@aa+mine@bb}"
    assert run.backbone == "unet{features=4}"
    assert run.table[:3] == ("t", f"real:{'f' * 8}", "demo{finetune.steps=9, split=1/5}")


def test_the_version_of_a_task_is_part_of_its_name_from_the_second_on(tmp_path):
    names = [records.load_run(write_run(tmp_path, task_version=version)).table[0] for version in ("1", "2")]
    assert names == ["t", "t@2"]


def test_folders_without_a_record_are_no_runs_and_a_dangling_record_is_named(tmp_path):
    place = write_run(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "record.json").symlink_to(tmp_path / "nowhere")
    runs, problems = records.load_runs([tmp_path])
    assert [run.folder for run in runs] == [place]
    assert len(problems) == 1
    assert str(tmp_path / "moved") in problems[0]


def test_costs_of_a_run(tmp_path):
    on_gpus = {"device": "cuda", "processes": 2}
    folder = write_run(
        tmp_path,
        "better",
        computed_with={"pretrain": on_gpus, "finetune": {"device": "cpu"}},
        energy={"pretrain_kwh": 0.5, "finetune_kwh": 0.25},
        memory={"pretrain": {"host_peak_gib": 9.0, "device_peak_gib": 3.0}, "run": {"host_peak_gib": 2.0}},
    )
    run = records.load_run(folder)
    assert run.gpu_hours == pytest.approx(2 * 103 / 3600)
    assert run.kwh == 0.75
    assert run.peak_memory == 3.0  # of the device, whatever the process has
    plain = records.load_run(write_run(tmp_path, "scratch", energy={"finetune_kwh": None}, memory={"run": {}}))
    assert (plain.gpu_hours, plain.kwh, plain.peak_memory) == (None, None, None)
    control = records.load_run(write_run(tmp_path, "scratch", 1, energy={"finetune_kwh": 0.1}))
    assert control.kwh == 0.1  # it pre-trains nothing, so that nothing is missing
    tuned = {"energy": {"finetune_kwh": 0.1}, "timing": {"seconds": {"tune": 9.0}}}
    assert records.load_run(write_run(tmp_path, "scratch", 2, **tuned)).kwh is None  # as earlier versions wrote it
    tuned["energy"]["tune_kwh"] = 0.4
    assert records.load_run(write_run(tmp_path, "scratch", 3, **tuned)).kwh == 0.5


@pytest.mark.parametrize("data", [{"n_train": "x"}, {"validation": 5}, {"validation": [["a"]]}])
def test_data_of_another_type_is_refused(tmp_path, data):
    write_run(tmp_path, data=data)
    runs, problems = records.load_runs([tmp_path])
    assert runs == []
    assert "data." in problems[0]
