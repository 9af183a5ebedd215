"""The 3D U-Net of Models Genesis: the published forward pass, batch norm included."""

import pytest
import torch
import torch.nn.functional as F

from backbones.genesis_unet3d import GenesisUNet3D
from harness import UserError
from harness.api.settings import build
from tests.backbones.parts import check_dropout, check_levels_and_parts, make


def test_genesis_unet3d_uses_the_batchs_statistics_in_evaluation():
    published = make("genesis_unet3d").eval()
    image = torch.rand(2, 2, 16, 16, 16)
    image[1] *= 3
    alone, beside = published.encode(image[:1])[0], published.encode(image)[0][:1]
    assert not torch.allclose(alone, beside)
    norm = published.down_tr64.ops[0].bn1
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.ones(4))
    torch.testing.assert_close(beside, published.train().encode(image)[0][:1])
    usual = GenesisUNet3D(GenesisUNet3D.Config(first=4, norm="running"), 2).eval()
    torch.testing.assert_close(usual.encode(image[:1])[0], usual.encode(image)[0][:1])


def published(image, weights):
    """The forward pass of Models Genesis' `pytorch/unet3d.py` from its weights, without its sigmoid."""

    def convolution(features, name):
        kernel, bias = (weights[f"{name}.conv1.{kind}"] for kind in ("weight", "bias"))
        features = F.conv3d(features, kernel, bias, padding=1)
        mean = features.mean(dim=(0, 2, 3, 4), keepdim=True)
        variance = features.var(dim=(0, 2, 3, 4), keepdim=True, correction=0)
        scale, shift = (weights[f"{name}.bn1.{kind}"].view(1, -1, 1, 1, 1) for kind in ("weight", "bias"))
        return ((features - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)

    def both(features, name):
        return convolution(convolution(features, f"{name}.ops.0"), f"{name}.ops.1")

    skips = [both(image, "down_tr64")]
    for name in ("down_tr128", "down_tr256", "down_tr512"):
        skips.append(both(F.max_pool3d(skips[-1], kernel_size=2), name))
    features = skips.pop()
    for name in ("up_tr256", "up_tr128", "up_tr64"):
        kernel, bias = (weights[f"{name}.up_conv.{kind}"] for kind in ("weight", "bias"))
        features = F.conv_transpose3d(features, kernel, bias, stride=2)
        features = both(torch.cat((features, skips.pop()), dim=1), name)
    return F.conv3d(features, weights["out_tr.final_conv.weight"], weights["out_tr.final_conv.bias"])


@pytest.mark.parametrize("training", [True, False])
def test_the_forward_pass_is_the_published_one(training):
    """In double precision and with norms that are not the identity."""
    torch.manual_seed(0)
    network = GenesisUNet3D(GenesisUNet3D.Config(first=4, dropout=0.0), in_channels=2).double()
    network.set_head(3)
    network.double().train(training)
    with torch.no_grad():
        for key, parameter in network.named_parameters():
            if ".bn1." in key:
                parameter.uniform_(0.5, 1.5)
    image = torch.rand(2, 2, 16, 24, 16, dtype=torch.float64)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    torch.testing.assert_close(network(image), published(image, weights), rtol=1e-9, atol=1e-9)


def test_running_statistics_are_those_of_the_batches_and_used_if_asked():
    """Momentum 0.1, unbiased variance: after one batch the running mean is a tenth of the batch's."""
    torch.manual_seed(0)
    network = GenesisUNet3D(GenesisUNet3D.Config(first=4, norm="running"), 1)
    image = torch.rand(2, 1, 8, 8, 8) + 3
    network.encode(image)
    layer = network.down_tr64.ops[0]
    features = layer.conv1(image)
    torch.testing.assert_close(layer.bn1.running_mean, 0.1 * features.mean(dim=(0, 2, 3, 4)))
    torch.testing.assert_close(layer.bn1.running_var, 0.9 + 0.1 * features.var(dim=(0, 2, 3, 4)))


def test_another_norm_is_refused():
    with pytest.raises(UserError, match=r"backbone\.norm"):
        build(GenesisUNet3D.Config, {"norm": "batches"}, "backbone")


def test_the_published_keys_and_shapes():
    """Names and shapes of `Genesis_Chest_CT.pt`, from the published network's description."""
    network = GenesisUNet3D(GenesisUNet3D.Config(), 1)
    network.set_head(1)
    state = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    for level, (first, second, before) in {
        "down_tr64": (32, 64, 1),
        "down_tr128": (64, 128, 64),
        "down_tr256": (128, 256, 128),
        "down_tr512": (256, 512, 256),
        "up_tr256": (256, 256, 512 + 256),
        "up_tr128": (128, 128, 256 + 128),
        "up_tr64": (64, 64, 128 + 64),
    }.items():
        assert state[f"{level}.ops.0.conv1.weight"] == (first, before, 3, 3, 3)
        assert state[f"{level}.ops.1.conv1.weight"] == (second, first, 3, 3, 3)
        for block, width in (("0", first), ("1", second)):
            for name in ("bn1.weight", "bn1.bias", "bn1.running_mean", "bn1.running_var", "conv1.bias"):
                assert state[f"{level}.ops.{block}.{name}"] == (width,)
    for level, width in {"up_tr256": 512, "up_tr128": 256, "up_tr64": 128}.items():
        assert state[f"{level}.up_conv.weight"] == (width, width, 2, 2, 2)
    assert state["out_tr.final_conv.weight"] == (1, 64, 1, 1, 1)
    assert len(state) == 7 * 2 * 7 + 3 * 2 + 2


def test_levels_and_parts():
    check_levels_and_parts("genesis_unet3d", channels=(8, 16, 32, 64), edges=(32, 16, 8, 4), width=8)


def test_dropout_acts_on_the_deepest_features_alone():
    check_dropout("genesis_unet3d")
