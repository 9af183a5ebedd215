"""Damaged caches and records, hostile names and headers, links, broken-off commands: each answered in one line or mended."""

import json
import os
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from harness import UserError
from harness.api.registry import Registry
from harness.cli.main import main
from harness.data.image_files import read_image
from harness.data.phantom import write_phantom
from harness.system.files import check_name, digest_tree
from tests.conftest import small
from tests.harness.test_data_commands import BUDGET, error, harness


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "Task04_Hippocampus"
    write_phantom(small(Registry().task("msd_hippocampus")), root, 4, seed=0)
    return root


def words(data, runs, method="scratch", task="msd_hippocampus"):
    return ["run", "--method", method, "--task", task, "--data", data, "--runs", runs, *BUDGET]


def nnunet(data, folder, names, labels=None):
    """The phantom as an nnU-Net folder whose `dataset` key gives the cases' names."""
    shutil.copytree(data, folder)
    cases = Registry().task("msd_hippocampus").cases(data)
    listed = {
        name: {"images": [f"imagesTr/{case.images[0].name}"], "label": f"labelsTr/{case.label.name}"}
        for name, case in zip(names, cases, strict=True)
    }
    described = {
        "name": "mine",
        "channel_names": {"0": "MRI"},
        "labels": labels or {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
        "dataset": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".hidden", "", "x" * 201, "a\\b", "a\0b", "b\udcff"])
