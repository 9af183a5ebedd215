"""nnU-Net's augmentation: how often each step comes, in what range, and what it does beside MONAI's transforms."""

from functools import partial

import numpy as np
import pytest
from monai.transforms import AdjustContrast, ScaleIntensityFixedMean

from harness.config.schema import Finetune
from harness.training import augmentation
from harness.training.augmentation import Augment, change_intensities, draw_warp, warp_drawer

IMAGE = np.random.default_rng(1).normal(size=(2, 12, 10, 8)).astype(np.float32)


def finetuning(**more):
    return Finetune(steps=1, crop=(8, 8, 8), batch_size=1, lr=1, weight_decay=0, **more)


class Fixed:
    """A generator whose draws are given: `random` below every probability, `uniform` from a list."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return 0.0

    def uniform(self, low, high, size=None):
        value = self.values.pop(0)
        assert low <= np.min(value) <= np.max(value) <= high
        return value


class Above(Fixed):
    """As `Fixed`, with factors above one."""

    def random(self):
        return 0.9


def test_a_factor_is_below_one_as_often_as_above_however_far_the_range_reaches():
    rng = np.random.default_rng(0)
    factors = np.array([augmentation._around_one(0.7, 1.5, rng) for _ in range(4000)])
    assert (factors < 1).mean() == pytest.approx(0.5, abs=0.03)
    assert factors[factors < 1].mean() == pytest.approx(0.85, abs=0.01)
    assert factors[factors > 1].mean() == pytest.approx(1.25, abs=0.01)
    assert 0.7 <= factors.min() < factors.max() <= 1.5


def test_without_it_no_number_is_drawn():
    """So that runs of presets without nnU-Net's augmentation stay as they were."""
    assert warp_drawer(finetuning()) is None
    off = finetuning(flip=0, rotate=0, scale=0, shift=0)
    made = Augment(off)({"image": IMAGE, "target": IMAGE}, np.random.default_rng(0))
    assert np.array_equal(made["image"], IMAGE)


@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_each_step_comes_as_often_as_in_nnunet(factor, monkeypatch):
    counts = [0] * len(augmentation.STEPS)

    def counter(number):
        def step(image, rng):
            counts[number] += 1

        return step

    steps = tuple((chance, counter(number)) for number, (chance, _) in enumerate(augmentation.STEPS))
    monkeypatch.setattr(augmentation, "STEPS", steps)
    rng = np.random.default_rng(0)
    for _ in range(8000):
        change_intensities(IMAGE, factor, rng)
    # Noise, blur, brightness, contrast, low resolution, inverted gamma, gamma.
    expected = np.array([0.1, 0.2, 0.15, 0.15, 0.25, 0.1, 0.3]) * factor
    np.testing.assert_allclose(np.array(counts) / 8000, expected, atol=0.015)


def drawn(number, image=IMAGE, draws=3000):
    """What a step makes of an image, many times."""
    rng, step = np.random.default_rng(0), augmentation.STEPS[number][1]
    for _ in range(draws):
        made = image.copy()
        step(made, rng)
        yield made


def test_noise_has_one_deviation_for_all_channels_uniform_up_to_a_tenth():
    zero = np.zeros((2, 16, 16, 16), np.float32)
    deviations = np.array([made.std(axis=(1, 2, 3)) for made in drawn(0, zero, 600)])
    np.testing.assert_allclose(deviations[:, 0], deviations[:, 1], rtol=0.1)
    assert deviations.max() < 0.104
    assert deviations.mean() == pytest.approx(0.05, abs=0.004)


@pytest.mark.parametrize(("number", "low", "high"), [(2, 0.75, 1.25)])
def test_factors_are_below_one_as_often_as_above(number, low, high):
    factors = np.array([(made / IMAGE)[:, 0, 0, 0] for made in drawn(number)]).ravel()
    assert (low, high) == (pytest.approx(factors.min(), abs=0.01), pytest.approx(factors.max(), abs=0.01))
    assert (factors < 1).mean() == pytest.approx(0.5, abs=0.03)
    assert factors[factors < 1].mean() == pytest.approx((low + 1) / 2, abs=0.01)
    firsts, seconds = factors[::2], factors[1::2]
    assert abs(np.corrcoef(firsts, seconds)[0, 1]) < 0.08  # each channel has a factor of its own


@pytest.mark.parametrize("number", [1, 4])
def test_blur_and_low_resolution_change_every_second_channel(number):
    changed = np.array([[not np.array_equal(a, b) for a, b in zip(made, IMAGE, strict=True)] for made in drawn(number)])
    # A resolution that rounds to the same extent, of so small an image, changes nothing.
    np.testing.assert_allclose(changed.mean(axis=0), 0.5 if number == 1 else 0.46, atol=0.03)
    share = changed.mean()
    assert (changed[:, 0] & changed[:, 1]).mean() == pytest.approx(share * share, abs=0.03)


