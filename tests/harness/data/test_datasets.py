"""Which data a run uses: found or made up once, split without overlap, and test cases kept out of the pre-training."""

import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from harness import Percentiles, UserError, Window
from harness.api.registry import Registry
from harness.data.corpus import folder_corpus
from harness.data.datasets import (
    check_overlap,
    find_corpora,
    find_data,
    open_corpora,
    open_task,
    overlap,
    read_spec,
)
from harness.data.phantom import is_phantom
from harness.data.splits import split_cases
from tests.conftest import small
from tests.harness.commands import BUDGET, SMALL, harness, last_error, record_of, short_run


@pytest.fixture(scope="module")
def task(registry):
    return small(registry.task("msd_hippocampus"))


@pytest.fixture
def data(task, hippocampus_phantom, tmp_path):
    return open_task(task, hippocampus_phantom, tmp_path / "cache", "fixed")


@pytest.fixture
def scans(data, tmp_path):
    """A folder with a training case, and a mirrored copy of a test case under another name."""
    folder = tmp_path / "scans"
    folder.mkdir()
    shutil.copy(data.split.train[0].images[0], folder / "a.nii.gz")
    image = nib.load(data.split.test[0].images[0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[::-1], image.affine), folder / "b.nii.gz")
    return folder


def test_data_is_where_it_was_said_to_be_or_made_up_once(task, hippocampus_phantom, tmp_path, capsys):
    assert find_data(task, hippocampus_phantom, tmp_path / "runs") == hippocampus_phantom
    assert find_data(task, hippocampus_phantom.parent, tmp_path / "runs") == hippocampus_phantom
    assert not (tmp_path / "runs").exists()
    for wrong in (tmp_path / "gone", next(hippocampus_phantom.rglob("*.nii.gz"))):
        with pytest.raises(UserError, match="is not a folder: give the task's own folder"):
            find_data(task, wrong, tmp_path / "runs")
    root = find_data(task, None, tmp_path / "runs")
    assert is_phantom(root)
    assert root.is_relative_to(tmp_path / "runs" / "phantoms")
    assert "PHANTOM of msd_hippocampus" in capsys.readouterr().err
    before = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert find_data(task, None, tmp_path / "runs") == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == before


def test_no_case_is_on_both_sides_and_the_fingerprint_is_of_the_content(data, task, hippocampus_phantom, tmp_path):
    train, test = ({case.id for case in side} for side in (data.split.train, data.split.test))
    assert not train & test
    assert len(train | test) == 4
    assert data.phantom
    shutil.copytree(hippocampus_phantom, tmp_path / "copy")
    copy = open_task(task, tmp_path / "copy", tmp_path / "other", "fixed")
    assert copy.fingerprint == data.fingerprint
    path = data.split.test[0].label
    path = tmp_path / "copy" / path.relative_to(hippocampus_phantom)
    label = nib.load(path)
    voxels = np.asarray(label.dataobj).copy()
    voxels[voxels == 1] = 2
    nib.save(nib.Nifti1Image(voxels, label.affine), path)
    assert open_task(task, tmp_path / "copy", tmp_path / "other", "fixed").fingerprint != data.fingerprint


def test_to_train_and_test_on_the_same_cases_is_said(task, hippocampus_phantom, tmp_path, capsys):
    data = open_task(task, hippocampus_phantom, tmp_path, "same")
    assert data.split.train == data.split.test
    assert "PLUMBING CHECK" in capsys.readouterr().err


def test_a_corpus_is_a_name_or_a_folder(registry, tmp_path):
    (tmp_path / "scans").mkdir()
    assert read_spec(registry, "flare21=-10,20") == ("flare21", None, Window(-10, 20))
    folder = str(tmp_path / "scans")
    assert read_spec(registry, f"{folder}=percentiles") == (folder, tmp_path / "scans", Percentiles())
    for spec, says in (
        ("", "--corpus is empty"),
        ("flare22", "did you mean 'flare21'"),
        (f"{tmp_path}/gone", "does not exist: give a folder of scans"),
    ):
        with pytest.raises(UserError, match=says):
            read_spec(registry, spec)


