"""Corpora as they are unpacked, and folders of scans that are none."""

import numpy as np
import pytest
from monai.transforms import ScaleIntensityRange

from harness import Percentiles, UserError, Window
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.corpus import folder_corpus, parse_spec
from harness.data.phantom import write_phantom
from harness.data.preprocessing import normalise
from tests.conftest import small


@pytest.mark.parametrize("name", Registry().names("corpus"))
def test_corpora_are_found_as_unpacked(name, tmp_path):
    corpus = Registry().load("corpus", name)
    root = tmp_path / "data" / corpus.folders[0]
    write_phantom(corpus, root, 2, seed=0)
    assert corpus.find(tmp_path / "data") == root
    assert corpus.find(root) == root
    (tmp_path / "data" / "Task09_Spleen").mkdir()
    assert corpus.find(tmp_path / "data" / "Task09_Spleen") == root
    cases = corpus.cases(root)
    assert len(cases) == 2
    loaded = load_case(corpus, cases[0])
    assert loaded.label is None
    assert loaded.image.min() < -900
    with pytest.raises(UserError, match=f"corpus '{name}': not found as"):
        corpus.find(tmp_path)


def test_labels_and_hidden_files_are_no_scans(tmp_path):
    task = Registry().task("msd_hippocampus")
    write_phantom(small(task), tmp_path / "deep" / "Task04", 2, seed=0)
    (tmp_path / "deep" / "Task04" / "imagesTr" / "._hippocampus_001.nii.gz").write_bytes(b"shadow")
    (tmp_path / "notes.txt").write_text("no image")
    corpus = folder_corpus(tmp_path, task)
    assert [case.id.rpartition("/")[2] for case in corpus.cases(tmp_path)] == [
        "hippocampus_001.nii.gz",
        "hippocampus_002.nii.gz",
    ]
    assert corpus.normalisation == task.normalisation
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no image below"):
        corpus.cases(tmp_path / "empty")


def test_scans_behind_links_are_found_and_loops_end(tmp_path):
    task = small(Registry().task("msd_hippocampus"))
    write_phantom(task, tmp_path / "elsewhere", 2, seed=0)
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "linked").symlink_to(tmp_path / "elsewhere" / "imagesTr")
    (folder / "loop").symlink_to(folder)
    assert len(folder_corpus(folder, task).cases(folder)) == 2


@pytest.mark.parametrize(
    ("spec", "name", "how"),
    [
        ("flare21", "flare21", None),
        ("flare21=-175,250", "flare21", Window(-175, 250)),
        ("/a=b/c=-1000.5,400", "/a=b/c", Window(-1000.5, 400)),
        ("/a=b/c", "/a=b/c", None),
        ("scans=percentiles", "scans", Percentiles()),
    ],
)
def test_corpus_words(spec, name, how):
    assert parse_spec(spec) == (name, how)


def test_an_empty_window_is_refused():
    with pytest.raises(UserError, match="give its lower end first"):
        parse_spec("flare21=250,-175")


# Of each archive: scans, and what lies beside them and is none.
RELEASED = {
    "atm22": (
        ["TrainBatch1/imagesTr/ATM_001_0000.nii.gz", "TrainBatch2/imagesTr/ATM_253_0000.nii.gz"],
        ["TrainBatch1/labelsTr/ATM_001_0000.nii.gz", "TrainBatch1/imagesTr/readme.txt"],
    ),
    "luna16": (
        ["subset0/1.3.6.1.4.1.1.mhd", "subset9/1.3.6.1.4.1.2.mhd"],
        ["subset0/1.3.6.1.4.1.1.raw", "seg-lungs-LUNA16/1.3.6.1.4.1.1.mhd", "annotations.csv"],
    ),
    "covid19_20": (
        ["Train/volume-covid19-A-0003_ct.nii.gz", "Validation/volume-covid19-A-0101_ct.nii.gz"],
        ["Train/volume-covid19-A-0003_seg.nii.gz"],
    ),
    "flare21": (
        ["TrainingImg/train_000_0000.nii.gz", "ValidationImg/validation_001_0000.nii.gz"],
        ["TrainingMask/train_000.nii.gz", "TrainingImg/._train_000_0000.nii.gz"],
    ),
}


@pytest.mark.parametrize("name", RELEASED)
def test_of_a_released_archive_the_scans_are_read_and_nothing_else(name, tmp_path):
    scans, others = RELEASED[name]
    corpus = Registry().load("corpus", name)
    root = tmp_path / corpus.folders[-1]
    for path in (*scans, *others):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()
    cases = corpus.cases(corpus.find(tmp_path))
    assert [case.id for case in cases] == [f"{name}/{path}" for path in scans]
    assert all(case.label is None for case in cases)


@pytest.mark.parametrize("name", RELEASED)
def test_corpora_are_seen_through_the_window_of_the_released_code(name):
    """-1000 to 1000 HU, as MONAI scales it; 0 stays free for what is no voxel of the scan."""
    corpus = Registry().load("corpus", name)
    image = np.array([-1024.0, -1000.0, 0.0, 250.0, 1000.0, 3071.0], np.float32).reshape(6, 1, 1)
    seen = normalise(image, corpus.normalisation, name)
    np.testing.assert_allclose(seen, ScaleIntensityRange(-1000, 1000, 0.001, 1, clip=True)(image), atol=1e-6)
