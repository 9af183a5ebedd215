"""UNet: MONAI's BasicUNet in two halves."""

import pytest
import torch
from monai.networks import nets
from monai.networks.nets import BasicUNet

from backbones.unet import UNet
from harness import UserError
from harness.api.settings import build
from tests.backbones.parts import check_dropout, check_levels_and_parts


def test_unet_equals_basicunet_for_its_state_dict():
    torch.manual_seed(0)
    theirs = BasicUNet(in_channels=2, out_channels=3, features=(4, 4, 8, 8, 16, 4)).eval()
    ours = UNet(UNet.Config(features=(4, 4, 8, 8, 16)), in_channels=2).eval()
    ours.set_head(3)
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 2, 32, 48, 32)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_unet_has_basicunets_gradients():
    """In double precision, so that nothing but the mathematics can differ."""
    torch.manual_seed(0)
    theirs = BasicUNet(in_channels=2, out_channels=3, features=(4, 4, 8, 8, 16, 4)).double()
    ours = UNet(UNet.Config(features=(4, 4, 8, 8, 16), dropout=0.0), in_channels=2)
    ours.set_head(3)
    ours.double()
    ours.load_state_dict(theirs.state_dict())
    image, slope = torch.rand(2, 2, 32, 16, 32, dtype=torch.float64), torch.randn(2, 3, 32, 16, 32, dtype=torch.float64)
    for network in (ours, theirs):
        (network(image) * slope).sum().backward()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-9, msg=key)


def test_what_it_says_of_itself_builds_the_same_network_in_monai():
    torch.manual_seed(0)
    ours = UNet(UNet.Config(features=(4, 8, 12, 16, 20), block_dropout=0.2), in_channels=2).eval()
    ours.set_head(3)
    name, arguments = ours.monai(3)
    theirs = getattr(nets, name)(**arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(1, 2, 32, 16, 16)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_the_default_is_as_large_as_the_paper_network_counted_by_hand():
    """3x3x3 convolutions with bias, two per block, each with an affine norm; transposed 2x2x2 ones upsample."""

    def block(given, made):
        return 27 * given * made + 27 * made * made + 2 * made + 4 * made

    def up(deep, skip, made, upsampled):
        return 8 * deep * upsampled + upsampled + block(skip + upsampled, made)

    encoder = block(1, 64) + block(64, 64) + block(64, 128) + block(128, 256) + block(256, 512)
    decoder = up(512, 256, 256, 256) + up(256, 128, 128, 128) + up(128, 64, 64, 64) + up(64, 64, 64, 64)
    backbone = UNet(UNet.Config(), in_channels=1)
    assert sum(parameter.numel() for parameter in backbone.parameters()) == encoder + decoder


def test_dropout_inside_the_blocks_makes_every_level_random():
    """Then two encodings need two passes; dropout after the trunk alone leaves the fine levels as they are."""
    image = torch.rand(1, 1, 32, 16, 16)
    for inside in (0.0, 0.3):
        backbone = UNet(UNet.Config(features=(4, 4, 8, 8, 16), block_dropout=inside), in_channels=1)
        finest = [backbone.encode(image)[0] for _ in range(2)]
        assert torch.equal(*finest) == (inside == 0) == (not backbone.dropout_inside)


@pytest.mark.parametrize("features", [(4, 4, 8, 8), (4, 4, 8, 8, 16, 4), (4, 4, 8, 8, 0)])
def test_there_are_five_widths_and_none_is_0(features):
    with pytest.raises(UserError, match=r"backbone\.features"):
        build(UNet.Config, {"features": features}, "backbone")


def test_levels_and_parts():
    check_levels_and_parts("unet", channels=(4, 4, 8, 8, 16), edges=(32, 16, 8, 4, 2), width=4)


def test_dropout_acts_on_the_deepest_features_alone():
    check_dropout("unet")
