"""Phantoms are made from their seed alone, look like what they stand for, and overwrite nothing."""

import json

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

from harness import UserError
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.phantom import is_phantom, make_phantom, write_phantom
from tests.conftest import small

TASKS = ["msd_hippocampus", "brats", "msd_spleen"]


@pytest.mark.parametrize("name", TASKS)
def test_a_phantom_is_a_function_of_its_seed(name, registry):
    task = small(registry.task(name))
    (image, label), (again, label_again), (other, _) = (
        make_phantom(task, np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert np.array_equal(image, again)
    assert np.array_equal(label, label_again)
    assert image.shape != other.shape or not np.array_equal(image, other)
    assert image.shape == (len(task.channels), *label.shape)
    assert all(0.9 * due < edge < 1.1 * due for edge, due in zip(label.shape, task.phantom_size, strict=True))


def test_nested_structures_touch_only_what_contains_them(registry):
    """Core and enhancing tumour lie inside the oedema: nowhere do they border on healthy tissue by more than a rim."""
    task = small(registry.task("msd_brats"))
    _, label = make_phantom(task, np.random.default_rng(0))
    assert set(np.unique(label)) == {0, 1, 2, 3}
    whole = ndimage.binary_fill_holes(label > 0)
    core = np.isin(label, (2, 3))
    assert (core & ~whole).sum() == 0
    assert core.sum() < (label > 0).sum()
    assert ndimage.label(label > 0)[1] == 1


def test_ct_is_in_hounsfield_units_with_air_around(registry):
    task = small(registry.task("msd_spleen"))
    image, label = make_phantom(task, np.random.default_rng(0))
    assert image.dtype == np.int16
    assert image.min() >= -1024
    corner = image[0, :3, :3, :3].astype(float)
    assert abs(corner.mean() + 1000) < 30
    # 40 HU of soft tissue and the structure's own contrast.
    (structure,) = [shape for shape in task.phantom if shape.label == 1]
    inner = ndimage.binary_erosion(label == 1, iterations=2)
    assert abs(np.median(image[0][inner]) - 40 - structure.contrast[0]) < 15


def test_mr_is_zero_outside_the_body_and_structures_stand_out(registry):
    task = small(registry.task("msd_brats"))
    image, label = make_phantom(task, np.random.default_rng(0))
    assert image.dtype == np.float32
    outside = image[:, :2, :2, :2]
    assert not outside.any()
    flair = image[0] / np.median(image[0][image[0] > 0])
    oedema = next(shape for shape in task.phantom if shape.label == 1)
    assert (np.median(flair[label == 1]) > np.median(flair[(label == 0) & (image[0] > 0)])) == (oedema.contrast[0] > 0)


@pytest.mark.parametrize("name", TASKS)
def test_a_phantom_on_disk_is_a_data_set_of_its_task(name, registry, tmp_path):
    task, root = small(registry.task(name)), tmp_path / "new" / "phantom"
    assert not is_phantom(root)
    write_phantom(task, root, 3, seed=1)
    assert is_phantom(root)
    cases = task.cases(task.find(root))
    assert len(cases) == 3
    loaded = load_case(task, cases[0])
    assert set(np.unique(loaded.label)) <= set(task.labels)
    np.testing.assert_allclose(loaded.spacing, task.spacing or (1, 1, 1), rtol=1e-6)
    affines = {tuple(nib.load(case.images[0]).affine[:3, 3].tolist()) for case in cases}
    assert len(affines) == 3
    assert json.loads((root / "PHANTOM.json").read_text()) == {"phantom": 2, "of": name, "cases": 3, "seed": 1}
    assert [path.name for path in root.parent.iterdir()] == ["phantom"]


def test_a_corpus_has_other_scans_than_a_task_of_the_same_seed(registry, tmp_path):
    corpus = registry.load("corpus", "flare21")
    write_phantom(corpus, tmp_path / "c", 2, seed=0)
    cases = corpus.cases(corpus.find(tmp_path / "c"))
    assert len(cases) == 2
    scans = [np.asarray(nib.load(case.images[0]).dataobj) for case in cases]
    assert scans[0].shape != scans[1].shape or not np.array_equal(*scans)
    other = registry.load("corpus", "atm22")
    write_phantom(other, tmp_path / "o", 1, seed=0)
    (case,) = other.cases(other.find(tmp_path / "o"))
    scan = np.asarray(nib.load(case.images[0]).dataobj)
    assert scan.shape != scans[0].shape or not np.array_equal(scan, scans[0])


def test_nothing_that_is_there_is_overwritten(registry, tmp_path):
    task = small(registry.task("msd_hippocampus"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for root, says in (("full", "is not empty"), ("file", "is not empty"), ("file/below", "is no folder")):
        with pytest.raises(UserError, match=says):
            write_phantom(task, tmp_path / root, 1, seed=0)
    assert (tmp_path / "full" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_what_breaks_off_leaves_nothing(registry, tmp_path, monkeypatch):
    task = small(registry.task("msd_hippocampus"))

    def full(*_):
        raise OSError("the disk is full")

    monkeypatch.setattr(type(task), "write_case", full)
    with pytest.raises(OSError, match="the disk is full"):
        write_phantom(task, tmp_path / "phantom", 1, seed=0)
    assert not list(tmp_path.iterdir())


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
