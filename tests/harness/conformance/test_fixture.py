"""What the conformance checks work on is the same each time, small, and no easier than a run."""

import numpy as np
import pytest
import torch

from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from harness.conformance.fixture import CheckError, MethodFixture, PhantomVolume, sum_of_terms
from methods.mae import MAE
from methods.scratch import Scratch


@pytest.fixture
def fixture(tmp_path):
    return MethodFixture(MAE, UNet, tmp_path)


def test_a_made_up_volume_is_a_function_of_its_number():
    volume = PhantomVolume(3, 2, (20, 18, 16))
    image = volume.image
    assert image.shape == (2, 20, 18, 16)
    assert (image.min(), image.max()) == (pytest.approx(0.001), pytest.approx(1))
    assert np.array_equal(image, PhantomVolume(3, 2, (20, 18, 16)).image)
    assert not np.array_equal(image, PhantomVolume(4, 2, (20, 18, 16)).image)
    outside = volume.crop((-2, 0, 0), (4, 4, 4))
    assert not outside[:, :2].any()
    assert np.array_equal(outside[:, 2:], image[:, :2, :4, :4])
    sample = volume.sample((8, 8, 4), np.random.default_rng(0))["image"]
    assert any(
        np.array_equal(sample[0, 0, 0], row[z : z + 4]) for plane in image[0] for row in plane for z in range(13)
    )


@pytest.mark.parametrize("backbone", [UNet, SwinUNETR])
def test_crops_fit_the_network_and_are_no_cubes(backbone, tmp_path):
    fixture = MethodFixture(MAE, backbone, tmp_path)
    x, y, z = fixture.crop
    assert x == z
    assert y == 2 * x
    assert all(edge % stride == 0 for edge, stride in zip(fixture.crop, fixture.new_backbone(1).stride, strict=True))


def test_what_is_built_twice_is_the_same_and_another_seed_is_another(fixture):
    first, again, other = fixture.new(), fixture.new(), fixture.new(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(first.method.parameters(), again.method.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.method.parameters(), other.method.parameters(), strict=True))
    values = []
    for built in (first, again, other):
        built.reseed()  # masks and dropout from the beginning
        values.append(sum_of_terms(built.method(built.batches(1)[0])).item())
    assert values[0] == values[1] != values[2]
    first.reseed()
    assert sum_of_terms(first.method(first.batches(1)[0])).item() == values[0]


def test_another_rank_and_more_channels_have_batches_of_their_own(fixture):
    built = fixture.new(channels=2, batch=3)
    ((first,), (second,)) = built.batches(1), built.batches(1, rank=1)
    assert first["image"].shape == (3, 2, *built.crop)
    assert not torch.equal(first["image"], second["image"])
    assert torch.equal(first["image"], built.batches(2)[0]["image"])


def test_a_cycle_shows_the_same_again_and_training_goes_on(fixture):
    built = fixture.new(crop=(32, 32, 32))
    losses = built.train(6, cycle=2)
    assert len(losses) == 6
    # The same crops and masks: what is learned shows at once.
    assert losses[4] < losses[2] < losses[0]
    assert losses[5] < losses[1]


def test_a_method_that_trains_nothing_has_nothing_prepared(tmp_path):
    built = MethodFixture(Scratch, UNet, tmp_path).new()
    assert [type(source) for source in built.sources] == [PhantomVolume] * 4


GRADIENT = torch.ones((), requires_grad=True)


@pytest.mark.parametrize(
    ("terms", "says"),
    [
        ([GRADIENT], "must return a dict of named loss terms, it returned list"),
        ({}, "must return a dict of named loss terms"),
        ({"a": 1.0}, "term 'a' is not a scalar tensor"),
        ({"a": GRADIENT.view(1)}, "term 'a' is not a scalar tensor"),
        ({"a": GRADIENT, "b": GRADIENT / 0}, "term 'b' is inf: look for a division by 0"),
        ({"a": GRADIENT * float("nan")}, "term 'a' is nan"),
        ({"a": torch.ones(())}, "no term has a gradient"),
    ],
)
def test_terms_that_cannot_be_minimised_are_refused(terms, says):
    with pytest.raises(CheckError, match=says):
        sum_of_terms(terms)


def test_the_sum_is_that_of_all_terms():
    assert sum_of_terms({"a": 2 * GRADIENT, "b": torch.tensor(0.5)}).item() == 2.5