def test_names_that_lead_elsewhere_are_refused(name, data, tmp_path, capsys):
    with pytest.raises(UserError, match="a case is named"):
        check_name(name)
    folder = nnunet(data, tmp_path / "mine", [name, "c2", "c3", "c4"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")}
    harness(
        "run",
        "--method",
        "scratch",
        "--task",
        folder,
        "--runs",
        tmp_path / "runs",
        "--save-predictions",
        *BUDGET,
        status=2,
    )
    assert "a case is named" in error(capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")} == before
    harness("data", "check", folder, "--runs", tmp_path / "runs", status=2)
    assert "names (spoils a run, 1)" in capsys.readouterr().out


def test_cases_and_targets_may_be_called_na_and_null(data, tmp_path, capsys):
    labels = {"background": 0, "null": 1, "nan": 2}
    folder = nnunet(data, tmp_path / "mine", ["NA", "null", "nan", "None"], labels)
    harness("run", "--method", "scratch", "--task", folder, "--runs", tmp_path / "runs", "--split", "same", *BUDGET)
    frame = pd.read_csv(tmp_path / "runs" / "leaderboard.csv", keep_default_na=False)
    assert set(frame["target"]) == {"average", "null", "nan"}
    assert set(frame["n_cases"]) <= {"4", 4}


def test_a_case_listed_twice_spoils_a_run_in_the_check_too(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "twice")
    path = tmp_path / "twice" / "dataset.json"
    content = json.loads(path.read_text())
    content["training"].append(content["training"][0])
    path.write_text(json.dumps(content))
    harness("data", "check", "msd_hippocampus", "--data", path.parent, "--runs", tmp_path, status=2)
    assert "has the name of another case" in capsys.readouterr().out


def test_what_links_lead_to_is_what_counts(data, tmp_path, capsys):
    real, linked = tmp_path / "real", tmp_path / "linked"
    shutil.copytree(data, real)
    linked.mkdir()
    shutil.copyfile(real / "dataset.json", linked / "dataset.json")
    shutil.copyfile(real / "PHANTOM.json", linked / "PHANTOM.json")
    for sub in ("imagesTr", "labelsTr"):
        (linked / sub).symlink_to(real / sub)
    (real / "imagesTr" / "loop").symlink_to(real)
    before = digest_tree(linked)
    harness(*words(linked, tmp_path / "runs"))
    for path in (real / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 3, 0), image.affine), path)
    assert digest_tree(linked) != before
    capsys.readouterr()
    harness(*words(linked, tmp_path / "runs"))
    assert "finished before" not in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 2


@pytest.mark.parametrize("targets", [{"inner": (1,), "whole": (1, 2)}, {"whole": (1, 2), "inner": (1,)}])
def test_regions_are_composed_in_any_order(targets):
    task = replace(Registry().task("msd_hippocampus"), targets=targets, overlapping=True)
    label = np.array([[[0, 1, 2]]], np.uint8)
    assert np.array_equal(task.compose(task.masks(label)), label)


def test_regions_that_overlap_without_nesting():
    task = replace(
        Registry().task("msd_hippocampus"), targets={"a": (1, 2), "b": (2, 3)}, overlapping=True, labels=(0, 1, 2, 3)
    )
    label = np.array([[[0, 1, 2, 3]]], np.uint8)
    assert np.array_equal(task.compose(task.masks(label)), label)


def test_a_run_that_broke_off_after_its_predictions_can_be_asked_again(data, tmp_path):
    harness(*words(data, tmp_path), "--save-predictions")
    (record,) = tmp_path.glob("*/record.json")
    before = {path.name: path.read_bytes() for path in (record.parent / "predictions").iterdir()}
    record.unlink()
    harness(*words(data, tmp_path), "--save-predictions")
    assert {path.name: path.read_bytes() for path in (record.parent / "predictions").iterdir()} == before
    assert not list(record.parent.glob(".predictions*"))


DAMAGED = {
    "digests are a list": ("cache/digests.json", b"[]"),
    "digests are null": ("cache/digests.json", b"null"),
    "digests nest without end": ("cache/digests.json", b"[" * 200_000),
    "signature cut": ("cache/signatures/*.npy", lambda content: content[:100]),
    "signature empty": ("cache/signatures/*.npy", b""),
    "stage cut": ("cache/pretrain/*/stage.json", lambda content: content[:20]),
    "stage is a list": ("cache/pretrain/*/stage.json", b"[]"),
    "pre-trained weights cut": ("cache/pretrain/*/weights.safetensors", lambda content: content[:500]),
    "pre-trained weights gone": ("cache/pretrain/*/weights.safetensors", None),
    "history gone": ("cache/pretrain/*/history.jsonl", None),
    "geometry gone": ("cache/prepared/*/*.json", b'{"files": {}}'),
}


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    runs = tmp_path_factory.mktemp("finished")
    harness(*words(data, runs, "simmim"))
    return runs


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_caches_are_made_again(kind, data, finished, tmp_path):
    runs = tmp_path / "runs"
    shutil.copytree(finished, runs)
    (record,) = runs.glob("*/record.json")
    metrics = json.loads(record.read_text())["metrics"]
    record.unlink()
    pattern, change = DAMAGED[kind]
    found = list(runs.glob(pattern))
    assert found
    for path in found:
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    harness(*words(data, runs, "simmim"))
    assert json.loads(record.read_text())["metrics"] == metrics


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_record_is_named(content, data, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs")
    (record,) = (tmp_path / "runs").glob("*/record.json")
    record.write_text(content)
    harness(*words(data, tmp_path / "runs", "simmim"), status=2)
    assert "record.json is damaged: remove the folder" in error(capsys)


def test_a_damaged_volume_is_named_and_mended(data, finished, tmp_path, capsys):
    shutil.copytree(finished, tmp_path / "runs")
    (record,) = (tmp_path / "runs").glob("*/record.json")
    record.unlink()
    for path in (tmp_path / "runs").glob("cache/prepared/*/*.image.npy"):
        path.write_bytes(b"xxxxx" + path.read_bytes()[5:])
    shutil.rmtree(tmp_path / "runs" / "cache" / "pretrain")
    harness(*words(data, tmp_path / "runs", "simmim"))
    assert "volumes in" in (said := capsys.readouterr().err)
    assert "are not as they were written: they are prepared again" in said


NESTED = "nested without end"
RECORD = {
    "spacing 0": lambda r: r["config"]["prepared"].update(spacing=[0, 1, 1]),
    "spacing negative": lambda r: r["config"]["prepared"].update(spacing=[-1, 1, 1]),
    "spacing tiny": lambda r: r["config"]["prepared"].update(spacing=[0.001] * 3),
    "spacing of two": lambda r: r["config"]["prepared"].update(spacing=[1, 1]),
    "spacing that overflows": lambda r: r["config"]["prepared"].update(spacing=[1e-200] * 3),
    "percentiles below 0": lambda r: r["config"]["prepared"].update(low=-5),
    "percentiles above 100": lambda r: r["config"]["prepared"].update(high=101),
    "window of one value": lambda r: r["config"]["prepared"].update(normalisation="Window", low=0, high=1e-45),
    "window without end": lambda r: r["config"]["prepared"].update(normalisation="Window", low=-1e308, high=1e308),
    "target without a label": lambda r: r["task_description"]["targets"].update(anterior=[]),
    "label in a list": lambda r: r["task_description"].update(labels=[[0], 1, 2]),
    "crop beyond the memory": lambda r: r["config"]["finetune"].update(crop=[3200000] * 3),
    "crop beyond 64 bits": lambda r: r["config"]["finetune"].update(crop=[32 * 10**30] * 3),
    "features beyond the memory": lambda r: r["config"]["backbone_settings"].update(features=[10**5] * 5),
    "nested": lambda r: r.update(config=NESTED),
    "window is text": lambda r: r["config"]["prepared"].update(low="x"),
    "unknown kind": lambda r: r["config"]["prepared"].update(normalisation="Exec"),
    "label 300": lambda r: r["task_description"]["targets"].update(anterior=[300]),
    "crop no multiple": lambda r: r["config"]["finetune"].update(crop=[32, 32, 33]),
    "no description": lambda r: r.pop("task_description"),
    "no such backbone": lambda r: r.update(backbone="os.system"),
    "other features": lambda r: r["config"]["backbone_settings"].update(features=[8, 8, 8, 8, 8]),
}


@pytest.mark.parametrize("kind", RECORD)
def test_records_are_not_trusted(kind, data, finished, tmp_path, capsys):
    (folder,) = [path.parent for path in finished.glob("*/record.json")]
    shutil.copytree(folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    RECORD[kind](record)
    text = json.dumps(record).replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000)
    (tmp_path / "run" / "record.json").write_text(text)
    image = next((data / "imagesTr").iterdir())
    harness("predict", "--run", tmp_path / "run", image, tmp_path / "out.nii.gz", status=2)
    assert error(capsys).startswith("harness: error: ")
    assert not (tmp_path / "out.nii.gz").exists()


@pytest.mark.parametrize("scale", [1000.0, 0.001])
def test_spacings_that_cannot_be(scale, data, finished, tmp_path, capsys):
    """Metres, or micrometres: no grid of that size is made, and none of a voxel."""
    root = tmp_path / "data"
    shutil.copytree(data, root)
    case = Registry().task("msd_hippocampus").cases(root)[0]
    for path in case.files:
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), np.diag([scale] * 3 + [1])), path)
    harness("data", "check", "msd_hippocampus", "--data", root, "--runs", tmp_path, status=2)
    assert "spacings that cannot be (spoils a run, 1)" in capsys.readouterr().out
    harness("data", "prepare", "msd_hippocampus", "--data", root, "--runs", tmp_path, status=2)
    assert "is its spacing in mm?" in error(capsys) or scale > 1  # or the disk could not hold it
    (folder,) = [path.parent for path in finished.glob("*/record.json")]
    harness("predict", "--run", folder, case.images[0], tmp_path / "out.nii.gz", status=2)
    assert "is its spacing in mm?" in error(capsys)


