"""Folders that describe themselves, in the Decathlon's layout and nnU-Net v2's; recognised ones and one's own."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from harness import Percentiles, UserError, Window, say_once
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.splits import split_cases
from tasks.folders import crops

LABELS = {"background": 0, "Anterior": 1, "Posterior": 2}


def as_nnunet(source, folder, **described):
    """A Decathlon folder copied into nnU-Net v2's raw layout."""
    content = json.loads((source / "dataset.json").read_text())
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    for entry in content["training"]:
        name = entry["image"].rpartition("/")[2].removesuffix(".nii.gz")
        image = nib.load(source / entry["image"])
        channels = np.asarray(image.dataobj)
        for number, channel in enumerate(np.moveaxis(channels, -1, 0) if channels.ndim == 4 else [channels]):
            nib.save(nib.Nifti1Image(channel, image.affine), folder / "imagesTr" / f"{name}_{number:04d}.nii.gz")
        shutil.copyfile(source / entry["label"], folder / "labelsTr" / f"{name}.nii.gz")
    written = {"channel_names": {"0": "MRI"}, "labels": LABELS, "numTraining": 4, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(written | described))
    return folder


@pytest.mark.parametrize("described", [{}, {"name": "Hippocampus"}])
def test_the_decathlons_own_are_recognised_in_nnunets_layout(described, hippocampus_phantom, tmp_path):
    folder = as_nnunet(hippocampus_phantom, tmp_path / "Dataset004_Hippocampus", **described)
    task = Registry().task(str(folder))
    assert task is Registry().task("msd_hippocampus")
    assert task.find(tmp_path) == folder
    theirs = Registry().task("msd_hippocampus").cases(hippocampus_phantom)
    mine = task.cases(folder)
    assert [case.id for case in mine] == [case.id for case in theirs]
    for a, b in zip(mine, theirs, strict=True):
        assert np.array_equal(load_case(task, a).image, load_case(task, b).image)


def test_an_unnamed_copy_is_treated_alike(real_hippocampus, tmp_path):
    """Split, geometry, intensities and crops follow from the data, so a copy under another name gives the same numbers."""
    known = Registry().task("msd_hippocampus")
    folder = tmp_path / "my scans"
    (folder / "imagesTr").mkdir(parents=True)
    for case in known.cases(real_hippocampus):
        (folder / "imagesTr" / f"{case.id}_0000.nii.gz").symlink_to(case.images[0])
    (folder / "labelsTr").symlink_to(real_hippocampus / "labelsTr")
    described = {"channel_names": {"0": "T1"}, "labels": LABELS, "numTraining": 220, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(described))
    mine = Registry().task(str(folder))
    assert mine.name == "my_scans"
    for what in ("spacing", "normalisation", "targets", "overlapping"):
        assert getattr(mine, what) == getattr(known, what)
    assert {name: dict(preset) for name, preset in mine.presets.items()} == known.presets
    splits = [split_cases(task, task.cases(root)) for task, root in ((mine, folder), (known, real_hippocampus))]
    assert [case.id for case in splits[0].train] == [case.id for case in splits[1].train]
    assert [case.id for case in splits[0].test] == [case.id for case in splits[1].test]


@pytest.mark.parametrize(
    ("folder", "described"),
    [
        ("Dataset500_Hippocampus", {"labels": {"background": 0, "left": 1, "right": 2}}),
        ("Dataset500_Hippocampus", {"channel_names": {"0": "CT"}}),
        ("Dataset500_Mine", {}),
        ("mine", {"name": "Mine"}),
    ],
)
def test_ones_own_data_is_not_taken_for_the_decathlons(folder, described, hippocampus_phantom, tmp_path):
    task = Registry().task(str(as_nnunet(hippocampus_phantom, tmp_path / folder, **described)))
    assert task.name != "msd_hippocampus"


def organ(folder, scale=1.0, **described):
    """Two channels, anisotropic, oblique axes, three labels."""
    rng = np.random.default_rng(0)
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    affine = np.array([[0, 0, 2.5, 1], [1, 0, 0, 2], [0, 1, 0, 3], [0, 0, 0, 1]]) * [[scale], [scale], [scale], [1]]
    for number in range(3):
        for channel in range(2):
            image = nib.Nifti1Image(rng.random((9, 8, 7), np.float32), affine)
            nib.save(image, folder / "imagesTr" / f"organ_{number}_{channel:04d}.nii.gz")
        label = nib.Nifti1Image(rng.integers(0, 4, (9, 8, 7)).astype(np.uint8), affine)
        nib.save(label, folder / "labelsTr" / f"organ_{number}.nii.gz")
    written = {
        "channel_names": {"0": "T2", "1": "ADC"},
        "labels": {"background": 0, "left part": 1, "Right": 2, "cyst": 3},
        "numTraining": 3,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(written | described))
    return folder


