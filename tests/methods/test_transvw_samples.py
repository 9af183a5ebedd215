"""TransVW's samples: larger cubes, deformation, and one of four distortions."""

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from scipy import ndimage
from scipy.stats import chisquare, ks_2samp, kstest

from methods.models_genesis import paint_in
from methods.transvw import Instance, Perturb, TransVW, deform
from tests.methods.parts import image
from tests.methods.transvw_parts import CUBE, Coordinates, box_of, kind_of


@dataclass
class Recorder:
    """A volume that notes the boxes that are cropped from it."""

    shape: tuple[int, int, int] = (400, 400, 100)
    boxes: list = field(default_factory=list)

    def crop(self, origin, size):
        self.boxes.append((*origin, *size))
        return np.zeros((1, *size), np.float32)


# Instances


@pytest.fixture(scope="module")
def pairs():
    """What `Perturb` makes of one cube, with the deformed cube and the kind of the distortion."""
    perturb, cube = Perturb(TransVW.Config()), image(1, CUBE)
    made = []
    for seed in range(400):
        sample = perturb({"image": cube, "word": 5}, np.random.default_rng(seed))
        deformed = deform(cube, 991.0, 8.0, np.random.default_rng(seed))
        made.append((kind_of(sample["image"], deformed), sample, deformed))
    return made


def test_own_size_is_the_crop_itself():
    volume = Coordinates(0)
    sample = Instance(volume, 7, (3 / 24, 4 / 28, 5 / 20), (16, 16, 16), 0).sample(
        (16, 16, 16), np.random.default_rng(0)
    )
    assert np.array_equal(sample["image"], volume.image[:, 3:19, 4:20, 5:21])
    assert sample["word"] == 7


@pytest.mark.parametrize("scale", [1, 2])
def test_larger_cubes_have_published_sizes_and_shifts(scale):
    """Edges 50..79 and shifts -10..9, uniform, in the plane, one edge for both axes, each axis its own shift."""
    volume = Recorder()
    word = Instance(volume, 3, (0.5, 0.5, 0.5), (64, 64, 32), scale)
    for seed in range(1500):
        sample = word.sample((8, 8, 4), np.random.default_rng(seed))
        assert sample["word"] == 3
        assert sample["image"].shape == (1, 8, 8, 4)
    x, y, z, dx, dy, dz = np.array(volume.boxes).T
    assert np.array_equal(dx, dy)
    assert set(dz) == {32}
    assert set(z) == {34}
    for values, first, last in [(dx, 50, 79), (x - 168, -10, 9), (y - 168, -10, 9)]:
        counts = np.bincount(values - first, minlength=last - first + 1)
        assert len(counts) == last - first + 1
        assert chisquare(counts).pvalue > 1e-3
    assert abs(np.corrcoef([x, y, dx]) - np.eye(3)).max() < 0.1


def test_larger_cubes_are_proportional_to_the_word():
    volume = Recorder()
    word = Instance(volume, 0, (0.5, 0.5, 0.5), (16, 32, 8), 1)
    for seed in range(300):
        word.sample((8, 8, 4), np.random.default_rng(seed))
    x, y, _, dx, dy, dz = np.array(volume.boxes).T
    assert (dx.min(), dx.max(), dy.min(), dy.max(), set(dz)) == (12, 20, 25, 40, {8})
    assert (x.min() - 192, x.max() - 192, y.min() - 184, y.max() - 184) == (-2, 2, -5, 4)


def test_larger_cubes_are_resized_to_the_crop():
    volume = Coordinates(0, (200, 200, 64))
    word = Instance(volume, 3, (60 / 136, 60 / 136, 10 / 32), (64, 64, 32), 1)
    sample = word.sample((32, 32, 32), np.random.default_rng(4))
    where = np.unravel_index((sample["image"][0, :, 0, 0] - 1).round().astype(int), volume.shape)[0]
    step = np.diff(where).mean()
    assert 50 / 32 - 0.1 < step < 79 / 32 + 0.1


def test_larger_cubes_stay_inside_where_they_fit():
    volume = Coordinates(0, (100, 100, 40))
    for seed in range(50):
        for corner in (0.0, 1.0):
            word = Instance(volume, 0, (corner,) * 3, (64, 64, 32), 2)
            assert word.sample((64, 64, 32), np.random.default_rng(seed))["image"].min() > 0


# Distortion