def test_a_corpus_is_given_once_and_all_have_equally_many_channels(registry, scans, task, tmp_path):
    ((corpus, root),) = find_corpora(registry, [f"{scans}=1,2"], task, None, tmp_path)
    assert (corpus.name, corpus.normalisation, root) == ("scans", Window(1, 2), scans)
    assert corpus.spacing == task.spacing
    other = tmp_path / "elsewhere" / "scans"
    other.mkdir(parents=True)
    with pytest.raises(UserError, match="two corpora are named 'scans'"):
        find_corpora(registry, [str(scans), str(other)], task, None, tmp_path)


def test_scans_that_are_test_cases_are_refused_unless_that_is_allowed(data, scans, tmp_path, capsys):
    opened = open_corpora([(folder_corpus(scans, data.task), scans)], tmp_path / "cache", skip_bad=False)
    pairs = [("scans/b.nii.gz", data.split.test[0].id)]
    assert {pair: round(value, 6) for pair, value in overlap(data, opened).items()} == dict.fromkeys(pairs, 1.0)
    with pytest.raises(
        UserError, match=f"1 scans .* look like test cases .*b.nii.gz like {data.split.test[0].id}, correlation 1.000"
    ):
        check_overlap(data, opened, allow=False)
    assert check_overlap(data, opened, allow=True) == pairs
    assert "OVERLAP: 1 scans" in capsys.readouterr().err
    (scans / "b.nii.gz").unlink()
    opened = open_corpora([(folder_corpus(scans, data.task), scans)], tmp_path / "cache", skip_bad=False)
    assert check_overlap(data, opened, allow=False) == []


def test_scans_that_cannot_be_used_are_left_out_only_where_that_is_asked_for(scans, tmp_path, capsys):
    found = [(folder_corpus(scans), scans)]
    whole = open_corpora(found, tmp_path / "cache", skip_bad=False)[0]
    (scans / "c.nii.gz").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"c.nii.gz.*; or give --skip-bad"):
        open_corpora(found, tmp_path / "cache", skip_bad=False)
    (opened,) = open_corpora(found, tmp_path / "cache", skip_bad=True)
    assert [Path(case.id).name for case in opened.cases] == ["a.nii.gz", "b.nii.gz"]
    assert list(opened.inventory.bad) == ["scans/c.nii.gz"]
    assert "skipped: " in capsys.readouterr().err
    # What is skipped is not pre-trained on: the corpus has the same name in a table.
    assert opened.label == whole.label
    changed = open_corpora([(folder_corpus(scans), scans)], tmp_path / "cache", skip_bad=True)[0]
    assert changed.label == opened.label
    (scans / "a.nii.gz").unlink()
    assert open_corpora(found, tmp_path / "cache", skip_bad=True)[0].label != opened.label
    (scans / "b.nii.gz").unlink()
    with pytest.raises(UserError, match="none of its 1 files can be used"):
        open_corpora(found, tmp_path / "cache", skip_bad=True)


def smuggle(data_folders, folder, name="innocent.nii.gz"):
    """A test case of the task among the scans: another name, type, orientation and header."""
    shutil.copytree(data_folders / "scans", folder)
    task = Registry().task("msd_hippocampus")
    cases = task.cases(data_folders / "msd_hippocampus")
    (case, *_) = split_cases(task, cases).test
    voxels = np.asarray(nib.load(case.images[0]).dataobj)
    packed = np.round(voxels / voxels.max() * 3000).astype(np.int16)[::-1].transpose(1, 2, 0)
    nib.save(nib.Nifti1Image(packed, np.diag([2.0, 2, 2, 1])), folder / name)
    return case.id