def test_regions_overlap(tmp_path):
    regions = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}
    folder = organ(tmp_path / "Dataset123_Organ", labels=regions, regions_class_order=[1, 2, 3])
    task = Registry().task(str(folder))
    assert task.name == "organ"
    assert task.overlapping
    assert task.targets == {"whole": (1, 2, 3), "core": (2, 3), "inner": (3,)}
    assert task.labels == (0, 1, 2, 3)
    assert task.num_outputs == 3
    label = load_case(task, task.cases(folder)[0]).label
    assert np.array_equal(task.compose(task.masks(label)), label)


@pytest.mark.parametrize(
    "regions",
    [
        {"background": 0, "whole": [1, 2, 3]},
        {"background": 0, "whole": [1, 2, 3], "core": 2, "rest": 3},
        {"background": 0, "whole": [1, 2, 3], "core": [2, 3]},
    ],
)
def test_regions_without_a_name_are_found_again(regions, tmp_path):
    folder = organ(tmp_path / "Dataset123_Organ", labels=regions)
    task = Registry().task(str(folder))
    assert task.find(folder) == folder
    assert task.recognises(folder)


def test_geometry_follows_the_canonical_axes(tmp_path):
    task = Registry().task(str(organ(tmp_path / "Dataset123_Organ")))
    assert task.spacing == (2.5, 1.0, 1.0)
    assert load_case(task, task.cases(tmp_path / "Dataset123_Organ")[0]).image.shape == (2, 9, 8, 7)


def test_a_microscopes_spacing_keeps_its_digits(tmp_path):
    task = Registry().task(str(organ(tmp_path / "Dataset123_Organ", scale=0.00123456)))
    assert task.spacing == (0.003086, 0.001235, 0.001235)


def test_holes_in_the_numbering_are_fine(tmp_path):
    folder = organ(tmp_path / "Dataset123_Organ", labels={"background": 0, "a": 1, "b": 3})
    task = Registry().task(str(folder))
    assert task.labels == (0, 1, 3)
    with pytest.raises(UserError, match="label values 2 are unknown to task 'organ', which has 0, 1, 3"):
        load_case(task, task.cases(folder)[0])


@pytest.mark.parametrize(
    ("names", "how"),
    [({"0": "CT"}, Window(-1000, 1000)), ({"0": "ct"}, Window(-1000, 1000)), ({"0": "T1"}, Percentiles())],
)
def test_intensities_follow_the_channel_names(names, how, hippocampus_phantom, tmp_path):
    folder = as_nnunet(hippocampus_phantom, tmp_path / "Dataset500_Mine", channel_names=names)
    assert Registry().task(str(folder)).normalisation == how


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"file_ending": ".png"}, "file_ending '.png' is not read here"),
        ({"channel_names": {"0": "a", "2": "b"}}, "number them from 0 without a gap"),
        ({"channel_names": {"0": "a", "1": "b", "2": "c"}}, "0000, 0001 are there, 0000, 0001, 0002 are due"),
        ({"channel_names": {"0": "a"}}, "0000, 0001 are there, 0000 are due"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "an 'ignore' label is not supported"),
        ({"labels": {"background": 0, "a": []}}, "an empty list"),
        ({"labels": {"background": 0, "a": 1, "b": 1}}, "the same value"),
        ({"labels": {"background": 0, "average": 1}}, "one is 'average'"),
        ({"labels": {"background": 0, "a": 1.5}}, "labels.a"),
        ({"dataset": {"x": {"images": ["../x.nii.gz"], "label": "y.nii.gz"}}}, "leaves the task's folder"),
    ],
)
def test_descriptions_that_cannot_be_used(changed, says, tmp_path):
    folder = organ(tmp_path / "Dataset123_Organ", **changed)
    with pytest.raises(UserError, match=says):
        Registry().task(str(folder))


