"""Models Genesis: the published distributions, and what each distortion may and may not do."""

import random

import numpy as np
import pytest
import torch
from scipy.stats import ks_2samp, kstest

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
from tests.methods.parts import image, images, unet

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
        # Plane by plane: windows reach both ends of every axis.
        planes = [
            np.mean([np.moveaxis(result[0] != places()[0], axis, 0).mean(axis=(1, 2)) for result in results], axis=0)
            for results in (ours, theirs)
        ]
        np.testing.assert_allclose(planes[0], planes[1], atol=0.04)


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
    cube = image(2, (16, 16, 16)) * 1.4 - 0.2  # what lies outside [0, 1] gets the value at its end
    result = remap_intensities(cube, np.random.default_rng(0))
    curves, rng = [], np.random.default_rng(0)
    for channel in range(2):
        curves.append(random_curve(rng))
        exact = np.interp(cube[channel], np.linspace(0, 1, 2049), curves[channel])
        np.testing.assert_allclose(result[channel], exact, atol=1e-5)
    assert not np.allclose(*curves)


@pytest.mark.parametrize(("ours", "theirs"), [(paint_in, plain.painted_in), (paint_out, plain.painted_out)])
def test_painting_has_the_plain_references_distribution(ours, theirs):
    cube = places((28, 28, 14))
    rng = np.random.default_rng(0)
    painted = [np.stack([f(cube) != cube for _ in range(1500)]) for f in (lambda c: ours(c, rng), theirs)]
    shares = [each.mean(axis=(1, 2, 3, 4)) for each in painted]
    assert ks_2samp(*shares).pvalue > 1e-3
    assert np.mean(shares[0]) == pytest.approx(np.mean(shares[1]), abs=0.015)
    assert np.mean(shares[0] == 0) == pytest.approx(np.mean(shares[1] == 0), abs=0.025)
    np.testing.assert_allclose(painted[0].mean(axis=0), painted[1].mean(axis=0), atol=0.08)


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


def test_flips_are_up_to_three_along_random_axes():
    """By hand: 0.4 to go on each time; a second flip of an axis undoes the first."""
    cube, rng, along = image(1, (3, 3, 3)), np.random.default_rng(0), np.zeros((2, 2, 2))
    turns = {axes: np.flip(cube, [axis + 1 for axis in range(3) if axes[axis]]) for axes in np.ndindex(2, 2, 2)}
    for _ in range(4000):
        flipped = random_flips(cube, 0.4, rng)
        (axes,) = (axes for axes, turned in turns.items() if np.array_equal(turned, flipped))
        along[axes] += 1 / 4000
    none = 0.6 + 0.16 * 0.6 / 3
    one = (0.4 * 0.6 + 0.064 * 21 / 27) / 3
    two = 0.16 * 0.6 * (2 / 3) / 3
    expected = np.array([none, one, two, 0.064 * 6 / 27])
    np.testing.assert_allclose(along, expected[np.indices((2, 2, 2)).sum(axis=0)], atol=0.03)


def test_the_released_codes_distortions_in_its_order_and_as_often():
    """A cube of zeros and ones tells them apart: a curve keeps both or exchanges them, and all else is noise.

    Noise stays uniform, because painting comes last. A corner is noise after out-painting and never after in-painting.
    """
    cube, rng = (image(1, (24, 24, 24)) < 0.5).astype(np.float32), np.random.default_rng(0)
    distort, signs = ModelsGenesis.transform(ModelsGenesis.Config()), []
    for number in range(500):
        sample = distort({"image": cube, "case": number}, rng)
        result, target = sample["image"], sample["target"]
        noise = (result != 0) & (result != 1)
        falls = np.mean(result[~noise] == target[~noise]) < 0.5
        straight = 1 - result if falls else result
        shuffled = (straight != target)[~noise].any()
        signs.append((noise[0, 0, 0, 0], noise.any() and not noise[0, 0, 0, 0], falls, shuffled, falls and shuffled))
        assert sample["case"] == number
        assert not noise.any() or kstest(result[noise], "uniform").pvalue > 1e-7
        assert np.isin(target, (0, 1)).all()
    expected = [0.9 * 0.8, 0.9 * 0.2 * 0.95, 0.9 / 2, 0.5, 0.5 * 0.9 / 2]
    np.testing.assert_allclose(np.mean(signs, axis=0), expected, atol=0.08)


def test_image_and_target_are_flipped_alike():
    cube, turned = image(1, (6, 6, 6)), 0
    distort = Distort(ModelsGenesis.Config(flip=0.99, shuffle=0, nonlinear=0, paint=0))
    for seed in range(10):
        sample = distort({"image": cube}, np.random.default_rng(seed))
        assert np.array_equal(sample["image"], sample["target"])
        turned += not np.array_equal(sample["target"], cube)
    assert turned > 5


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


def test_the_loss_is_that_of_the_restored_distorted_crop_and_trains_the_whole_network():
    made = ModelsGenesis(ModelsGenesis.Config(), unet(channels=2)).eval()
    batch = {"image": images(2, 2), "target": torch.rand(2, 2, 32, 64, 32)}
    features = made.backbone.decode(made.backbone.encode(batch["image"])).detach().numpy().astype(np.float64)
    kernel = made.restore.weight.detach().numpy()[:, :, 0, 0, 0]
    logits = np.einsum("oc,ncxyz->noxyz", kernel, features) + made.restore.bias.detach().numpy().reshape(1, 2, 1, 1, 1)
    restored = 1 / (1 + np.exp(-logits))
    loss = made(batch)["restoration"]
    assert loss.item() == pytest.approx(np.square(restored - batch["target"].numpy()).mean(), rel=1e-5)
    shown = made.show(batch)
    assert torch.equal(shown["image"], batch["target"])
    assert torch.equal(shown["what it sees"], batch["image"])
    np.testing.assert_allclose(shown["what it restores"].detach().numpy(), restored, atol=1e-5)
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in made.restore.parameters())
    learns = {made.backbone.part_of(key) for key, p in made.backbone.named_parameters() if p.grad is not None}
    assert learns == {made.backbone.part_of(key) for key in made.weights()} == {"encoder", "decoder"}


def test_published_probabilities():
    config = ModelsGenesis.Config()
    assert (config.flip, config.shuffle, config.windows) == (0.4, 0.5, 10_000)
    assert (config.nonlinear, config.paint, config.inpaint) == (0.9, 0.9, 0.2)
