"""The task contract over the whole registry, on phantoms and on real data."""

import json
import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from harness import UserError, Window
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.phantom import make_phantom
from harness.data.splits import split_cases

TASKS = [Registry().task(name) for name in Registry().names("task")]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_phantom_is_worth_learning(task):
    images, label = make_phantom(task, np.random.default_rng(3))
    assert images.shape == (len(task.channels), *label.shape)
    assert set(np.unique(label)) == set(task.labels)
    ct = isinstance(task.normalisation, Window)
    body = images > (-500 if ct else 0)
    assert 0.2 < body.mean() < 0.9
    for channel, inside in zip(images, body, strict=True):
        assert len(np.unique(channel[inside])) > (100 if ct else 1000)
        for value in task.labels[1:]:
            structure = channel[label == value]
            assert structure.std() > 0
            assert len(structure) > 30
    # Told apart by more than noise in at least one channel.
    scale = 100 if ct else np.array([channel[inside].mean() for channel, inside in zip(images, body, strict=True)])
    means = [
        [channel[(label == value) & inside].mean() for value in task.labels]
        for channel, inside in zip(images, body, strict=True)
    ]
    assert (np.ptp(means, axis=1) / scale).max() > 0.15
    if ct:
        assert images.dtype == np.int16
        assert -1100 < np.median(images[~body]) < -900
    if len(task.channels) > 1:
        assert not np.allclose(means[0], means[1], atol=0.05)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_phantoms_differ_between_cases_and_repeat_with_the_seed(task):
    first, again, other = (make_phantom(task, np.random.default_rng(seed))[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_phantom_goes_through_the_same_reader(phantom):
    task, root = phantom
    cases = task.cases(task.find(root))
    assert len(cases) == task.phantom_cases
    loaded = load_case(task, cases[0])
    assert loaded.image.shape == (len(task.channels), *loaded.label.shape)


def test_find_takes_the_folder_or_the_one_that_contains_it(phantom, tmp_path):
    task, root = phantom
    (tmp_path / "outer").mkdir()
    folder = getattr(task, "folder", "MICCAI_BraTS2020_TrainingData")
    shutil.copytree(root, tmp_path / "outer" / folder)
    assert task.find(tmp_path / "outer") == task.find(tmp_path / "outer" / folder)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_empty_or_foreign_folder_is_refused(task, tmp_path):
    with pytest.raises(UserError, match="give --data"):
        task.find(tmp_path)


def test_another_decathlon_task_is_refused(hippocampus_phantom, tmp_path):
    shutil.copytree(hippocampus_phantom, tmp_path / "other")
    described = json.loads((tmp_path / "other" / "dataset.json").read_text())
    other = described | {"name": "Spleen", "labels": {"0": "background", "1": "spleen"}}
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(other))
    with pytest.raises(
        UserError, match="describes 'Spleen' with 1 channels and labels 0 background, 1 spleen; expected"
    ):
        Registry().task("msd_hippocampus").find(tmp_path / "other")


def test_a_path_out_of_the_folder_is_refused(hippocampus_phantom, tmp_path):
    shutil.copytree(hippocampus_phantom, tmp_path / "task")
    described = json.loads((tmp_path / "task" / "dataset.json").read_text())
    described["training"][0]["image"] = "../../etc/passwd"
    (tmp_path / "task" / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="leaves the task's folder"):
        Registry().task("msd_hippocampus").cases(tmp_path / "task")


@pytest.mark.parametrize("text", ["", "[]", "{", '{"name": "Hippocampus"}', '{"name": "Hippocampus", "training": [3]}'])
def test_a_broken_description_is_refused(text, tmp_path):
    (tmp_path / "dataset.json").write_text(text)
    task = Registry().task("msd_hippocampus")
    with pytest.raises(UserError, match=r"dataset\.json"):
        task.cases(task.find(tmp_path))


def test_any_decathlon_folder_is_a_task(tmp_path):
    """Two modalities in one 4D file, anisotropic spacing, three labels."""
    folder, rng = tmp_path / "Task99_Organ", np.random.default_rng(0)
    entries = []
    for number in range(3):
        name = f"organ_{number}.nii.gz"
        for sub, voxels in (
            ("imagesTr", rng.random((9, 8, 7, 2), np.float32)),
            ("labelsTr", rng.integers(0, 4, (9, 8, 7))),
        ):
            (folder / sub).mkdir(parents=True, exist_ok=True)
            image = nib.Nifti1Image(
                voxels.astype(np.float32 if voxels.ndim == 4 else np.uint8), np.diag([1, 1, 2.5, 1])
            )
            nib.save(image, folder / sub / name)
        entries.append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
    described = {
        "name": "Organ",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "left part", "2": "Right", "3": "cyst"},
        "training": entries,
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    task = Registry().task(str(folder))
    assert task.name == "organ"
    assert task.targets == {"left_part": (1,), "right": (2,), "cyst": (3,)}
    assert task.spacing == (1.0, 1.0, 2.5)
    assert load_case(task, task.cases(task.find(folder))[0]).image.shape == (2, 9, 8, 7)


def test_the_named_task_and_its_folder_are_the_same(hippocampus_phantom):
    assert Registry().task(str(hippocampus_phantom)) is Registry().task("msd_hippocampus")


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


def test_the_shipped_hippocampus_split_fits_the_real_data(real_hippocampus):
    task = Registry().task("msd_hippocampus")
    cases = task.cases(task.find(real_hippocampus))
    split = split_cases(task, cases)
    assert (len(cases), len(split.train), len(split.test), split.by) == (220, 176, 44, "list")
    assert {case.id for case in split.test} == task.test_ids
    # The list is the rule's: a copy of the data under another name is split alike.
    assert [case.id for case in split_cases(replace(task, test_ids=None), cases).test] == sorted(task.test_ids)


def test_real_hippocampus_case_loads(real_hippocampus):
    task = Registry().task("msd_hippocampus")
    loaded = load_case(task, task.cases(real_hippocampus)[0])
    assert loaded.label.dtype == np.uint8
    assert set(np.unique(loaded.label)) == {0, 1, 2}
    assert loaded.spacing.tolist() == [1, 1, 1]
