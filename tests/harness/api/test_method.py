"""What a method hands over, and what it has without saying so."""

from typing import ClassVar

import numpy as np
import pytest
import torch

from backbones.unet import UNet
from harness import Method, Settings


class Encoder(Method):
    """Trains the encoder only."""

    name = "encoder-only"
    trains: ClassVar = ("encoder",)


def unet():
    return UNet(UNet.Config(features=(4, 4, 8, 8, 8)), in_channels=1)


def test_weights_are_those_of_the_parts_that_were_trained_as_they_are_now():
    method = Encoder(Settings(), unet())
    with torch.no_grad():
        method.backbone.conv_0.conv_0.conv.weight.fill_(3.0)
    found = method.weights()
    assert {key.split(".")[0] for key in found} == {"conv_0", "down_1", "down_2", "down_3", "down_4"}
    assert bool((found["conv_0.conv_0.conv.weight"] == 3).all())
    report = unet().load_state_dict(found, strict=False)
    assert not report.unexpected_keys
    assert all(key.startswith("upcat") for key in report.missing_keys)


def test_all_but_the_loss_has_a_default_that_changes_nothing(tmp_path):
    method, volumes = Encoder(Settings(), unet()), [object(), object()]
    before = {key: value.clone() for key, value in method.state_dict().items()}
    assert method.check((7, 5, 3), 1) is None
    assert method.prepare(volumes, None) is volumes
    assert method.transform(method.config) is None
    assert method.example(method.backbone, tmp_path) == method.show({}) == {}
    method.after_step(1)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    with pytest.raises(NotImplementedError, match=r"Encoder must implement forward\(batch\)"):
        method({"image": torch.zeros(1, 1, 16, 16, 16)})


def test_a_network_without_its_parts_says_which_one_is_missing():
    from harness import Backbone

    bare = Backbone(Settings(), 1)
    for call, name in ((bare.trunk, "trunk"), (bare.decode, "decode"), (bare.set_head, "set_head")):
        with pytest.raises(NotImplementedError, match=f"Backbone must implement {name}"):
            call(None)


def test_every_method_that_comes_along_trains_parts_of_a_network_and_needs_what_some_network_offers(registry):
    offered = {ability for name in registry.names("backbone") for ability in registry.load("backbone", name).abilities}
    for name in registry.names("method"):
        method = registry.load("method", name)
        assert set(method.trains) <= {"encoder", "decoder"}, name
        assert set(method.needs) <= offered, name
        assert method.name == name


def test_a_prepared_volume_is_a_source_of_samples(phantom, tmp_path):
    from harness.data.inventory import digest_cases
    from harness.data.volumes import preprocess_cases

    task, root = phantom
    cases = task.cases(root)[:1]
    (volume,) = preprocess_cases(task, cases, digest_cases(cases, tmp_path)[0], tmp_path)
    sample = volume.sample((16, 12, 8), np.random.default_rng(0))["image"]
    assert sample.shape == (len(task.channels), 16, 12, 8)
    assert sample.dtype == np.float32
    assert volume.image.shape == (len(task.channels), *volume.shape)
    assert 0 <= volume.image.min() < volume.image.max() <= 1
    outside = volume.crop((-4, 0, 0), (8, 4, 4))
    assert not outside[:, :4].any()
    np.testing.assert_array_equal(outside[:, 4:], volume.image[:, :4, :4, :4])
