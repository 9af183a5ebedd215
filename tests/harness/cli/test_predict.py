"""`harness predict`: images in, the last path is where to write."""

import nibabel as nib
import numpy as np

from tests.harness.commands import fails, folder_of, harness


def test_an_image_becomes_a_label_map_on_its_grid(finished_simmim, hippocampus_phantom, tmp_path, capsys):
    run, image = folder_of(finished_simmim, "simmim"), sorted((hippocampus_phantom / "imagesTr").glob("*.nii.gz"))[0]
    capsys.readouterr()
    harness("predict", "--run", run.name, "--runs", finished_simmim, image, tmp_path / "new" / "x.nii.gz")
    assert capsys.readouterr().out == f"{tmp_path}/new/x.nii.gz\n"
    given, found = nib.load(image), nib.load(tmp_path / "new" / "x.nii.gz")
    assert found.shape == given.shape
    np.testing.assert_allclose(found.affine, given.affine, atol=1e-5)
    assert set(np.unique(np.asarray(found.dataobj))) <= {0, 1, 2}


def test_where_to_write_is_never_taken_for_an_image(finished_simmim, hippocampus_phantom, tmp_path, capsys):
    run, image = folder_of(finished_simmim, "simmim"), next((hippocampus_phantom / "imagesTr").glob("*.nii.gz"))
    before = image.read_bytes()
    assert "predict needs images and where to write" in fails(capsys, "predict", "--run", run, image)
    assert "would be overwritten" in fails(capsys, "predict", "--run", run, image, image)
    assert image.read_bytes() == before
    assert "2 channels, 'msd_hippocampus' has 1" in fails(
        capsys, "predict", "--run", run, image, image, tmp_path / "x.nii"
    )
    assert "unknown run in" in fails(capsys, "predict", "--run", "x", "--runs", tmp_path, image, tmp_path / "x.nii")
    assert not list(tmp_path.iterdir())
