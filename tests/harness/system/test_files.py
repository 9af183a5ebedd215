"""Digests tell what changed, writes are whole or not at all, and names lead nowhere else."""

import hashlib
import os
import shutil

import nibabel as nib
import numpy as np
import pytest

from harness.system import files
from harness.system.errors import UserError
from harness.system.files import check_name, digest_tree
from tests.harness.commands import BUDGET, SMALL, harness, last_error, short_run
from tests.harness.nnunet import nnunet


def test_a_digest_of_bytes_is_blake2b_however_they_come(tmp_path):
    content = bytes(range(256)) * 9
    expected = hashlib.blake2b(content, digest_size=16).hexdigest()
    (tmp_path / "a").write_bytes(content)
    assert files.digest_file(tmp_path / "a") == expected
    assert files.digest_chunks([content[:7], memoryview(content)[7:]]) == expected


def test_a_digest_of_values_depends_on_the_values_and_not_on_the_order_of_keys():
    given = {"a": [1, 2.5, None], "b": {"c": "\udcff"}}
    assert files.digest(given) == files.digest({"b": {"c": "\udcff"}, "a": (1, 2.5, None)})
    others = [{**given, "a": [1, 2.5]}, {**given, "a": [2.5, 1, None]}, {**given, "d": 0}, {"b": given["b"]}]
    assert len({files.digest(each) for each in (given, *others)}) == 5


CHANGES = {
    "content": lambda root: (root / "deep" / "b").write_text("other, longer"),
    "time": lambda root: os.utime(root / "a", (1, 1)),
    "name": lambda root: (root / "a").rename(root / "c"),
    "more": lambda root: (root / "deep" / "c").write_text(""),
    "less": lambda root: (root / "a").unlink(),
    "behind a link": lambda root: (root.parent / "elsewhere" / "x").write_text("other, longer"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_below_a_folder_changes_its_digest(change, tmp_path):
    root = tmp_path / "root"
    (root / "deep" / "__pycache__").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in (root / "a", root / "deep" / "b", tmp_path / "elsewhere" / "x"):
        place.write_text("some")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "dangling").symlink_to(tmp_path / "nowhere")
    (root / "deep" / "up").symlink_to(root)  # which must not lead around in circles
    before = files.digest_tree(root)
    (root / "deep" / "__pycache__" / "b.pyc").write_text("compiled")
    assert files.digest_tree(root) == before
    CHANGES[change](root)
    assert files.digest_tree(root) != before


def test_each_folder_is_walked_once_through_links_and_circles(tmp_path):
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    for name in ("a/one", "a/__pycache__/no", "two"):
        (tmp_path / name).touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "b").symlink_to(tmp_path / "a")
    found = list(files.walk(tmp_path))
    assert sorted(os.path.basename(path) for path in found) == ["one", "two"]  # noqa: PTH119


def test_a_write_that_breaks_off_leaves_what_was_there(tmp_path):
    place = tmp_path / "new" / "file"
    files.write_atomic(place, "a", b"b", memoryview(b"c"))
    assert place.read_bytes() == b"abc"
    with pytest.raises(TypeError):
        files.write_atomic(place, "half", None)
    assert place.read_bytes() == b"abc"
    assert list(place.parent.iterdir()) == [place]


@pytest.mark.parametrize("name", ["a", "Fall 7", "ä" * 100, "a.b"])
def test_a_good_name_is_itself(name):
    assert files.check_name(name) == name


@pytest.mark.parametrize(
    "name",
    ["", ".hidden", "..", "a/b", "a\\b", "a\0b", "ä" * 101, "\udcff", "x" * 201, "a\u00a0b", "a\u200b", "line\nbreak"],
)
def test_a_name_that_leads_elsewhere_or_fits_no_file_is_refused(name):
    with pytest.raises(UserError, match="rename it"):
        files.check_name(name)


def test_what_is_no_readable_file_is_said(tmp_path):
    (tmp_path / "whole").write_bytes(b"1234567")
    (tmp_path / "empty").touch()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    os.mkfifo(tmp_path / "pipe")
    assert files.file_size(tmp_path / "whole") == 7
    for name, says in (
        ("empty", "zero bytes"),
        ("link", r"is a link to .*gone, which does not exist"),
        ("absent", "is missing"),
        ("pipe", "no regular file"),
        (".", "is a folder"),
        ("x" * 300, "cannot be opened: File name too long"),
    ):
        with pytest.raises(UserError, match=says):
            files.file_size(tmp_path / name)


def test_what_cannot_be_read_as_json_is_none(tmp_path):
    place = tmp_path / "x.json"
    assert files.read_json(place) is None
    for text, value in (('{"a": 1}', {"a": 1}), ("{", None), ("[" * 100_000, None)):
        place.write_text(text)
        assert files.read_json(place) == value
    place.write_bytes(b'"\xff"')
    assert files.read_json(place) is None


def test_text_becomes_one_printable_line_and_a_slug():
    assert files.printable("a\n b\t\udcff") == r"a b \udcff"
    assert files.slug("Task04: Hippocampus (MR)") == "task04_hippocampus_mr"
    assert files.slug("***") == "unnamed"


def test_the_engine_is_the_package():
    import harness

    assert files.ENGINE.samefile(os.path.dirname(harness.__file__))  # noqa: PTH120


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".hidden", "", "x" * 201, "a\\b", "a\0b", "b\udcff"])
def test_names_that_lead_elsewhere_are_refused(name, hippocampus_phantom, tmp_path, capsys):
    with pytest.raises(UserError, match="a case is named"):
        check_name(name)
    folder = nnunet(hippocampus_phantom, tmp_path / "mine", [name, "c2", "c3", "c4"])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")}
    words = ["run", "--method", "scratch", "--task", folder, "--runs", tmp_path / "runs", "--save-predictions"]
    harness(*words, *BUDGET, *SMALL["unet"], status=2)
    assert "a case is named" in last_error(capsys)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*.nii.gz")} == before
    harness("data", "check", folder, "--runs", tmp_path / "runs", status=2)
    assert "names (spoils a run, 1)" in capsys.readouterr().out


def test_what_links_lead_to_is_what_counts(hippocampus_phantom, tmp_path, capsys):
    real, linked = tmp_path / "real", tmp_path / "linked"
    shutil.copytree(hippocampus_phantom, real)
    linked.mkdir()
    shutil.copyfile(real / "dataset.json", linked / "dataset.json")
    shutil.copyfile(real / "PHANTOM.json", linked / "PHANTOM.json")
    for sub in ("imagesTr", "labelsTr"):
        (linked / sub).symlink_to(real / sub)
    (real / "imagesTr" / "loop").symlink_to(real)
    before = digest_tree(linked)
    harness(*short_run("scratch", linked), "--runs", tmp_path / "runs")
    for path in (real / "labelsTr").iterdir():
        image = nib.load(path)
        nib.save(nib.Nifti1Image(np.roll(np.asarray(image.dataobj), 3, 0), image.affine), path)
    assert digest_tree(linked) != before
    capsys.readouterr()
    harness(*short_run("scratch", linked), "--runs", tmp_path / "runs")
    assert "finished before" not in capsys.readouterr().out
    assert len(list((tmp_path / "runs").glob("*/record.json"))) == 2
