"""How often different scans look alike, and how often copies do not: on heads of one template, and on real scans.

`pytest -s tests/harness/data/test_duplicates_calibration.py` prints the table of docs/data.md.
"""

import time

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from harness.data import duplicates
from harness.data.duplicates import ALIKE, same_scans, signature
from harness.data.geometry import resample

SHAPE = (72, 84, 72)


def unit_noise(rng, sigma):
    """Smoothed noise (x, y, z) of standard deviation 1."""
    noise = gaussian_filter(rng.standard_normal(SHAPE, np.float32), sigma)
    return noise / noise.std()


def head(template, seed, individual):
    """A head in the space of a template: the folds are shared but for a share `individual` of their variance.

    Ventricles, the residual of the registration, the bias field and the noise are the head's own.
    """
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*(np.linspace(-1, 1, edge) for edge in SHAPE), indexing="ij")
    x, y, z = (axis + 0.09 * individual * unit_noise(rng, 7) for axis in (x, y, z))
    radius = np.sqrt((x / 0.85) ** 2 + (y / 0.9) ** 2 + (z / 0.85) ** 2)
    folds = np.sqrt(1 - individual) * template + np.sqrt(individual) * unit_noise(rng, 1.7)
    image = np.select(
        [radius < 0.83, radius < 0.86, radius < 0.93, radius < 1],
        [np.where(folds > 2 * radius - 1.1, 0.65, 1.0), 0.25, 0.15, 0.75],
        0.0,
    )
    ventricles = np.sqrt(((np.abs(x) - 0.13) / 0.09) ** 2 + ((y - 0.05) / 0.35) ** 2 + ((z - 0.1) / 0.16) ** 2)
    image[ventricles < rng.uniform(0.8, 1.2)] = 0.25
    image = gaussian_filter(image, 0.5) * (1 + 0.08 * unit_noise(rng, 19))
    return (image + 0.02 * rng.standard_normal(SHAPE)).astype(np.float32)


def heads(number, individual):
    template = unit_noise(np.random.default_rng(12345), 1.7)
    return [head(template, seed, individual) for seed in range(number)]


def cut(volume, share):
    """A volume without a share of its slices at three of its faces, one slice at least."""
    x, y, z = (max(1, round(share * edge)) for edge in volume.shape)
    return volume[x:, :-y, z:]


def noisy(volume):
    return volume + 0.3 * volume.std() * np.random.default_rng(4).standard_normal(volume.shape)


def biased(volume):
    field = gaussian_filter(np.random.default_rng(5).standard_normal(volume.shape), min(volume.shape) / 4)
    return (volume - volume.min()) * (1 + 0.2 * field / np.abs(field).max())


COPIES = {
    "8 bits, turned": lambda v: np.round((v - v.min()) / np.ptp(v) * 255).transpose(1, 2, 0)[::-1],
    "gamma 0.7": lambda v: ((v - v.min()) / np.ptp(v)) ** 0.7,
    "gamma 1.5": lambda v: ((v - v.min()) / np.ptp(v)) ** 1.5,
    "inverted": lambda v: v.max() - v,
    "window of 5 to 95 %": lambda v: v.clip(*np.percentile(v, (5, 95))),
    "0.8 of the voxels per axis": lambda v: resample(v, [round(0.8 * edge) for edge in v.shape], order=3),
    "half of the voxels per axis": lambda v: resample(v, [round(0.5 * edge) for edge in v.shape], order=1),
    "1 % cut off": lambda v: cut(v, 0.01),
    "smoothed by a voxel": lambda v: gaussian_filter(v, 1.0),
    "noise of 0.3 deviations": noisy,
    "bias field of 20 %": biased,
}


