"""Prepared volumes: made once, verified, and mended where they are damaged."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from harness import UserError
from harness.data import volumes as module
from harness.data.inventory import digest_cases
from harness.data.volumes import preprocess_cases
from tests.harness.commands import harness, last_error, short_run


@pytest.fixture
def prepared(phantom, tmp_path):
    task, root = phantom
    cases = task.cases(root)
    digests = digest_cases(cases, tmp_path)[0]
    return task, cases, digests, preprocess_cases(task, cases, digests, tmp_path), tmp_path


def test_cache_is_memory_mapped_and_not_made_twice(prepared):
    task, cases, digests, volumes, cache = prepared
    assert isinstance(volumes[0].label, np.memmap)
    assert isinstance(volumes[0]._stored, np.memmap)
    assert volumes[0].shape == volumes[0].label.shape
    written = {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.npy")}
    again = preprocess_cases(task, cases, digests, cache)
    assert {path: path.stat().st_mtime_ns for path in Path(cache).rglob("*.npy")} == written
    assert np.array_equal(again[0].image, volumes[0].image)


def test_an_interrupted_prepare_goes_on(prepared):
    task, cases, digests, volumes, cache = prepared
    Path(f"{volumes[1].stem}.json").unlink()
    Path(f"{volumes[1].stem}.image.npy").write_bytes(b"half")
    before = volumes[0].image.copy()
    again = preprocess_cases(task, cases, digests, cache)
    assert again[1].shape == again[1].label.shape
    assert np.array_equal(again[0].image, before)


def test_foreground_points_lie_in_their_targets(prepared):
    task, _, _, volumes, _ = prepared
    masks = task.masks(np.array(volumes[0].label))
    points = volumes[0].points
    assert set(points[:, 0]) == set(range(len(task.targets)))
    assert all(masks[tuple(row)] for row in points)


def test_prepare_verifies_and_mends(data_folders, tmp_path, capsys):
    words = ("data", "prepare", "msd_hippocampus", "--data", data_folders / "msd_hippocampus", "--runs", tmp_path)
    harness(*words)
    (first, second, *_) = sorted((tmp_path / "cache" / "prepared").rglob("*.image.npy"))
    before = first.read_bytes(), second.read_bytes()
    first.write_bytes(before[0][:-2] + b"xx")  # as long as it was
    second.write_bytes(before[1][:100])
    harness(*words)
    assert "2 volumes in" in capsys.readouterr().err
    assert (first.read_bytes(), second.read_bytes()) == before
    harness(*words)
    assert "not as they were written" not in capsys.readouterr().err


def test_a_full_disk_is_known_before_anything_is_written(data_folders, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("harness.data.volumes.shutil.disk_usage", lambda path: usage._replace(free=1000))
    harness("data", "prepare", "btcv", "--data", data_folders / "btcv", "--runs", tmp_path, status=2)
    assert re.search(
        r"preparing 5 cases of 'btcv' takes up to 0\.\d\d GiB in .*, 0\.00 GiB are free", last_error(capsys)
    )
    assert not list((tmp_path / "cache" / "prepared").rglob("*.npy"))


def test_a_damaged_volume_is_named_and_mended(hippocampus_phantom, finished_simmim, tmp_path, capsys):
    shutil.copytree(finished_simmim, tmp_path / "runs")
    (record,) = (tmp_path / "runs").glob("*/record.json")
    record.unlink()
    for path in (tmp_path / "runs").glob("cache/prepared/*/*.image.npy"):
        path.write_bytes(b"xxxxx" + path.read_bytes()[5:])
    shutil.rmtree(tmp_path / "runs" / "cache" / "pretrain")
    harness(*short_run("simmim", hippocampus_phantom), "--runs", tmp_path / "runs")
    assert "volumes in" in (said := capsys.readouterr().err)
    assert "are not as they were written: they are prepared again" in said


def test_a_case_that_changes_while_it_is_prepared_is_not_kept(phantom, tmp_path, monkeypatch):
    """Its volume would stand under the digest of what the file held before."""
    task, root = phantom
    mine = tmp_path / "mine"
    shutil.copytree(root, mine)
    cases = task.cases(mine)
    digests = digest_cases(cases, tmp_path)[0]
    keep = module.load_case

    def load_and_change(images, case):
        loaded = keep(images, case)
        if case.id == cases[1].id:
            case.label.write_bytes(cases[0].label.read_bytes())
        return loaded

    monkeypatch.setattr(module, "load_case", load_and_change)
    with pytest.raises(UserError, match=f"a file of case '{cases[1].id}' was changed while it was worked on"):
        preprocess_cases(task, cases, digests, tmp_path)
    prepared = module.volumes_of(task, cases, digests, tmp_path)
    assert [volume.is_complete(verify=True) for volume in prepared[:3]] == [True, False, True]
