"""New images through a finished run."""

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


@pytest.mark.parametrize("form", ["files", "nnunet", "names", "one 4D file"])
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
        ([folder, tmp_path / "no.nii.gz", tmp_path / "o.nii.gz"], "is missing"),
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
