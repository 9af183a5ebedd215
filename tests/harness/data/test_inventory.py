"""Every case opened once; what is known of it is kept on disk."""

import json
import shutil

import nibabel as nib
import numpy as np
import pytest

from harness.api.registry import Registry
from harness.api.task import Case
from harness.data.image_files import write_image
from harness.data.inventory import digest_cases, fingerprint, take_inventory
from harness.system.errors import UserError


def test_inventory_is_taken_once(phantom, tmp_path, monkeypatch):
    task, root = phantom
    cases = task.cases(root)
    first = take_inventory(task, cases, tmp_path)
    assert set(first.digests) == set(first.signatures) == {case.id for case in cases}

    def never(*_):
        raise AssertionError("read again")

    monkeypatch.setattr("harness.data.inventory.load_case", never)
    monkeypatch.setattr("harness.data.inventory.digest_file", never)
    again = take_inventory(task, cases, tmp_path)
    assert again.digests == first.digests
    assert all(np.array_equal(again.signatures[name], first.signatures[name]) for name in first.signatures)


def test_damaged_memory_is_taken_anew(phantom, tmp_path, capsys):
    task, root = phantom
    cases = task.cases(root)
    first = take_inventory(task, cases, tmp_path)
    (tmp_path / "digests.json").write_text("{")
    assert take_inventory(task, cases, tmp_path).digests == first.digests
    assert "is damaged" in capsys.readouterr().err


def test_bad_cases_are_skipped_only_when_asked(hippocampus_phantom, tmp_path):
    shutil.copytree(hippocampus_phantom, tmp_path / "data")
    task = Registry().task("msd_hippocampus")
    cases = task.cases(tmp_path / "data")
    cases[0].images[0].write_bytes(b"")
    image = nib.load(cases[1].images[0])
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) * np.nan, image.affine), cases[1].images[0])
    with pytest.raises(UserError, match="zero bytes"):
        take_inventory(task, cases, tmp_path / "cache")
    found = take_inventory(task, cases, tmp_path / "cache", skip_bad=True)
    assert set(found.bad) == {cases[0].id, cases[1].id}
    assert set(found.signatures) == set(found.digests) == {case.id for case in cases[2:]}


def test_fingerprint_follows_content_not_place_or_time(phantom, tmp_path):
    task, root = phantom
    shutil.copytree(root, tmp_path / "copy")
    first = fingerprint(digest_cases(task.cases(root), tmp_path / "a")[0])
    second = fingerprint(digest_cases(task.cases(tmp_path / "copy"), tmp_path / "b")[0])
    assert first == second
    cases = task.cases(tmp_path / "copy")
    shutil.copy(cases[0].label, cases[1].label)
    assert fingerprint(digest_cases(task.cases(tmp_path / "copy"), tmp_path / "b")[0]) != first
    assert json.loads((tmp_path / "b" / "digests.json").read_text())


def test_scans_of_one_header_are_told_apart_by_their_voxels(tmp_path):
    """The header of a MetaImage names the file of its voxels; headers of scans on one grid are equal."""
    cases = []
    for number in range(2):
        folder = tmp_path / f"p{number}"
        folder.mkdir()
        voxels = np.random.default_rng(number).integers(0, 99, (8, 8, 8)).astype(np.int16)
        write_image(folder / "result.mhd", voxels, np.eye(4))
        cases.append(Case(f"p{number}", (folder / "result.mhd",), None))
    assert len({case.images[0].read_bytes() for case in cases}) == 1
    digests, bad = digest_cases(cases, tmp_path / "cache")
    assert not bad
    assert len(set(digests.values())) == 2
    (tmp_path / "p1" / "result.raw").write_bytes((tmp_path / "p0" / "result.raw").read_bytes())
    again, _ = digest_cases(cases, tmp_path / "cache")
    assert again["p0"] == again["p1"] == digests["p0"]