def test_contrast_and_gamma_are_those_of_monai():
    channel = IMAGE[0]
    for factor in (0.8, 1.2):
        contrast = ScaleIntensityFixedMean(factor=factor - 1, preserve_range=True)(channel[None])[0]
        drawn_factor = Above(factor) if factor > 1 else Fixed(factor)
        np.testing.assert_allclose(augmentation.change_contrast(channel, drawn_factor), contrast, atol=1e-5)
    for inverted in (False, True):
        gamma = AdjustContrast(0.8, invert_image=inverted, retain_stats=True)(channel[None])[0]
        np.testing.assert_allclose(augmentation.change_gamma(channel, Fixed(0.8), inverted), gamma, atol=1e-4)
    constant = np.full((4, 4, 4), 3, np.float32)
    assert np.array_equal(augmentation.change_gamma(constant, Fixed(0.8), False), constant)


def test_blur_has_a_gaussian_of_its_own_along_each_axis():
    image, sigmas = np.random.default_rng(0).normal(size=(15, 15, 15)).astype(np.float32), (0.5, 0.75, 1.0)
    expected, offsets = image, np.arange(-6, 7)
    for axis, sigma in enumerate(sigmas):
        kernel = np.exp(-0.5 * (offsets / sigma) ** 2)
        smooth = partial(np.convolve, kernel / kernel.sum(), mode="same")
        expected = np.apply_along_axis(smooth, axis, expected)
    inner = (slice(6, -6),) * 3
    np.testing.assert_allclose(augmentation.blur(image, Fixed(np.array(sigmas)))[inner], expected[inner], atol=1e-5)


def test_low_resolution_leaves_a_flat_crops_shortest_axis_alone():
    rng = np.random.default_rng(0)
    steep = np.broadcast_to(rng.normal(size=(1, 1, 4)), (16, 16, 4)).astype(np.float32)
    np.testing.assert_allclose(augmentation.lower_resolution(steep, Fixed(0.5)), steep, atol=1e-6)
    cube = rng.normal(size=(8, 8, 8)).astype(np.float32)
    coarse = augmentation.lower_resolution(cube, Fixed(0.5))
    assert len(np.unique(coarse.round(5))) > 8
    assert coarse.std() < 0.8 * cube.std()
    np.testing.assert_array_equal(augmentation.lower_resolution(cube, Fixed(1.0)), cube)


def angles(matrix):
    """The three angles of a product of rotations about x, y and z."""
    return (
        np.arctan2(-matrix[1, 2], matrix[2, 2]),
        np.arcsin(np.clip(matrix[0, 2], -1, 1)),
        np.arctan2(-matrix[0, 1], matrix[0, 0]),
    )


def test_warps_are_turns_up_to_30_degrees_and_scalings():
    rng = np.random.default_rng(0)
    warps = [draw_warp(1.0, (16, 16, 16), rng) for _ in range(6000)]
    matrices = np.array([warp.matrix for warp in warps if warp is not None])
    assert len(matrices) / 6000 == pytest.approx(1 - 0.8 * 0.8, abs=0.02)
    scales = np.linalg.det(matrices) ** (1 / 3)
    scaled = scales[abs(scales - 1) > 1e-9]
    assert len(scaled) / 6000 == pytest.approx(0.2, abs=0.02)
    assert (scaled.min(), scaled.max()) == (pytest.approx(0.7, abs=0.01), pytest.approx(1.4, abs=0.01))
    assert scaled.mean() == pytest.approx(1.05, abs=0.02)
    turns = matrices / scales[:, None, None]
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-9)
    all_angles = np.array([angles(turn) for turn in turns if not np.allclose(turn, np.eye(3))])
    assert len(all_angles) / 6000 == pytest.approx(0.2, abs=0.02)
    for values in np.degrees(all_angles).T:
        assert (values.min(), values.max()) == (pytest.approx(-30, abs=1), pytest.approx(30, abs=1))
        assert values.mean() == pytest.approx(0, abs=2)


def test_a_flat_crop_is_turned_in_its_plane_by_any_angle():
    rng = np.random.default_rng(0)
    warps = [draw_warp(1.0, (64, 16, 64), rng) for _ in range(3000)]
    matrices = np.array([warp.matrix for warp in warps if warp is not None])
    along = np.array([0, 1, 0])
    np.testing.assert_allclose(matrices[:, 1], np.broadcast_to(along, (len(matrices), 3)), atol=1e-12)
    np.testing.assert_allclose(matrices[:, :, 1], np.broadcast_to(along, (len(matrices), 3)), atol=1e-12)
    turned = np.degrees(np.arctan2(matrices[:, 0, 2], matrices[:, 0, 0]))
    assert turned.min() < -170
    assert turned.max() > 170


def test_a_factor_halves_how_often_crops_are_warped():
    rng = np.random.default_rng(0)
    share = np.mean([draw_warp(0.5, (16, 16, 16), rng) is not None for _ in range(6000)])
    assert share == pytest.approx(1 - 0.9 * 0.9, abs=0.02)
