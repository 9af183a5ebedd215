"""The Decathlon's tasks: known by what the released folders say of themselves."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest

from harness import UserError
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.splits import split_cases


def test_another_decathlon_task_is_refused(hippocampus_phantom, tmp_path):
    shutil.copytree(hippocampus_phantom, tmp_path / "other")
    described = json.loads((tmp_path / "other" / "dataset.json").read_text())
    other = described | {"name": "Spleen", "labels": {"0": "background", "1": "spleen"}}
    (tmp_path / "other" / "dataset.json").write_text(json.dumps(other))
    with pytest.raises(
        UserError, match="describes 'Spleen' with 1 channels and labels 0 background, 1 spleen; expected"
    ):
        Registry().task("msd_hippocampus").find(tmp_path / "other")


def test_the_named_task_and_its_folder_are_the_same(hippocampus_phantom):
    assert Registry().task(str(hippocampus_phantom)) is Registry().task("msd_hippocampus")


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


def test_decathlon_brain_tumours_have_a_numbering_of_their_own():
    brats, msd = (Registry().task(name) for name in ("brats", "msd_brats"))
    assert set(brats.targets) == set(msd.targets)
    assert msd.targets["enhancing_tumor"] == (3,)
    assert msd.targets["tumor_core"] == (2, 3)
    assert brats.targets["enhancing_tumor"] == (4,)
    assert msd.overlapping
    assert not Registry().task("msd_brain_tumour").overlapping


# Name, modalities and labels from 1 on, as the `dataset.json` of each released archive has them.
RELEASED = {
    "Task01_BrainTumour": (
        *("BRATS", ("FLAIR", "T1w", "t1gd", "T2w")),
        ("edema", "non-enhancing tumor", "enhancing tumour"),
    ),
    "Task02_Heart": ("LeftAtrium", ("MRI",), ("left atrium",)),
    "Task03_Liver": ("LITS", ("CT",), ("liver", "cancer")),
    "Task04_Hippocampus": ("Hippocampus", ("MRI",), ("Anterior", "Posterior")),
    "Task05_Prostate": ("PROSTATE", ("T2", "ADC"), ("PZ", "TZ")),
    "Task06_Lung": ("Lung", ("CT",), ("cancer",)),
    "Task07_Pancreas": ("Pancreas", ("CT",), ("pancreas", "cancer")),
    "Task08_HepaticVessel": ("HepaticVessel", ("CT",), ("Vessel", "Tumour")),
    "Task09_Spleen": ("Spleen", ("CT",), ("spleen",)),
    "Task10_Colon": ("COLON", ("CT",), ("colon cancer primaries",)),
}


def released(root, archive):
    """The description in the released archive of a task, with one case."""
    title, modalities, labels = RELEASED[archive]
    described = {
        "name": title,
        "modality": {str(number): modality for number, modality in enumerate(modalities)},
        "labels": {str(number): label for number, label in enumerate(("background", *labels))},
        "training": [{"image": "./imagesTr/a_001.nii.gz", "label": "./labelsTr/a_001.nii.gz"}],
    }
    root.mkdir(parents=True)
    (root / "dataset.json").write_text(json.dumps(described))
    return root


@pytest.mark.parametrize("archive", RELEASED)
@pytest.mark.parametrize("renamed", [False, True])
def test_a_released_archive_is_known_by_its_description(archive, renamed, tmp_path):
    """Whatever its folder is called now, it is the task of that archive and no task of its own."""
    root = released(tmp_path / ("scans" if renamed else archive), archive)
    task = Registry().task(str(root))
    assert task.folder == archive
    assert task is Registry().task(task.name)
    assert task.find(root) == root
    assert [case.id for case in task.cases(root)] == ["a_001"]


@pytest.mark.parametrize("archive", RELEASED)
def test_the_labels_of_a_released_archive_are_the_targets_in_their_order(archive, tmp_path):
    _, modalities, labels = RELEASED[archive]
    task = Registry().task(str(released(tmp_path / archive, archive)))
    assert (len(task.channels), task.overlapping) == (len(modalities), False)
    every = np.arange(len(labels) + 1, dtype=np.uint8).reshape(-1, 1, 1)
    masks = task.masks(every)
    assert [np.flatnonzero(mask).tolist() for mask in masks] == [[number + 1] for number in range(len(labels))]


def test_archives_with_the_same_labels_are_not_taken_for_each_other(tmp_path):
    """Lung and liver both have a cancer, and the same channels; a wrong folder must not be trained on."""
    for archive, other in (("Task06_Lung", "msd_spleen"), ("Task03_Liver", "msd_pancreas")):
        root = released(tmp_path / archive, archive)
        with pytest.raises(UserError, match="give --data"):
            Registry().task(other).find(root)
