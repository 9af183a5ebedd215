"""nnU-Net's networks: equal to the published ones, anisotropic, initialised as they are, and supervised at every level."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from backbones.nnunet import PlainUNet, ResEnc
from harness import UserError
from harness.api.settings import build
from harness.training.segmenter import Segmenter
from tests.backbones.parts import check_dropout, check_levels_and_parts

NETWORKS = {"resenc": ResEnc, "plainunet": PlainUNet}
PUBLISHED = Path(__file__).with_name("nnunet.json")
ANISOTROPIC = {"strides": "1;1,2,2;2", "kernels": "1,3,3;3;3"}


def made(name, channels=1, head=3, **settings):
    network = NETWORKS[name](build(NETWORKS[name].Config, settings, "backbone"), channels)
    network.set_head(head)
    return network


def filled(network):
    """Parameters that depend on their shapes and their order by name only, so that other software can make them too."""
    with torch.no_grad():
        for number, (_, value) in enumerate(sorted(network.named_parameters())):
            steps = torch.arange(value.numel(), dtype=torch.float64) * 0.7 + number
            value.copy_((torch.sin(steps) * (0.3 if value.ndim > 1 else 0.2) + (value.ndim == 1)).view(value.shape))
    return network


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_are_those_of_the_published_network(name):
    """`nnunet.json` has outputs of dynamic-network-architectures 0.4.4 with the weights of `filled`."""
    published = json.loads(PUBLISHED.read_text())[name]
    network = filled(
        made(name, features=(4, 8, 8), deep_supervision=True, **ANISOTROPIC, **published["settings"])
    ).double()
    image = torch.sin(torch.arange(8 * 16 * 16, dtype=torch.float64) * 0.01).view(1, 1, 8, 16, 16)
    for logits, expected in zip(network.supervised_logits(image), published["outputs"], strict=True):
        torch.testing.assert_close(logits.flatten()[:: published["every"]], torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize(("name", "number"), [("resenc", 102_350_575), ("plainunet", 31_196_399)])
def test_the_default_has_the_published_number_of_parameters(name, number):
    """With 3 classes and all heads; nnU-Net has a head for the coarsest decoder level too, which is never trained."""
    with torch.device("meta"):
        network = made(name, deep_supervision=True)
    assert sum(value.numel() for value in network.parameters()) == number


@pytest.mark.parametrize("name", NETWORKS)
def test_levels_and_parts(name):
    check_levels_and_parts(name, (4, 4, 8, 8), (32, 16, 8, 4), 4)
    check_dropout(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_strides_and_kernels_may_differ_along_the_axes(name):
    network = made(name, features=(4, 8, 8), **ANISOTROPIC)
    assert network.strides == ((1, 1, 1), (1, 2, 2), (2, 4, 4))
    pyramid = network.encode(torch.rand(1, 1, 8, 16, 16))
    assert [tuple(level.shape[2:]) for level in pyramid] == [(8, 16, 16), (8, 8, 8), (4, 4, 4)]
    kernels = [
        tuple(m.kernel_size) for m in network.encoder.modules() if isinstance(m, nn.Conv3d) and max(m.kernel_size) > 1
    ]
    assert kernels[0] == (1, 3, 3)
    assert kernels[-1] == (3, 3, 3)
    assert network(torch.rand(1, 1, 8, 16, 16)).shape == (1, 3, 8, 16, 16)


def test_weights_begin_as_nnunets_do():
    torch.manual_seed(0)
    network = made("resenc", features=(16, 32), blocks=(2, 2))
    for block in [module for module in network.modules() if hasattr(module, "conv2")]:
        assert not block.conv2.norm.weight.any()
        assert not block.conv2.norm.bias.any()
        assert (block.conv1.norm.weight == 1).all()
    weight = network.encoder.stages[1].blocks[1].conv1.conv.weight
    assert abs(float(weight.detach().std()) / (2 / (1 + 0.01**2) / (32 * 27)) ** 0.5 - 1) < 0.03
    assert not network.encoder.stages[1].blocks[1].conv1.conv.bias.any()
    assert not network.seg_layers["0"].bias.any()


def test_the_blocks_of_the_published_sizes():
    assert ResEnc.Config().stage_blocks == [1, 3, 4, 6, 6, 6]
    assert ResEnc.Config(features=(32, 64, 128, 256)).stage_blocks == [1, 3, 4, 6]
    assert ResEnc.Config(features=(32,) * 8).stage_blocks == [1, 3, 4, 6, 6, 6, 6, 6]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strides": "1;2"}, "strides has 2 stages, features has 3"),
        ({"strides": "2;2;2"}, "must be 1"),
        ({"kernels": "3;4;3"}, "odd"),
        ({"kernels": "3;x;3"}, "integer"),
        ({"strides": "1;2,2;2"}, "backbone.strides"),
        ({"blocks": (1, 2)}, "blocks has 2 stages"),
        ({"features": (4,)}, "at least 2"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        made("resenc", **{"features": (4, 8, 8)} | settings)


@pytest.mark.parametrize("text", ["3", 3, "3,3,3;3;3", ((3, 3, 3),) * 3, "3;3;3"])
def test_kernels_may_be_written_in_several_ways(text):
    config = build(ResEnc.Config, {"features": (4, 8, 8), "kernels": text}, "backbone")
    assert config.stage_kernels == [(3, 3, 3)] * 3


@pytest.mark.parametrize("overlapping", [False, True])
def test_each_level_counts_half_of_the_one_before(overlapping):
    torch.manual_seed(0)
    network = made("plainunet", head=2, features=(4, 8, 8, 8), deep_supervision=True)
    image = torch.rand(2, 1, 16, 16, 16)
    target = torch.rand(2, 2, 16, 16, 16).round() if overlapping else torch.randint(0, 2, (2, 1, 16, 16, 16))
    terms = Segmenter(network, overlapping)({"image": image, "target": target})
    levels = network.supervised_logits(image)
    assert [tuple(level.shape[2:]) for level in levels] == [(16,) * 3, (8,) * 3, (4,) * 3]
    expected = 0
    for logits, weight, step in zip(levels[:2], (2 / 3, 1 / 3), (1, 2), strict=True):
        # The nearest neighbour of a coarse voxel's centre, which lies between two voxels, is the upper one.
        fitting = target[:, :, step - 1 :: step, step - 1 :: step, step - 1 :: step]
        labels = fitting if overlapping else fitting[:, 0]
        entropy = nn.functional.binary_cross_entropy_with_logits if overlapping else nn.functional.cross_entropy
        expected += weight * entropy(logits, labels)
    torch.testing.assert_close(terms["cross_entropy"], expected)
    plain = made("plainunet", head=2, features=(4, 8, 8, 8))
    assert set(plain.seg_layers) == {"2"}
    assert set(network.seg_layers) == {"0", "1", "2"}


def test_every_head_gets_a_gradient_and_the_coarsest_one_counts_nothing():
    """Without a gradient of 0, training on several devices would end with an error about an unused parameter."""
    network = made("resenc", head=2, features=(4, 8, 8, 8), blocks=(1, 1, 1, 1), deep_supervision=True)
    batch = {"image": torch.rand(2, 1, 16, 16, 16), "target": torch.randint(0, 2, (2, 1, 16, 16, 16))}
    sum(Segmenter(network, overlapping=False)(batch).values()).backward()
    assert network.seg_layers["2"].weight.grad.any()
    assert network.seg_layers["1"].weight.grad.any()
    assert not network.seg_layers["0"].weight.grad.any()