def test_a_test_case_in_the_corpus_is_refused_unless_allowed(data_folders, tmp_path, capsys):
    case = smuggle(data_folders, tmp_path / "corpus")
    generic = ["--mode", "generic", "--corpus", tmp_path / "corpus"]
    words = [*short_run("simmim", data_folders / "msd_hippocampus"), *generic, "--runs", tmp_path / "runs"]
    harness(*words, status=2)
    message = last_error(capsys)
    assert f"corpus/innocent.nii.gz like {case}, correlation 1.000" in message
    assert "--allow-overlap" in message
    assert not list((tmp_path / "runs").glob("*/record.json"))
    harness(*words, "--allow-overlap")
    out, err = capsys.readouterr()
    assert "OVERLAP: 1 scans" in err
    assert "TEST CASES WERE TRAINED OR PRE-TRAINED ON (column seen)" in out
    record = record_of(tmp_path / "runs", "simmim")
    assert record["data"]["overlap"] == [["corpus/innocent.nii.gz", case]]
    assert pd.read_csv(tmp_path / "runs" / "leaderboard.csv")["n_test_seen"].eq(1).all()
    # Asked again without leave, the finished run does not answer.
    harness(*words, status=2)


def test_bad_scans_are_skipped_only_when_asked_and_counted(data_folders, tmp_path, capsys):
    shutil.copytree(data_folders / "scans", tmp_path / "corpus")
    (tmp_path / "corpus" / "bad.nii.gz").write_bytes(b"no image")
    generic = ["--mode", "generic", "--corpus", tmp_path / "corpus"]
    words = [*short_run("simmim", data_folders / "msd_hippocampus"), *generic, "--runs", tmp_path / "runs"]
    harness(*words, status=2)
    message = last_error(capsys)
    assert "bad.nii.gz cannot be read" in message
    assert "--skip-bad" in message
    harness(*words, "--skip-bad")
    assert "skipped: " in capsys.readouterr().err
    (corpus,) = record_of(tmp_path / "runs", "simmim")["data"]["corpora"]
    assert corpus["n"] == 6
    assert list(corpus["skipped"]) == ["corpus/bad.nii.gz"]
    (tmp_path / "corpus" / "bad.nii.gz").unlink()
    harness(*words)
    # The same pre-training, but a record of its own: nothing was skipped.
    assert "pre-training found" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").glob("*-simmim-*/record.json"))) == 2


def test_named_corpora_without_data_are_phantoms(data_folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("harness.data.datasets.CORPUS_CASES", 2)
    monkeypatch.setattr("harness.data.phantom.CORPUS_SIZE", (30, 30, 30))
    words = ["run", "--method", "simmim", "--task", "msd_spleen", "--mode", "generic", "--corpus", "luna16=-900,300"]
    harness(*words, "--corpus", "flare21", "--runs", tmp_path, *BUDGET, *SMALL["unet"], "--set", "task.spacing=4,4,4")
    record = record_of(tmp_path, "simmim")
    assert record["data"]["source"] == "phantom"
    assert [each["name"] for each in record["data"]["corpora"]] == ["luna16", "flare21"]
    assert record["data"]["corpora"][0]["normalisation"] == "Window(low=-900.0, high=300.0)"
    assert "PHANTOM DATA" in capsys.readouterr().out


def test_a_folder_of_one_kind_twice_is_refused(data_folders, tmp_path, capsys):
    twice = ["--mode", "generic", "--corpus", data_folders / "scans", "--corpus", data_folders / "scans"]
    harness(*short_run("simmim", data_folders / "msd_hippocampus"), *twice, "--runs", tmp_path, status=2)
    assert "two corpora are named 'scans'" in last_error(capsys)


def label_like(folder, numbers):
    folder.mkdir()
    for number in range(4):
        rng = np.random.default_rng(number)
        voxels = rng.integers(0, 3 if number in numbers else 500, (16, 16, 16)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"scan{number}.nii.gz")
    return folder


def test_a_corpus_of_label_maps_is_refused_by_its_content(tmp_path, capsys):
    """Their names say nothing. One of four is said, most are refused; also when the signatures are in the cache."""
    few, most = label_like(tmp_path / "few", {1}), label_like(tmp_path / "most", {0, 1, 3})
    for _ in range(2):
        capsys.readouterr()
        (opened,) = open_corpora([(folder_corpus(few), few)], tmp_path / "cache", skip_bad=False)
        assert len(opened.cases) == 4
        assert "DESERVES A LOOK: corpus 'few': 1 of 4 files have few whole values" in capsys.readouterr().err
        with pytest.raises(UserError, match=r"corpus 'most': 3 of 4 files .* give the folder of the scans"):
            open_corpora([(folder_corpus(most), most)], tmp_path / "cache", skip_bad=False)
