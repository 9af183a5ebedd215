"""Corpora: which files of a folder are scans, where a named one is looked for, and under which window."""

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from harness import Percentiles, UserError, Window
from harness.api.registry import Registry
from harness.api.task import ZScore
from harness.data.corpus import folder_corpus, parse_spec, with_intensities, with_normalisation
from harness.data.phantom import write_phantom
from tests.conftest import small
from tests.harness.commands import harness, record_of, short_run


@pytest.fixture
def folder(tmp_path):
    """Three scans, two label maps, and what is neither."""
    root = tmp_path / "My Scans (2)"
    scans = ["b.nii.gz", "deep/a.nrrd", "deep/b.nii.gz"]
    for name in (*scans, "labels/a.nii.gz", "deep/a_seg.nii.gz", ".hidden/c.nii.gz", ".d.nii.gz", "readme.txt"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    (root / "folder.nii.gz").mkdir()
    return root


def test_the_scans_of_a_folder_are_its_images_that_are_named_as_no_labels(folder):
    corpus = folder_corpus(folder)
    cases = corpus.cases(folder)
    assert corpus.name == "my_scans_2"
    assert [case.id for case in cases] == [
        "my_scans_2/b.nii.gz",
        "my_scans_2/deep/a.nrrd",
        "my_scans_2/deep/b.nii.gz",
    ]
    assert [case.images for case in cases] == [
        (folder / "b.nii.gz",),
        (folder / "deep/a.nrrd",),
        (folder / "deep/b.nii.gz",),
    ]
    assert all(case.label is None for case in cases)
    assert corpus.num_labels(folder) == 2


def test_a_folder_without_scans_is_refused(tmp_path):
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "x.nii.gz").touch()
    with pytest.raises(UserError, match="no image below"):
        folder_corpus(tmp_path).cases(tmp_path)


def test_a_folder_is_prepared_as_the_task_is(folder, registry):
    alone, task = folder_corpus(folder), registry.task("brats")
    assert (alone.spacing, alone.normalisation, len(alone.channels)) == (None, Percentiles(), 1)
    like = folder_corpus(folder, task)
    assert (like.spacing, like.normalisation, like.channels) == (task.spacing, task.normalisation, task.channels[:1])


def test_a_named_corpus_is_found_in_or_beside_the_data_or_is_the_data_itself(tmp_path, folder):
    corpus = replace(folder_corpus(folder), name="known", folders=("Known", "known_v2"), registration="somewhere")
    data = tmp_path / "data"
    (data / "Known").mkdir(parents=True)  # empty: not it
    with pytest.raises(UserError, match=r"corpus 'known': not found as Known, known_v2 in or beside .*--corpus DIR"):
        corpus.find(data)
    places = [data, tmp_path / "known_v2", data / "Known"]
    for place in places:
        place.mkdir(exist_ok=True)
        (place / "x.nii.gz").touch()
        assert corpus.find(data) == place
    (data / "Known" / "x.nii.gz").rename(data / "Known" / "x_seg.nii.gz")  # label maps alone are no corpus
    assert corpus.find(data) == tmp_path / "known_v2"


@pytest.mark.parametrize(
    ("spec", "name", "normalisation"),
    [
        ("flare21", "flare21", None),
        ("flare21=-175,250", "flare21", Window(-175, 250)),
        ("d/scans=0.5,1.5", "d/scans", Window(0.5, 1.5)),
        ("d/a=b=percentiles", "d/a=b", Percentiles()),
        ("d/lr=1,x", "d/lr=1,x", None),
        ("d/x=1e3,2e3", "d/x=1e3,2e3", None),
    ],
)
def test_a_corpus_may_be_given_a_window(spec, name, normalisation, folder):
    assert parse_spec(spec) == (name, normalisation)
    corpus = folder_corpus(folder)
    changed = with_normalisation(corpus, normalisation)
    assert changed.normalisation == (normalisation or corpus.normalisation)
    assert replace(changed, normalisation=corpus.normalisation) == corpus


@pytest.mark.parametrize("window", ["250,-175", "5,5", f"0,{10**39}"])
def test_a_window_that_is_none_is_refused(window):
    with pytest.raises(UserError, match="is empty or too wide: give its lower end first"):
        parse_spec(f"scans={window}")


def test_the_corpora_that_come_along_know_where_they_lie(registry):
    for name in registry.names("corpus"):
        corpus = registry.load("corpus", name)
        assert corpus.name == name
        assert corpus.folders, name
        assert Path(corpus.phantom.format(1)) != Path(corpus.phantom.format(2)), name


def test_generic_mode_pre_trains_on_the_corpus(corpus_runs):
    record = record_of(corpus_runs, "simmim")
    assert record["mode"] == "generic"
    assert len(record["data"]["pretrain"]) == 6
    assert record["data"]["pretrain"][0].startswith("scans/")
    assert record["data"]["corpora"][0]["n"] == 6
    assert record["data"]["n_test_seen"] == 0
    assert record["data"]["overlap"] == []


def test_two_windows_of_one_corpus_are_two_methods(data_folders, tmp_path, capsys):
    for window in ("0,500", "0,900"):
        generic = ["--mode", "generic", "--corpus", f"{data_folders / 'scans'}={window}"]
        harness(*short_run("simmim", data_folders / "msd_hippocampus"), *generic, "--runs", tmp_path)
    frame = pd.read_csv(tmp_path / "leaderboard.csv")
    assert len(frame["method"].unique()) == 2
    assert (frame["n_seeds"] == 1).all()


def test_names_of_label_maps_are_no_scans(tmp_path, capsys):
    brats = small(Registry().task("brats"))
    write_phantom(brats, tmp_path / "brats", 2, seed=0)
    harness("data", "check", tmp_path / "brats", "--runs", tmp_path)
    assert "8 cases" in capsys.readouterr().out


def test_a_corpus_beside_the_folder_that_one_is_in_is_found(tmp_path, folder, monkeypatch):
    corpus = replace(folder_corpus(folder), name="known", folders=(folder.name,))
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path / "data")
    assert corpus.find(tmp_path / "data") == folder
    assert corpus.find(Path()).resolve() == folder


@pytest.mark.parametrize("normalisation", [Percentiles(), ZScore(), Window(-1000.0, 400.0), Window(0.5, 3)], ids=repr)
def test_the_intensities_of_a_record_are_those_of_the_spec(normalisation):
    assert parse_spec(with_intensities("scans", repr(normalisation)))[1] == normalisation
    assert with_intensities("scans=0,1", repr(normalisation)) == "scans=0,1"
    assert with_intensities("scans", "Another()") == "scans"