MHD = b"NDims = 3\nDimSize = 4 4 4\nElementType = MET_UCHAR\n"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("padded.mhd", b"Comment = " + b"x" * 200_000 + b"\n" + MHD + b"ElementDataFile = ../outside.raw\n"),
        ("blank.mhd", MHD + b"   ElementDataFile = ../outside.raw\n"),
        ("colon.mhd", MHD + b"ElementDataFile: ../outside.raw\n"),
        (
            "padded.nhdr",
            b"NRRD0004\n"
            + b"# x\n" * 60_000
            + b"type: uchar\ndimension: 3\nsizes: 4 4 4\nencoding: raw\ndata file: ../outside.raw\n",
        ),
        ("endless.mhd", b"Comment = " + b"x" * 3_000_000),
    ],
)
def test_no_header_leads_out_of_its_folder(name, text, tmp_path):
    (tmp_path / "outside.raw").write_bytes(bytes(range(64)))
    (tmp_path / "inner").mkdir()
    path = tmp_path / "inner" / name
    path.write_bytes(text)
    with pytest.raises(UserError, match=r"only a single file beside|longer than 1 MiB"):
        read_image(path)


def test_a_pipe_in_the_place_of_voxels_does_not_hang(tmp_path):
    os.mkfifo(tmp_path / "x.raw")
    (tmp_path / "x.mhd").write_bytes(MHD + b"ElementDataFile = x.raw\n")
    with pytest.raises(UserError, match="is no regular file"):
        read_image(tmp_path / "x.mhd")