def test_missing_modality_and_label(tmp_path):
    folder = organ(tmp_path / "Dataset123_Organ")
    task = Registry().task(str(folder))
    (folder / "labelsTr" / "organ_1.nii.gz").unlink()
    with pytest.raises(UserError, match=r"organ_1\.nii\.gz is missing"):
        load_case(task, task.cases(folder)[1])
    (folder / "imagesTr" / "organ_1_0001.nii.gz").unlink()
    with pytest.raises(UserError, match="organ_1: channels 0000 are there, 0000, 0001 are due"):
        task.cases(folder)


def test_listed_cases(tmp_path):
    """nnU-Net's `dataset` key names the files of each case."""
    listed = {
        "one": {
            "images": ["imagesTr/organ_0_0000.nii.gz", "imagesTr/organ_2_0001.nii.gz"],
            "label": "labelsTr/organ_0.nii.gz",
        }
    }
    folder = organ(tmp_path / "Dataset123_Organ", dataset=listed)
    task = Registry().task(str(folder))
    (case,) = task.cases(folder)
    assert case.id == "one"
    assert load_case(task, case).image.shape == (2, 9, 8, 7)


@pytest.mark.parametrize(
    ("extent", "demo", "small"),
    [
        ((35, 50, 35), (32, 64, 32), (32, 64, 32)),
        ((300, 300, 100), (64, 64, 64), (96, 96, 96)),
        ((10, 12, 9), (32, 64, 32), (32, 64, 32)),
        ((320, 320, 20), (64, 64, 32), (96, 96, 32)),
    ],
)
def test_crops_follow_the_extent(extent, demo, small):
    presets = crops(extent)
    assert presets["demo"]["pretrain.crop"] == presets["demo"]["finetune.crop"] == demo
    assert presets["small"]["finetune.crop"] == presets["paper"]["finetune.crop"] == small


def test_an_unlabelled_folder_is_no_task(tmp_path):
    with pytest.raises(UserError, match="nnU-Net v2"):
        Registry().task(str(tmp_path))


def test_a_path_out_of_the_folder_is_refused(hippocampus_phantom, tmp_path):
    shutil.copytree(hippocampus_phantom, tmp_path / "task")
    described = json.loads((tmp_path / "task" / "dataset.json").read_text())
    described["training"][0]["image"] = "../../etc/passwd"
    (tmp_path / "task" / "dataset.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match="leaves the task's folder"):
        Registry().task("msd_hippocampus").cases(tmp_path / "task")


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Hippocampus", "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a"}, '
        '"validation": [{"image": 3, "label": 4}]}',
        *("", "[]", "{", '{"name": "Hippocampus"}', '{"name": "Hippocampus", "training": [3]}'),
    ],
)
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


def written(folder, change):
    path = folder / "dataset.json"
    described = json.loads(path.read_text())
    change(described, folder)
    path.write_text(json.dumps(described))
    return folder


def backslashes(described, folder):
    for entry in described["training"]:
        for name in entry:
            entry[name] = entry[name].replace("/", "\\")


def absolute(described, folder):
    for entry in described["training"]:
        for name in entry:
            entry[name] = str(folder.resolve() / entry[name])


@pytest.mark.parametrize(
    "change",
    [
        backslashes,
        absolute,
        lambda described, folder: described.update(description=None, licence=None, reference=None),
    ],
)
def test_a_description_as_other_programs_write_it_is_read(change, hippocampus_phantom, tmp_path):
    folder = written(shutil.copytree(hippocampus_phantom, tmp_path / "Task04_Hippocampus"), change)
    task = Registry().task("msd_hippocampus")
    cases = task.cases(task.find(folder))
    assert cases
    assert all(path.exists() for case in cases for path in case.files)
    assert all(path.is_relative_to(folder) for case in cases for path in case.files)


def test_a_byte_order_mark_is_no_fault(hippocampus_phantom, tmp_path):
    folder = shutil.copytree(hippocampus_phantom, tmp_path / "Task04_Hippocampus")
    path = folder / "dataset.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert Registry().task("msd_hippocampus").cases(folder)


def test_labels_of_any_script_are_targets(tmp_path):
    liver, spleen = chr(0x809D) + chr(0x810F), chr(0x813E)
    folder = organ(tmp_path / "Dataset123_Organ", labels={"background": 0, liver: 1, spleen: 2, "Cyst (left)": 3})
    task = Registry().task(str(folder))
    assert task.targets == {liver: (1,), spleen: (2,), "cyst_left": (3,)}


