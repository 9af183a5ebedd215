"""Models Genesis: the published distributions, and what each distortion may and may not do."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp

from methods.models_genesis import (
    Distort,
    ModelsGenesis,
    paint_in,
    paint_out,
    random_curve,
    random_flips,
    remap_intensities,
    shuffle_locally,
)
from tests.benchmarks import plain_genesis as plain
from tests.methods.parts import image, unet

SIZE = (64, 64, 32)


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0)
    np.random.seed(0)


def places(size=SIZE):
    """A cube whose voxels say where they are."""
    return np.arange(np.prod(size), dtype=np.float32).reshape(1, *size)


def displacement(result, size=SIZE):
    """How far each voxel's content has come, (3, voxels)."""
    now = np.stack(np.unravel_index(result.astype(int).ravel(), size))
    return now - np.stack(np.unravel_index(np.arange(np.prod(size)), size))


def test_shuffle_draws_from_the_original_cube():
    """Content moves by less than one window; from the result it would move on and on (a random walk)."""
    result = shuffle_locally(places(), 10_000, np.random.default_rng(0))
    assert (np.abs(displacement(result)).max(axis=1) == np.array([5, 5, 2])).all()


def test_each_window_is_a_permutation():
    result = shuffle_locally(places((10, 10, 10)), 1, np.random.default_rng(0))
    assert sorted(result.ravel()) == list(range(1000))
    big = places((40, 40, 40))
    for seed in range(20):
        assert sorted(shuffle_locally(big, 1, np.random.default_rng(seed)).ravel()) == list(range(64_000))


def test_all_modalities_are_shuffled_alike():
    both = np.concatenate([places(), places() + 1e6])
    result = shuffle_locally(both, 500, np.random.default_rng(0))
    assert np.array_equal(result[0], result[1] - 1e6)
    assert not np.array_equal(result, both)


def test_shuffling_has_the_plain_references_distribution():
    ours = [shuffle_locally(places(), 10_000, np.random.default_rng(seed)) for seed in range(8)]
    theirs = [plain.shuffled(places()) for _ in range(4)]
    changed = [np.mean([(result != places()).mean() for result in results]) for results in (ours, theirs)]
    assert changed[0] == pytest.approx(changed[1], abs=0.005)
    moved = [np.concatenate([displacement(result) for result in results], axis=1) for results in (ours, theirs)]
    for axis in range(3):
        counts = [np.bincount(side[axis] + 6, minlength=13) / side.shape[1] for side in moved]
        np.testing.assert_allclose(counts[0], counts[1], atol=0.006)


def test_curves_have_the_plain_references_distribution():
    at = np.linspace(0, 1, 9, dtype=np.float32)
    rng = np.random.default_rng(0)
    ours = np.stack([np.interp(at, np.linspace(0, 1, 2049), random_curve(rng)) for _ in range(1500)])
    theirs = []
    for _ in range(1500):
        x, y = plain.bezier(2000)
        theirs.append(np.interp(at, np.sort(x), y if random.random() < 0.5 else np.sort(y)))
    for column in range(9):
        assert ks_2samp(ours[:, column], np.stack(theirs)[:, column]).pvalue > 1e-3, at[column]
    rising = ours[:, -1] > ours[:, 0]
    assert 0.45 < rising.mean() < 0.55
    assert (np.diff(ours[rising], axis=1) >= 0).all()


def test_remapping_follows_one_curve_per_modality():
    cube = image(2, (16, 16, 16))
    result = remap_intensities(cube, np.random.default_rng(0))
    curves, rng = [], np.random.default_rng(0)
    for channel in range(2):
        curves.append(random_curve(rng))
        exact = np.interp(cube[channel], np.linspace(0, 1, 2049), curves[channel])
        np.testing.assert_allclose(result[channel], exact, atol=1e-5)
    assert not np.allclose(*curves)


@pytest.mark.parametrize(("ours", "theirs"), [(paint_in, plain.painted_in), (paint_out, plain.painted_out)])
def test_painting_has_the_plain_references_distribution(ours, theirs):
    cube = places()
    rng = np.random.default_rng(0)
    shares = [[(f(cube) != cube).mean() for _ in range(300)] for f in (lambda c: ours(c, rng), theirs)]
    assert ks_2samp(*shares).pvalue > 1e-3
    assert np.mean(shares[0]) == pytest.approx(np.mean(shares[1]), abs=0.02)


def test_painting_is_at_the_same_place_in_all_modalities_with_noise_of_each():
    cube = image(2, SIZE) + 5
    for paint in (paint_in, paint_out):
        result = paint(cube, np.random.default_rng(1))
        changed = result != cube
        assert np.array_equal(changed[0], changed[1])
        assert not np.array_equal(result[0][changed[0]], result[1][changed[1]])
        assert result[changed].min() >= 0
        assert result[changed].max() <= 1


def test_painting_keeps_a_margin_of_three_voxels():
    inside = np.zeros((1, *SIZE), bool)
    for seed in range(300):
        inside |= paint_in(places(), np.random.default_rng(seed)) != places()
    border = np.ones_like(inside)
    border[:, 3:-3, 3:-3, 3:-3] = False
    assert not inside[border].any()
    assert inside[~border].mean() > 0.9


def test_small_crops_are_painted_too():
    for size in [(16, 8, 4), (2, 2, 2), (8, 8, 8)]:
        for seed in range(20):
            for paint in (paint_in, paint_out):
                assert paint(places(size), np.random.default_rng(seed)).shape == (1, *size)


def test_flips_turn_image_and_target_alike_and_at_most_three_times():
    cube = image(1, (6, 6, 6))
    off = {"shuffle": 0, "nonlinear": 0, "paint": 0}
    distort = Distort(ModelsGenesis.Config(flip=0.99, **off))
    for seed in range(10):
        sample = distort({"image": cube}, np.random.default_rng(seed))
        assert np.array_equal(sample["image"], sample["target"])
    flipped = np.mean([not np.array_equal(random_flips(cube, 0.4, np.random.default_rng(s)), cube) for s in range(400)])
    # 0.4, less what a second flip along the same axis undoes.
    assert 0.27 < flipped < 0.42


def test_the_target_is_the_crop_and_the_sample_is_not_touched():
    cube = image(1, SIZE)
    kept = cube.copy()
    sample = Distort(ModelsGenesis.Config(flip=0))({"image": cube}, np.random.default_rng(3))
    assert np.array_equal(sample["target"], kept)
    assert np.array_equal(cube, kept)
    assert not np.array_equal(sample["image"], kept)
    assert sample["image"].dtype == np.float32


def test_the_same_generator_gives_the_same_pair():
    distort, cube = Distort(ModelsGenesis.Config()), image(2, SIZE)
    one, other = (distort({"image": cube}, np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(one["image"], other["image"])


def test_restoration_counts_every_voxel_through_a_sigmoid(monkeypatch):
    made = ModelsGenesis(ModelsGenesis.Config(), unet())
    target = torch.rand(2, 1, 32, 32, 32)
    monkeypatch.setattr(made.restore, "forward", lambda features: torch.zeros_like(target))
    loss = made({"image": torch.rand(2, 1, 32, 32, 32), "target": target})["restoration"]
    assert loss.item() == pytest.approx((0.5 - target).square().mean().item())


def test_published_probabilities():
    config = ModelsGenesis.Config()
    assert (config.flip, config.shuffle, config.windows) == (0.4, 0.5, 10_000)
    assert (config.nonlinear, config.paint, config.inpaint) == (0.9, 0.9, 0.2)