def test_two_inputs_of_one_name(data, finished, tmp_path, capsys):
    (folder,) = [path.parent for path in finished.glob("*/record.json")]
    images = sorted((data / "imagesTr").iterdir())
    (tmp_path / "in").mkdir()
    shutil.copyfile(images[0], tmp_path / "in" / "a.nii.gz")
    nib.save(nib.load(images[1]), tmp_path / "in" / "a.nii")
    harness("predict", "--run", folder, tmp_path / "in", tmp_path / "out", status=2)
    assert "are of one name" in error(capsys)


def test_names_of_label_maps_are_no_scans(tmp_path, capsys):
    brats = small(Registry().task("brats"))
    write_phantom(brats, tmp_path / "brats", 2, seed=0)
    harness("data", "check", tmp_path / "brats", "--runs", tmp_path)
    assert "8 cases" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (["data", "fetch", "msd_hippocampus", "--data", "/etc/passwd"], "is no folder"),
        (["data", "fetch", "msd_hippocampus", "--data", "d", "--url", "http://[::1"], "is no address"),
        (["data", "fetch", "msd_hippocampus", "--data", "d", "--url", "http://localhost:1/ü"], "is no address"),
        (["data", "fetch", "msd_hippocampus", "--data", "d", "--url", "http://localhost:abc/x"], "is no address"),
        (["data", "check", "~nobody-of-that-name/x"], "Write the folder out"),
        (["run", "--method", "scratch", "--task", "~nobody-of-that-name/x"], "Write the folder out"),
        (["run", "--method", "scratch", "--task", ""], "name is empty"),
        (["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", ""], "--corpus is empty"),
        (
            ["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", "~nobody-of-that-name/x"],
            "Write the",
        ),
        (
            ["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", f"flare21=-1,{'9' * 400}"],
            "is empty",
        ),
        (["run", "--method", "mae", "--task", "brats", "--mode", "generic", "--corpus", "flare22"], "mean 'flare21'"),
        (["data", "phantom", "luna16", "--out", "p", "--cases", "0"], "needs at least 1 scan"),
        (["data", "check", "luna16"], "no data to check"),
    ],
)
def test_words(line, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    assert main(line) == 2
    assert says in error(capsys)
    assert not list(tmp_path.rglob("*.nii.gz")), "a phantom was written before the words were read"


def test_a_broken_off_phantom_can_be_asked_again(tmp_path, monkeypatch):
    task = small(Registry().task("msd_hippocampus"))

    def stop(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(type(task), "write_case", stop)
        with pytest.raises(KeyboardInterrupt):
            write_phantom(task, tmp_path / "out", 3, seed=0)
    assert list(tmp_path.iterdir()) == []
    write_phantom(task, tmp_path / "out", 3, seed=0)
    assert len(task.cases(tmp_path / "out")) == 3
