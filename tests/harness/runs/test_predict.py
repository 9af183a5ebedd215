"""New images through a finished run."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from harness.api.registry import Registry
from tests.harness.commands import harness, last_error, short_run


def test_predict_gives_what_was_scored_for_a_file_and_a_folder(corpus_runs, data_folders, tmp_path, capsys):
    (folder,) = corpus_runs.glob("*-scratch-*")
    (saved, *_) = sorted((folder / "predictions").iterdir())
    source = data_folders / "msd_hippocampus" / "imagesTr" / saved.name
    harness("predict", "--run", folder.name[:-3], source, tmp_path / "out.nii.gz", "--runs", corpus_runs)
    assert capsys.readouterr().out.strip().endswith("out.nii.gz")
    mine, theirs = nib.load(tmp_path / "out.nii.gz"), nib.load(saved)
    assert np.array_equal(np.asarray(mine.dataobj), np.asarray(theirs.dataobj))
    assert np.allclose(mine.affine, theirs.affine)
    harness("predict", "--run", folder, data_folders / "scans", tmp_path / "many")
    assert len(list((tmp_path / "many").rglob("*.nii.gz"))) == 6
    assert (tmp_path / "many" / "deep").is_dir()


@pytest.mark.parametrize(
    "form", ["nnunet", "one 4D file", *(pytest.param(form, marks=pytest.mark.slow) for form in ("files", "names"))]
)
def test_predict_takes_several_modalities(form, data_folders, tmp_path, capsys):
    runs = tmp_path / "runs"
    harness(*short_run("scratch", data_folders / "brats", "brats"), "--runs", runs, "--save-predictions")
    (folder,) = runs.glob("*-scratch-*")
    (saved, *_) = sorted((folder / "predictions").iterdir())
    name = saved.name.removesuffix(".nii.gz")
    task = Registry().task("brats")
    (case,) = [case for case in task.cases(data_folders / "brats") if case.id == name]
    new, out = tmp_path / "new", tmp_path / "out"
    new.mkdir()
    if form == "files":
        harness("predict", "--run", folder, *case.images, out / f"{name}.nii.gz")
    else:
        if form == "one 4D file":
            stacked = np.stack([np.asarray(nib.load(path).dataobj) for path in case.images], axis=-1)
            nib.save(nib.Nifti1Image(stacked, nib.load(case.images[0]).affine), new / f"{name}.nii.gz")
        for place, path in enumerate(case.images if form != "one 4D file" else ()):
            suffix = f"{place:04d}" if form == "nnunet" else task.channels[place].upper()
            shutil.copyfile(path, new / f"{name}_{suffix}.nii.gz")
        harness("predict", "--run", folder, new, out)
    found = np.asarray(nib.load(out / f"{name}.nii.gz").dataobj)
    assert np.array_equal(found, np.asarray(nib.load(saved).dataobj))
    assert set(np.unique(found)) <= {0, 1, 2, 4}


def test_predict_words(corpus_runs, data_folders, tmp_path, capsys):
    (folder,) = corpus_runs.glob("*-scratch-*")
    image = next((data_folders / "msd_hippocampus" / "imagesTr").iterdir())
    copied = tmp_path / "in.nii.gz"
    shutil.copyfile(image, copied)
    (tmp_path / "empty").mkdir()
    for words, says in [
        ([folder, copied], "give IN ... OUT"),
        ([folder, copied, tmp_path / "out.png"], "written as .nii.gz or .nii"),
        ([folder, copied, copied], "would be overwritten"),
        ([folder, copied, copied, tmp_path / "o.nii.gz"], "2 channels, 'msd_hippocampus' has 1"),
        ([folder, tmp_path / "no.nii.gz", tmp_path / "o.nii.gz"], "does not exist"),
        ([folder, tmp_path / "no_folder", tmp_path / "o"], "no_folder does not exist"),
        ([folder, tmp_path / "empty", tmp_path / "o"], "holds no image"),
        ([tmp_path / "empty", copied, tmp_path / "o.nii.gz"], "unknown run"),
    ]:
        harness("predict", "--run", words[0], *words[1:], "--runs", corpus_runs, status=2)
        assert says in last_error(capsys)
    assert np.array_equal(nib.load(copied).get_fdata(), nib.load(image).get_fdata())


def test_two_inputs_of_one_name(hippocampus_phantom, finished_simmim, tmp_path, capsys):
    (folder,) = [path.parent for path in finished_simmim.glob("*/record.json")]
    images = sorted((hippocampus_phantom / "imagesTr").iterdir())
    (tmp_path / "in").mkdir()
    shutil.copyfile(images[0], tmp_path / "in" / "a.nii.gz")
    nib.save(nib.load(images[1]), tmp_path / "in" / "a.nii")
    harness("predict", "--run", folder, tmp_path / "in", tmp_path / "out", status=2)
    assert "are of one name" in last_error(capsys)


@pytest.fixture(scope="module")
def gliomas_of_2023(data_folders, tmp_path_factory):
    """The phantom of BraTS in the names and the numbering of 2023."""
    root = tmp_path_factory.mktemp("gli")
    kinds = {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w", "seg": "seg"}
    for number, case in enumerate(Registry().task("brats").cases(data_folders / "brats")):
        folder = root / f"BraTS-GLI-{number:05d}-000"
        folder.mkdir()
        for path in (*case.images, case.label):
            image = nib.load(path)
            voxels = np.asarray(image.dataobj)
            kind = path.name.removesuffix(".nii.gz").rpartition("_")[2]
            voxels = np.where(voxels == 4, 3, voxels) if kind == "seg" else voxels
            nib.save(nib.Nifti1Image(voxels, image.affine), folder / f"{folder.name}-{kinds[kind]}.nii.gz")
    return root


@pytest.fixture(scope="module")
def run_of_2023(gliomas_of_2023, tmp_path_factory):
    runs = tmp_path_factory.mktemp("runs")
    words = [
        *short_run("scratch", gliomas_of_2023, "brats"),
        "--set",
        "finetune.lr=0.02",
        "--set",
        "finetune.steps=40",
        "--save-predictions",
    ]
    harness(*words, "--runs", runs)
    (folder,) = runs.glob("*-scratch-*")
    return folder


def test_predictions_have_the_numbering_of_the_training_data(run_of_2023, gliomas_of_2023, tmp_path, capsys):
    """Files in alphabetical order, as a shell's glob gives them, and a folder with the release's own names."""
    (saved, *_) = sorted((run_of_2023 / "predictions").iterdir())
    name = saved.name.removesuffix(".nii.gz")
    expected = np.asarray(nib.load(saved).dataobj)
    assert 3 in expected
    images = sorted(path for path in (gliomas_of_2023 / name).iterdir() if "seg" not in path.name)
    assert [path.name.rpartition("-")[2] for path in images] == ["t1c.nii.gz", "t1n.nii.gz", "t2f.nii.gz", "t2w.nii.gz"]
    harness("predict", "--run", run_of_2023, *images, tmp_path / "one.nii.gz")
    assert f"channels: flair = {name}-t2f.nii.gz, t1 = {name}-t1n.nii.gz" in capsys.readouterr().err
    (tmp_path / "in").mkdir()
    for path in images:
        shutil.copy(path, tmp_path / "in")
    harness("predict", "--run", run_of_2023, tmp_path / "in", tmp_path / "out")
    for path in (tmp_path / "one.nii.gz", tmp_path / "out" / f"{name}.nii.gz"):
        assert np.array_equal(np.asarray(nib.load(path).dataobj), expected)


def test_an_exports_numbering_is_that_of_the_training_data(run_of_2023, tmp_path):
    harness("export", "--run", run_of_2023, "--format", "safetensors", "--out", tmp_path / "out")
    steps = json.loads((tmp_path / "out" / "pipeline.json").read_text())
    assert steps["labels"] == [0, 1, 2, 3]
    assert steps["targets"]["enhancing_tumor"] == [3]


def test_an_order_against_the_names_is_refused(run_of_2023, gliomas_of_2023, tmp_path, capsys):
    case = sorted(gliomas_of_2023.iterdir())[0]
    for number, path in enumerate(sorted(case.glob("*-t*.nii.gz"))):
        shutil.copy(path, tmp_path / (path.name if number < 2 else f"scan{number}.nii.gz"))
    words = sorted(tmp_path.iterdir())
    harness("predict", "--run", run_of_2023, *words, tmp_path / "out.nii.gz", status=2)
    said = last_error(capsys)
    assert "t1c.nii.gz is given as 'flair', its name says 't1ce'" in said
    assert "in the order flair, t1, t1ce, t2" in said


def test_a_folder_goes_on_after_a_bad_file(corpus_runs, data_folders, tmp_path, capsys):
    (folder,) = corpus_runs.glob("*-scratch-*")
    images = sorted((data_folders / "msd_hippocampus" / "imagesTr").iterdir())[:2]
    (tmp_path / "in").mkdir()
    for name, path in zip(("a", "c"), images, strict=True):
        shutil.copy(path, tmp_path / "in" / f"{name}.nii.gz")
    (tmp_path / "in" / "b.nii.gz").write_bytes(b"<!DOCTYPE html>")
    capsys.readouterr()
    harness("predict", "--run", folder, tmp_path / "in", tmp_path / "out", status=2)
    out, err = capsys.readouterr()
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["a.nii.gz", "c.nii.gz"]
    assert out.split() == [str(tmp_path / "out" / f"{name}.nii.gz") for name in "ac"]
    assert "b.nii.gz is a web page" in err


def test_amos_0000_stays_amos_0000(corpus_runs, data_folders, tmp_path):
    (folder,) = corpus_runs.glob("*-scratch-*")
    images = sorted((data_folders / "msd_hippocampus" / "imagesTr").iterdir())[:2]
    for names in (("amos_0000", "amos_0001"), ("amos_0000",), ("a_0000", "b_0000")):
        source = tmp_path / "-".join(names)
        source.mkdir()
        for name, path in zip(names, images, strict=False):
            shutil.copy(path, source / f"{name}.nii.gz")
        harness("predict", "--run", folder, source, tmp_path / "out" / source.name)
    written = {path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.nii.gz")}
    assert {path.partition("/")[2] for path in written if path.startswith("amos")} == {
        "amos_0000.nii.gz",
        "amos_0001.nii.gz",
    }
    assert {path.partition("/")[2] for path in written if path.startswith("a_")} == {"a.nii.gz", "b.nii.gz"}
