"""BTCV: every layout that its archive has once it is unpacked."""

import shutil
import time
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from harness.api.registry import Registry
from harness.api.task import Case
from harness.data.cases import load_case
from harness.data.phantom import write_phantom
from harness.data.splits import split_cases
from tests.conftest import SHARED, small

LAYOUTS = {
    "as unpacked": ("RawData/Training/img", "RawData/Training/label"),
    "inside RawData": ("Training/img", "Training/label"),
    "inside Training": ("img", "label"),
    "renamed": ("imagesTr", "labelsTr"),
}


@pytest.fixture(scope="module")
def btcv_phantom(tmp_path_factory):
    root = tmp_path_factory.mktemp("btcv") / "phantom"
    write_phantom(small(Registry().task("btcv")), root, 3, seed=0)
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("outer", ["", "Abdomen/"])
def test_btcv_layouts(layout, outer, btcv_phantom, tmp_path):
    task = Registry().task("btcv")
    for source, target in zip(LAYOUTS["as unpacked"], LAYOUTS[layout], strict=True):
        shutil.copytree(btcv_phantom / source, tmp_path / f"{outer}{target}")
    root = task.find(tmp_path)
    assert [case.id for case in task.cases(root)] == ["img0001", "img0002", "img0003"]
    loaded = load_case(task, task.cases(root)[0])
    assert loaded.image.min() < -900


def test_btcv_tests_on_the_tutorials_six():
    task = Registry().task("btcv")
    cases = [Case(f"img{i:04d}", (), None) for i in [*range(1, 11), *range(21, 41)]]
    split = split_cases(task, cases)
    assert (len(split.train), len(split.test), split.by) == (24, 6, "list")


def test_real_btcv_like_case(tmp_path):
    root = SHARED / "btcv_like"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    task = Registry().task("btcv")
    (case,) = task.cases(task.find(root))
    loaded = load_case(task, case)
    assert set(np.unique(loaded.label)) == set(range(14)) - {5}
    # BTCV's order: the liver is by far the largest, and on the patient's right.
    sizes = np.bincount(loaded.label.ravel(), minlength=14)[1:]
    assert sizes.argmax() + 1 == 6
    right = np.argwhere(loaded.label == 6)[:, 0].mean()
    assert right > np.argwhere(loaded.label == 1)[:, 0].mean()  # the first axis runs to the right in this file


def test_phantoms_are_quick_and_deterministic(tmp_path):
    task = replace(Registry().task("btcv"), phantom_cases=2)
    began = time.perf_counter()
    write_phantom(task, tmp_path / "a", 2, seed=0)
    assert time.perf_counter() - began < 20
    write_phantom(task, tmp_path / "b", 2, seed=0)
    for one in task.cases(tmp_path / "a"):
        other = next(case for case in task.cases(tmp_path / "b") if case.id == one.id)
        for mine, theirs in zip(one.files, other.files, strict=True):
            assert np.array_equal(np.asarray(nib.load(mine).dataobj), np.asarray(nib.load(theirs).dataobj))


def test_organs_are_numbered_as_the_challenge_numbers_them():
    organs = (
        *("spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta"),
        *("inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland"),
    )
    task = Registry().task("btcv")
    masks = task.masks(np.arange(14, dtype=np.uint8).reshape(-1, 1, 1))
    found = {name: np.flatnonzero(mask).tolist() for name, mask in zip(task.targets, masks, strict=True)}
    assert found == {organ.replace(" ", "_"): [number] for number, organ in enumerate(organs, start=1)}


def test_unpacked_files_are_found_and_what_is_no_scan_is_none(tmp_path):
    """Labels follow the number of their image, compressed or not."""
    for folder, names in {
        "img": (
            "img0001.nii.gz",
            "img0002.nii",
            "img0003.nii.gz.part",
            "img01.nii.gz",
            "notes.txt",
            "label0001.nii.gz",
        ),
        "label": ("label0001.nii.gz", "label0002.nii", "label0009.nii.gz"),
    }.items():
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    cases = Registry().task("btcv").cases(tmp_path)
    assert [(case.id, case.images[0].name, case.label.name) for case in cases] == [
        ("img0001", "img0001.nii.gz", "label0001.nii.gz"),
        ("img0002", "img0002.nii", "label0002.nii"),
    ]