def test_deformation_is_scipys():
    cube, seed = image(2, (40, 36, 20)), 4
    got = deform(cube, 991.0, 8.0, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    fields = [
        ndimage.gaussian_filter(rng.random((40, 36, 20), dtype=np.float32) * 2 - 1, 8.0, mode="constant") * 991
        for _ in range(2)
    ]
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 36, 20)), indexing="ij")
    assert np.abs(fields[0]).max() > 1
    for channel in range(2):
        where = [x + fields[0], y + fields[1], z]
        expected = ndimage.map_coordinates(cube[channel], where, order=1, mode="reflect")
        np.testing.assert_allclose(got[channel], expected, atol=2e-3)


def test_the_target_is_the_undistorted_crop_and_the_word_stays(pairs):
    cube = image(1, CUBE)
    for _, sample, deformed in pairs[:50]:
        assert np.array_equal(sample["target"], cube)
        assert sample["word"] == 5
        assert np.abs(deformed - cube).mean() > 0.05


def test_each_distortion_has_probability_a_quarter(pairs):
    counts = Counter(kind for kind, _, _ in pairs)
    assert set(counts) == {"shuffle", "curve", "in", "out"}
    assert chisquare(list(counts.values())).pvalue > 1e-3, counts


def test_painting_in_fills_one_box_with_uniform_noise(pairs):
    boxes, noise = [], []
    for kind, sample, deformed in pairs:
        if kind == "in":
            changed = sample["image"] != deformed
            boxes.append(np.ravel(box_of(changed[0])))
            noise.append(sample["image"][changed])
    edges, corners = np.split(np.array(boxes), 2, axis=1)
    assert (edges.min(), edges.max()) == (7, 14)
    assert chisquare(np.bincount(edges.ravel() - 7, minlength=8)).pvalue > 1e-3
    assert corners.min() == 3
    assert (corners + edges).max() == 39
    assert kstest(np.concatenate(noise)[::97], "uniform").pvalue > 1e-3


def test_painting_out_keeps_one_box(pairs):
    boxes, noise = [], []
    for kind, sample, deformed in pairs:
        if kind == "out":
            same = sample["image"] == deformed
            boxes.append(np.ravel(box_of(same[0])))
            noise.append(sample["image"][~same])
    edges, corners = np.split(np.array(boxes), 2, axis=1)
    assert (edges.min(), edges.max()) == (42 - 24, 42 - 18)
    assert corners.min() == 3
    assert (corners + edges).max() == 39
    assert kstest(np.concatenate(noise)[::997], "uniform").pvalue > 1e-3


def test_shuffling_permutes_five_windows_of_the_deformed_crop(pairs):
    """Against five windows drawn in NumPy."""
    ours = [(sample["image"] != deformed).sum() for kind, sample, deformed in pairs if kind == "shuffle"]
    rng, theirs = np.random.default_rng(0), []
    for _ in range(600):
        cube = rng.random(CUBE)
        shuffled = cube.copy()
        for _ in range(5):
            edges = rng.integers(1, 5, size=3)
            window = tuple(slice(a, a + n) for a, n in zip(rng.integers(0, 43 - edges), edges, strict=True))
            shuffled[window] = rng.permutation(cube[window].ravel()).reshape(edges)
        theirs.append((shuffled != cube).sum())
    assert ks_2samp(ours, theirs).pvalue > 1e-3
    assert max(ours) <= 5 * 64


def test_intensities_are_mapped_by_a_curve_that_rises_or_falls(pairs):
    rising = []
    for kind, sample, deformed in pairs:
        if kind == "curve":
            order = np.argsort(deformed.ravel())
            mapped = sample["image"].ravel()[order]
            assert np.abs(np.diff(mapped)).max() < 0.2  # equal intensities stay equal
            rising.append(mapped[-1] > mapped[0])
    assert 0.35 < np.mean(rising) < 0.65


def test_no_deformation_if_it_is_switched_off():
    perturb, cube = Perturb(TransVW.Config(elastic_alpha=0)), image(1, CUBE)
    kinds = Counter(kind_of(perturb({"image": cube}, np.random.default_rng(s))["image"], cube) for s in range(60))
    assert set(kinds) == {"shuffle", "curve", "in", "out"}


def test_the_sample_is_not_touched():
    cube = image(1, CUBE)
    before = cube.copy()
    for seed in range(12):
        Perturb(TransVW.Config(elastic_alpha=0))({"image": cube}, np.random.default_rng(seed))
    assert np.array_equal(cube, before)


def test_every_in_painted_sample_has_its_box():
    cube = image(1, (40, 40, 40))
    assert all((paint_in(cube, np.random.default_rng(s), least=1, most=1) != cube).any() for s in range(200))