def test_an_absolute_path_out_of_the_folder_is_refused(hippocampus_phantom, tmp_path):
    def change(described, folder):
        described["training"][0]["image"] = "/etc/passwd"

    folder = written(shutil.copytree(hippocampus_phantom, tmp_path / "Task04_Hippocampus"), change)
    with pytest.raises(UserError, match="leaves the task's folder"):
        Registry().task("msd_hippocampus").cases(folder)


def one_channel(folder, names, **described):
    """Images and labels of one channel, both of these names."""
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
        for name in names:
            nib.save(nib.Nifti1Image(np.ones((9, 8, 7), np.uint8), np.eye(4)), folder / sub / f"{name}.nii.gz")
    content = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(content | described))
    return folder


@pytest.mark.parametrize("names", [("case_a", "case_b"), ("word_0002", "word_0003"), ("amos_0000", "amos_0001")])
def test_images_named_as_their_labels_are_cases_of_one_channel(names, tmp_path):
    """nnU-Net v2 without `_0000`, WORD, AMOS."""
    task = Registry().task(str(one_channel(tmp_path / "Dataset1_X", names)))
    cases = task.cases(tmp_path / "Dataset1_X")
    assert [case.id for case in cases] == sorted(names)
    assert all(case.images[0].name == case.label.name for case in cases)


@pytest.mark.parametrize(
    ("described", "said"),
    [
        ({"file_ending": ".nrrd"}, r"no file ends in .nrrd, which dataset.json says .* there is a.nii.gz, b.nii.gz"),
        (
            {"channel_names": {"0": "T2", "1": "ADC"}},
            r"no file is named CASE_0000.nii.gz, .* there is a.nii.gz: rename",
        ),
    ],
)
def test_what_lies_there_is_named(described, said, tmp_path):
    folder = one_channel(tmp_path / "Dataset1_X", ("a", "b"), **described)
    with pytest.raises(UserError, match=said):
        Registry().task(str(folder))


def test_a_raw_folder_of_nnunet_v1_is_read(tmp_path):
    """Its `dataset.json` is the Decathlon's; its files have channels."""
    folder = organ(tmp_path / "Task501_Organ")
    described = {
        "name": "Organ",
        "modality": {"0": "T2", "1": "ADC"},
        "labels": {"0": "background", "1": "left", "2": "right", "3": "cyst"},
        "training": [
            {"image": f"./imagesTr/organ_{number}.nii.gz", "label": f"./labelsTr/organ_{number}.nii.gz"}
            for number in range(3)
        ],
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    task = Registry().task(str(folder))
    cases = task.cases(folder)
    assert [case.id for case in cases] == ["organ_0", "organ_1", "organ_2"]
    assert load_case(task, cases[0]).image.shape == (2, 9, 8, 7)


def test_labelled_validation_cases_are_cases(hippocampus_phantom, tmp_path):
    """AMOS and MONAI list them apart; entries without a label are no cases."""

    def change(described, folder):
        *described["training"], last = described["training"]
        described["validation"] = [last, {"image": "./imagesTs/x.nii.gz"}, "./imagesTs/y.nii.gz"]

    task = Registry().task("msd_hippocampus")
    whole = task.cases(hippocampus_phantom)
    folder = written(shutil.copytree(hippocampus_phantom, tmp_path / "Task04_Hippocampus"), change)
    assert [case.id for case in task.cases(folder)] == [case.id for case in whole]


def test_a_number_of_cases_that_is_not_there_is_said(hippocampus_phantom, tmp_path, capsys):
    def change(described, folder):
        described["numTraining"] = 99

    say_once.cache_clear()
    folder = written(shutil.copytree(hippocampus_phantom, tmp_path / "Task04_Hippocampus"), change)
    Registry().task("msd_hippocampus").cases(folder)
    assert "dataset.json says numTraining 99, 4 labelled cases are there" in capsys.readouterr().err


def test_a_name_that_occurs_twice_is_refused(tmp_path):
    """Readers take the last of the two without a word."""
    text = (
        '{"modality": {"0": "MRI"}, "labels": {"0": "background", "1": "a"}, "labels": {"0": "background", "1": "b"}}'
    )
    (tmp_path / "dataset.json").write_text(text)
    task = Registry().task("msd_hippocampus")
    with pytest.raises(UserError, match="'labels' occurs twice in one object: keep one"):
        task.cases(tmp_path)
