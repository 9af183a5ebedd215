"""Cases whose files are bad are named, and what was prepared of the others is kept; labels are renumbered."""

import gzip
import shutil
from dataclasses import replace

import numpy as np
import pytest

from harness import UserError
from harness.data.cases import has_lost_intercept, load_case, looks_like_labels
from tests.harness.commands import fails, harness
from tests.harness.spoilt import poke, rewrite


def truncate(case):
    whole = case.images[0].read_bytes()
    case.images[0].write_bytes(whole[: len(whole) // 2])


def flatten(case):
    """An affine without its first row: nibabel refuses to write one, other programs do not."""
    header = bytearray(gzip.decompress(case.images[0].read_bytes()))
    header[252:256] = b"\0\0\1\0"  # no qform, an sform
    header[280:296] = bytes(16)
    case.images[0].write_bytes(gzip.compress(bytes(header)))


BAD = {
    "truncated": (truncate, "cannot be read"),
    "no gzip": (lambda case: case.images[0].write_bytes(b"not an image"), "cannot be read"),
    "other gzip": (lambda case: case.images[0].write_bytes(gzip.compress(b"x" * 1000)), "cannot be read"),
    "zero bytes": (lambda case: case.images[0].write_bytes(b""), "cannot be read"),
    "NaN": (lambda case: rewrite(case.images[0], poke(np.nan)), "1 voxels are NaN"),
    "Inf": (lambda case: rewrite(case.images[0], poke(np.inf)), "1 voxels are NaN or infinite"),
    "label 3": (lambda case: rewrite(case.label, poke(3)), "label values 3 are unknown"),
    "label 0.5": (lambda case: rewrite(case.label, lambda v: poke(0.5)(v.astype(np.float32))), "label values 0.5"),
    "shape": (lambda case: rewrite(case.label, lambda v: v[:-1]), "same grid"),
    "affine": (lambda case: rewrite(case.label, lambda v: v, np.diag([1.0, 1, 1, 1])), "different affines"),
    "constant": (lambda case: rewrite(case.images[0], lambda v: v * 0 + 7), "same value 7 nearly everywhere"),
    "singular": (flatten, "cannot be inverted"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("task_name", ["msd_hippocampus", "brats"])
def test_bad_files_are_named_and_nothing_prepared_is_lost(kind, task_name, capsys, two_phantoms, tmp_path, registry):
    root = tmp_path / "data"
    shutil.copytree(two_phantoms / task_name, root)
    task = registry.task(task_name)
    case = task.cases(root)[-1]
    spoil, says = BAD[kind]
    spoil(case)
    words = ("data", "prepare", task_name, "--data", root, "--runs", tmp_path / "runs")
    line = fails(capsys, *words)
    assert says in line
    assert case.id in line
    assert list((tmp_path / "runs" / "cache" / "prepared").rglob("*.json"))
    if kind != "constant":
        harness("data", "check", task_name, "--data", root, status=2)
        assert says in capsys.readouterr().out


def test_a_brats_case_with_a_3_says_so(capsys, two_phantoms, tmp_path, registry):
    shutil.copytree(two_phantoms / "brats", tmp_path / "brats")
    case = registry.task("brats").cases(tmp_path / "brats")[0]
    rewrite(case.label, poke(3))
    words = ["run", "--method", "scratch", "--task", "brats", "--data", tmp_path / "brats"]
    line = fails(capsys, *words, "--runs", tmp_path / "runs")
    assert "label values 3 are unknown to task 'brats', which has 0, 1, 2, 4" in line


def test_a_case_with_holes_in_its_numbering_keeps_them(hippocampus_phantom, registry):
    """Labels 0, 1 and 3: 3 is a target, 2 is an error."""

    task = replace(registry.task("msd_hippocampus"), labels=(0, 1, 3), targets={"a": (1,), "b": (3,)})
    case = registry.task("msd_hippocampus").cases(hippocampus_phantom)[0]
    with pytest.raises(UserError, match="label values 2 are unknown"):
        load_case(task, case)
    renumbered = replace(case, numbering=((0, 0), (1, 1), (2, 3)))
    assert set(np.unique(load_case(task, renumbered).label)) == {0, 1, 3}


def test_label_maps_are_told_from_scans_by_their_few_whole_values():
    rng = np.random.default_rng(0)
    for image, is_label in (
        (rng.integers(0, 3, (1, 20, 20, 20)), True),
        (rng.integers(0, 32, (1, 20, 20, 20)), True),
        (rng.integers(0, 200, (1, 20, 20, 20)), False),
        (rng.integers(-1, 3, (1, 20, 20, 20)), False),
        (rng.random((1, 20, 20, 20)).round(1), False),
    ):
        assert looks_like_labels(image.astype(np.float32)) is is_label


def test_a_ct_without_its_intercept_is_noticed():
    """Air, tissue and bone, and a scanner's padding; then the same without the intercept of -1024."""
    rng = np.random.default_rng(0)
    tissue = rng.normal(40, 30, 8000)
    whole = np.concatenate([rng.normal(-1000, 20, 6000), tissue, rng.normal(700, 200, 800), np.full(2000, -3024)])
    cut_out = np.concatenate([tissue, rng.normal(700, 200, 800)])
    for values, lost in ((whole, False), (np.where(whole < -2000, -3024, whole + 1024), True), (cut_out, False)):
        assert has_lost_intercept(values.astype(np.float32).reshape(1, 1, 1, -1)) is lost
