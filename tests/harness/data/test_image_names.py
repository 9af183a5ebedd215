"""What a file's name says: its case, and whether it is a label map."""

from pathlib import Path

import pytest

from harness import IMAGE_ENDINGS, stem
from harness.data.image_names import is_named_label


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("a/la_003.nii.gz", "la_003"),
        ("a/b.nii", "b"),
        ("x.nii.nrrd", "x.nii"),
        ("x.mha", "x"),
        ("1.2.840.mhd", "1.2.840"),
        ("readme.txt", "readme.txt"),
    ],
)
def test_a_name_without_its_ending(path, name):
    assert stem(Path(path)) == name


def test_names_below_a_root_keep_their_folders_apart():
    root = Path("/data")
    assert stem(root / "p1" / "t1.nii.gz", root) == "p1/t1"
    assert stem(root / "p2" / "t1.nii.gz", root) == "p2/t1"


@pytest.mark.parametrize("ending", IMAGE_ENDINGS)
@pytest.mark.parametrize(
    "name",
    [
        "labelsTr/x",
        "LABELS/x",
        "mask/x",
        "predictions/a/x",
        "x_seg",
        "x-label",
        "x.mask",
        "label0001",
        "gt",
        "p/x_Segmentation",
        "segmentation-0",  # LiTS
        "labels-0",  # CT-ORG
        "TrainingMask/x",
        "labelsVa/x",
        "labelsVal/x",
        "labels_test/x",
        "x_msk",
        "sub-1_dseg",
        "seg-lungs-LUNA16/x",
        "Lung_Mask/x",
        "instances/x",
        "OTMultiClass/x",
        "case_OTMultiClass",
        "GroundTruth/x",
        "ground_truth/x",
    ],
)
def test_label_maps_are_recognised(name, ending):
    assert is_named_label(Path(name + ending))


@pytest.mark.parametrize(
    "name",
    [
        *("imagesTr/x", "x", "segment", "unlabelled/x", "bigseg", "weight", "gtx", "masked", "labelled_7", "x_seg_ct"),
        *("Segmentation-Challenge/x", "segmentation_images/x", "images_with_labels/x", "volume-0", "TrainingImg/x"),
        *("Task04/x", "2024/x", "unmasked/x", "LiTS/volume-1"),
    ],
)
def test_scans_are_no_label_maps(name):
    assert not is_named_label(Path(name + ".nii.gz"))
