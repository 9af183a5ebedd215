"""The same scan is recognised whatever its file says, and different scans are not."""

import time
from functools import cache

import nibabel as nib
import numpy as np
import pytest

from harness.api.registry import Registry
from harness.data.duplicates import duplicate_pairs, same_scans, signature
from harness.data.geometry import resample
from harness.data.phantom import make_phantom

TASKS = ["brats", "btcv"]


def pairs(first, second):
    return [match[:2] for match in same_scans(first, second)]


@cache
def scans(task_name):
    task = Registry().task(task_name)
    return [make_phantom(task, np.random.default_rng(seed))[0][0].astype(np.float32) for seed in range(12)]


CHANGES = {
    "as it is": lambda v: v,
    "float64": lambda v: v.astype(np.float64),
    "8 bits": lambda v: np.round((v - v.min()) / np.ptp(v) * 255),
    "scaled and shifted": lambda v: 0.37 * v - 1000,
    "mirrored": lambda v: v[::-1],
    "turned": lambda v: v.transpose(2, 0, 1)[:, ::-1],
    "inverted order of all axes": lambda v: v.T[::-1, ::-1, ::-1],
    "inverted": lambda v: v.max() - v,
    "gamma": lambda v: ((v - v.min()) / np.ptp(v)) ** 0.7,
    "clipped": lambda v: v.clip(*np.percentile(v, (0.5, 99.5))),
    "a hot voxel": lambda v: np.where(np.arange(v.size).reshape(v.shape) == 0, 1e7, v),
    "resampled": lambda v: resample(v, [round(0.8 * edge) for edge in v.shape], order=3),
    "half as many voxels": lambda v: resample(v, [round(0.5 * edge) for edge in v.shape], order=1),
    "a slice short": lambda v: v[1:],
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_the_same_scan(task, change):
    volumes = scans(task)[:8]
    known = [signature(volume) for volume in volumes]
    copy = signature(np.asarray(CHANGES[change](volumes[3]), dtype=np.float32))
    assert pairs([copy], known) == [(0, 3)]


@pytest.mark.parametrize("task", TASKS)
def test_different_scans_differ(task):
    known = [signature(volume) for volume in scans(task)]
    assert duplicate_pairs([one[None] for one in known]) == []
    assert pairs(known, known) == [(i, i) for i in range(12)]


def test_a_marker_that_all_scans_have_makes_them_no_copies():
    marked = [volume.copy() for volume in scans("msd_hippocampus")]
    for volume in marked:
        volume[0, 0, 0] = 1e7
    assert duplicate_pairs([signature(volume)[None] for volume in marked]) == []


def test_a_constant_image_is_like_nothing():
    nothing = signature(np.full((20, 20, 20), 7, np.float32))
    assert not nothing.any()
    assert same_scans([nothing], [nothing]) == []


# A slice is a hundredth of a CT, but a thirtieth of these small volumes.
@pytest.mark.parametrize("change", [name for name in CHANGES if name != "a slice short"])
def test_a_changed_copy_of_a_real_scan_is_recognised(change, real_hippocampus):
    paths = sorted((real_hippocampus / "imagesTr").glob("*.gz"))[:8]
    volumes = [np.asarray(nib.load(path).dataobj, np.float32) for path in paths]
    copy = signature(np.asarray(CHANGES[change](volumes[3]), dtype=np.float32))
    assert pairs([copy], [signature(volume) for volume in volumes]) == [(0, 3)]


def test_two_thousand_scans_are_compared_in_seconds():
    rng = np.random.default_rng(0)
    many = [signature(rng.random((20, 20, 20), np.float32)) for _ in range(2000)]
    tested = [signature(rng.random((20, 20, 20), np.float32)) for _ in range(40)] + [many[77]]
    began = time.perf_counter()
    assert pairs(many, tested) == [(77, 40)]
    assert time.perf_counter() - began < 60
