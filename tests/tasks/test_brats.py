"""BraTS: three releases, exactly as they are unpacked, in one order and numbering."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from harness import UserError
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.phantom import make_phantom
from harness.data.splits import split_cases

NAMES = {
    "2020": ("BraTS20_Training_{:03d}", "_", ("flair", "t1", "t1ce", "t2", "seg")),
    "2021": ("BraTS2021_{:05d}", "_", ("flair", "t1", "t1ce", "t2", "seg")),
    "2023": ("BraTS-GLI-{:05d}-000", "-", ("t2f", "t1n", "t1c", "t2w", "seg")),
}


def release(root, year, values=(0, 1, 2, 4), numbers=(1, 2)):
    """Cases whose channels hold 1, 2, 3 and 4 and whose labels hold `values`."""
    for number in numbers:
        case, separator, kinds = NAMES[year]
        folder = root / case.format(number)
        folder.mkdir(parents=True)
        for place, kind in enumerate(kinds, start=1):
            voxels = np.full((4, 4, 4), place, np.uint8)
            voxels[0, 0, 0] = 100
            if kind == "seg":
                voxels = np.resize(np.array(values, np.uint8), (4, 4, 4))
            nib.save(nib.Nifti1Image(voxels, np.eye(4)), folder / f"{folder.name}{separator}{kind}.nii.gz")
    return root


@pytest.mark.parametrize(("year", "values"), [("2020", (0, 1, 2, 4)), ("2021", (0, 1, 2, 4)), ("2023", (0, 1, 2, 3))])
def test_a_release_is_read_in_the_tasks_order_and_numbering(year, values, tmp_path):
    task = Registry().task("brats")
    root = task.find(release(tmp_path / "unpacked", year, values))
    cases = task.cases(root)
    assert len(cases) == 2
    loaded = load_case(task, cases[0])
    # flair, t1, t1ce, t2, whatever they are called.
    assert [channel[1, 1, 1] for channel in loaded.image] == [1, 2, 3, 4]
    assert set(np.unique(loaded.label)) == {0, 1, 2, 4}
    whole, core, enhancing = task.masks(loaded.label)
    assert (whole.sum(), core.sum(), enhancing.sum()) == (48, 32, 16)


@pytest.mark.parametrize(("year", "wrong"), [("2020", 3), ("2021", 3), ("2023", 4)])
def test_a_numbering_of_another_year_is_an_error(year, wrong, tmp_path):
    task = Registry().task("brats")
    (case, _) = task.cases(task.find(release(tmp_path, year, (0, 1, 2, wrong))))
    with pytest.raises(
        UserError, match=f"label values {wrong} are unknown .* in files of this name: is this another release"
    ):
        load_case(task, case)


def test_several_releases_are_refused(tmp_path):
    task = Registry().task("brats")
    release(tmp_path / "a", "2020")
    release(tmp_path / "b", "2023")
    with pytest.raises(UserError, match="several releases"):
        task.find(tmp_path)
    release(tmp_path / "a", "2021")
    with pytest.raises(UserError, match="mixes the releases 2020 and 2021"):
        task.cases(task.find(tmp_path / "a"))


def test_the_odd_label_of_case_355(tmp_path):
    task = Registry().task("brats")
    folder = release(tmp_path, "2020", numbers=(355,)) / "BraTS20_Training_355"
    image = nib.load(folder / "BraTS20_Training_355_seg.nii.gz")
    image = nib.Nifti1Image(np.asarray(image.dataobj), image.affine)
    (folder / "BraTS20_Training_355_seg.nii.gz").unlink()
    nib.save(image, folder / "W39_1998.09.19_Segm.nii")
    (case,) = task.cases(tmp_path)
    assert load_case(task, case).label.max() == 4


def test_the_brats_list_is_of_2020_only(tmp_path):
    task = Registry().task("brats")
    assert len(task.test_ids) == 74
    assert all(name.startswith("BraTS20_Training_") for name in task.test_ids)
    cases = task.cases(task.find(release(tmp_path, "2021", numbers=range(1, 11))))
    assert split_cases(task, cases).by == "rule"


def test_brats_targets_overlap():
    task = Registry().task("brats")
    wt, tc, et = task.masks(np.array([[[0, 1, 2, 4]]]))
    assert wt.ravel().tolist() == [False, True, True, True]
    assert tc.ravel().tolist() == [False, True, False, True]
    assert et.ravel().tolist() == [False, False, False, True]
    assert task.training_target(np.array([[[0, 1, 2, 4]]])).shape == (3, 1, 1, 4)
    assert task.num_outputs == 3


def test_brats_reads_nii_and_gz_and_names_what_is_missing(tmp_path):
    task = replace(Registry().task("brats"), phantom_size=(20, 20, 20))
    images, label = make_phantom(task, np.random.default_rng(0))
    task.write_case(tmp_path, 1, images, label, np.eye(4))
    gz = tmp_path / "BraTS20_Training_001" / "BraTS20_Training_001_t1.nii.gz"
    plain = gz.with_suffix("")
    nib.save(nib.load(gz), plain)
    gz.unlink()
    (case,) = task.cases(tmp_path)
    assert case.images[1] == plain
    plain.unlink()
    with pytest.raises(UserError, match=r"_t1\.nii\.gz .* is missing"):
        task.cases(tmp_path)


def test_the_list_names_cases_that_brats_2020_has():
    """369 training cases, numbered from 1; a fifth of them is tested on."""
    numbers = {int(name.removeprefix("BraTS20_Training_")) for name in Registry().task("brats").test_ids}
    assert numbers <= set(range(1, 370))
    assert len(numbers) == round(369 / 5)