def calibrate(name, volumes, copied):
    """Prints a row, and returns the false alarms among all pairs and the misses by change."""
    known = [signature(volume) for volume in volumes]
    began = time.perf_counter()
    false_alarms = [match for match in same_scans(known, known) if match.first < match.second]
    pairs = len(volumes) * (len(volumes) - 1) // 2
    microseconds = 1e6 * (time.perf_counter() - began) / pairs
    misses = {}
    for change, make in COPIES.items():
        copies = [signature(np.asarray(make(volumes[i]), np.float32)) for i in copied]
        matched = {copied[match.first] for match in same_scans(copies, known) if match.second == copied[match.first]}
        misses[change] = len(copied) - len(matched)
    missed, made = sum(misses.values()), len(COPIES) * len(copied)
    print(
        f"\n{name}: {pairs} pairs of different scans, false alarms {1000 * len(false_alarms) / pairs:.1f} per 1,000; "
        f"{made} pairs of a scan and its copy, misses {1000 * missed / made:.1f} per 1,000; {microseconds:.0f} us per pair"
    )
    print({change: number for change, number in misses.items() if number})
    return false_alarms, misses


@pytest.mark.parametrize(
    ("number", "individual"), [(6, 0.18), *(pytest.param(40, share, marks=pytest.mark.slow) for share in (0.18, 0.35))]
)
def test_heads_of_one_template_are_told_apart(number, individual):
    volumes = heads(number, individual)
    false_alarms, misses = calibrate(f"heads, {individual:.0%} of the folds individual", volumes, range(0, number, 4))
    assert not false_alarms
    assert not any(misses.values())


def test_such_heads_correlate_as_real_ones_do():
    """The example that the details were added for: two brains of 0.993 at half the resolution, above the earlier limit."""
    first, second = (duplicates._halved(signature(volume)[None]).ravel() for volume in heads(2, 0.15))
    assert first @ second > 0.988


def test_a_copy_stands_out_among_heads_that_are_almost_one():
    """Where nine tenths of the folds are shared, some pairs look alike; the copy looks alike more."""
    volumes = heads(6, 0.1)
    copy = signature(np.asarray(COPIES["1 % cut off"](volumes[3]), np.float32))
    values = {match.second: match.correlation for match in same_scans([copy], [signature(each) for each in volumes])}
    assert max(values, key=values.get) == 3
    assert values[3] > 0.99


def test_real_scans_are_told_apart(real_hippocampus):
    paths = sorted((real_hippocampus / "imagesTr").glob("*.gz"))
    volumes = [np.asarray(nib.load(path).dataobj, np.float32) for path in paths]
    false_alarms, misses = calibrate("MSD Hippocampus", volumes, range(0, len(volumes), 10))
    assert not false_alarms
    # These volumes have 30 to 50 voxels along an axis, so that one voxel at three faces is more than a hundredth.
    assert misses.pop("1 % cut off") <= 2
    assert not any(misses.values())


def test_the_shift_and_the_stretch_are_what_recognises_a_crop():
    volume = heads(1, 0.35)[0]
    known, copy = signature(volume), signature(cut(volume, 0.02))
    with_both = duplicates._fit(copy, duplicates._details(known)[:, None])[0]
    plain = np.corrcoef(duplicates._details(copy), duplicates._details(known))[0, 1]
    assert with_both > plain + 0.02
    assert with_both > ALIKE > plain


def test_pairs_are_compared_in_both_directions_and_in_every_orientation():
    volumes = heads(2, 0.35)
    for axes, flip in (((0, 1, 2), 1), ((2, 0, 1), -1), ((1, 0, 2), -1)):
        copy = signature(np.ascontiguousarray(volumes[0].transpose(axes)[::flip]))
        known = [signature(volume) for volume in volumes]
        for match in (*same_scans([copy], known), *same_scans(known, [copy])):
            assert (match.first, match.second, round(match.correlation, 2)) == (0, 0, 1.0)
        assert len(same_scans([copy], known)) == len(same_scans(known, [copy])) == 1


def test_all_pairs_of_a_list_are_numbered_as_they_are():
    known = [signature(volume) for volume in heads(4, 0.5)]
    assert [match[:2] for match in same_scans(known, known)] == [(i, i) for i in range(4)]
    twice = [*known, known[1]]
    assert [m[:2] for m in duplicates.duplicate_pairs([each[None] for each in twice])] == [(1, 4)]
