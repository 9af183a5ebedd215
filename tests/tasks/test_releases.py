"""BraTS' releases, BTCV's layouts and the corpora's, exactly as they are unpacked."""

import shutil
from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest

from harness import Percentiles, UserError, Window
from harness.api.registry import Registry
from harness.data.cases import load_case
from harness.data.corpus import folder_corpus, parse_spec
from harness.data.phantom import write_phantom
from tests.conftest import small

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
    from harness.data.splits import split_cases

    task = Registry().task("brats")
    assert len(task.test_ids) == 74
    assert all(name.startswith("BraTS20_Training_") for name in task.test_ids)
    cases = task.cases(task.find(release(tmp_path, "2021", numbers=range(1, 11))))
    assert split_cases(task, cases).by == "rule"


def test_decathlon_brain_tumours_have_a_numbering_of_their_own():
    brats, msd = (Registry().task(name) for name in ("brats", "msd_brats"))
    assert set(brats.targets) == set(msd.targets)
    assert msd.targets["enhancing_tumor"] == (3,)
    assert msd.targets["tumor_core"] == (2, 3)
    assert brats.targets["enhancing_tumor"] == (4,)
    assert msd.overlapping
    assert not Registry().task("msd_brain_tumour").overlapping


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
    from harness.api.task import Case
    from harness.data.splits import split_cases

    task = Registry().task("btcv")
    cases = [Case(f"img{i:04d}", (), None) for i in [*range(1, 11), *range(21, 41)]]
    split = split_cases(task, cases)
    assert (len(split.train), len(split.test), split.by) == (24, 6, "list")


def test_real_btcv_like_case(tmp_path):
    from tests.conftest import SHARED

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


def test_paper_presets_are_section_iv():
    registry = Registry()
    for name, epochs, batch, crop, spacing in [
        ("brats", 300, 2, 128, (1.0, 1.0, 1.0)),
        ("btcv", 2000, 4, 96, (1.5, 1.5, 2.0)),
        ("msd_liver", 600, 4, 96, (1.5, 1.5, 2.0)),
        ("msd_spleen", 600, 4, 96, (1.5, 1.5, 2.0)),
    ]:
        from harness.config.request import Request
        from harness.config.resolve import resolve

        task = registry.task(name)
        config = resolve(Request(method="scratch", task=name, preset="paper"), registry, task)
        assert config.finetune.epochs == epochs
        assert config.finetune.batch_size == config.pretrain.batch_size == batch
        assert config.finetune.crop == config.pretrain.crop == (crop,) * 3
        assert task.spacing == spacing
        assert config.pretrain.steps == 100_000
        assert (config.finetune.lr, config.finetune.weight_decay, config.finetune.warmup_epochs) == (1e-4, 1e-5, 50)


def test_phantoms_are_quick_and_deterministic(tmp_path):
    import time

    task = replace(Registry().task("btcv"), phantom_cases=2)
    began = time.perf_counter()
    write_phantom(task, tmp_path / "a", 2, seed=0)
    assert time.perf_counter() - began < 20
    write_phantom(task, tmp_path / "b", 2, seed=0)
    for one in task.cases(tmp_path / "a"):
        other = next(case for case in task.cases(tmp_path / "b") if case.id == one.id)
        for mine, theirs in zip(one.files, other.files, strict=True):
            assert np.array_equal(np.asarray(nib.load(mine).dataobj), np.asarray(nib.load(theirs).dataobj))
