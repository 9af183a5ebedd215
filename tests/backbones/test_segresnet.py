"""SegResNet: MONAI's in two halves."""

import pytest
import torch
from monai.networks import nets
from monai.networks.nets import SegResNet as MonaiSegResNet

from backbones.segresnet import SegResNet
from harness import UserError
from harness.api.settings import build
from tests.backbones.parts import check_dropout, check_levels_and_parts


def test_segresnet_equals_monai_for_monais_state_dict():
    torch.manual_seed(0)
    theirs = MonaiSegResNet(init_filters=8, in_channels=2, out_channels=3).eval()
    ours = SegResNet(SegResNet.Config(init_filters=8), in_channels=2).eval()
    ours.set_head(3)
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 2, 32, 48, 32)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_segresnet_has_monais_gradients():
    """In double precision, so that nothing but the mathematics can differ."""
    torch.manual_seed(0)
    theirs = MonaiSegResNet(init_filters=8, in_channels=2, out_channels=3).double()
    ours = SegResNet(SegResNet.Config(init_filters=8, dropout=0.0), in_channels=2)
    ours.set_head(3)
    ours.double()
    ours.load_state_dict(theirs.state_dict())
    image, slope = torch.rand(2, 2, 16, 32, 16, dtype=torch.float64), torch.randn(2, 3, 16, 32, 16, dtype=torch.float64)
    for network in (ours, theirs):
        (network(image) * slope).sum().backward()
    expected = dict(theirs.named_parameters())
    for key, mine in ours.named_parameters():
        torch.testing.assert_close(mine.grad, expected.pop(key).grad, rtol=1e-9, atol=1e-9, msg=key)
    assert not expected


def test_what_it_says_of_itself_builds_the_same_network_in_monai():
    torch.manual_seed(0)
    ours = SegResNet(SegResNet.Config(init_filters=16), in_channels=3).eval()
    ours.set_head(2)
    name, arguments = ours.monai(2)
    theirs = getattr(nets, name)(**arguments).eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(1, 3, 16, 16, 16)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_the_pyramid_is_what_monais_encoder_gives():
    torch.manual_seed(0)
    theirs = MonaiSegResNet(init_filters=8, in_channels=1).eval()
    ours = SegResNet(SegResNet.Config(init_filters=8), in_channels=1).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("conv_final")})
    image = torch.rand(1, 1, 32, 16, 16)
    deepest, levels = theirs.encode(image)
    pyramid = ours.encode(image)
    assert len(pyramid) == len(levels)
    for mine, other in zip(pyramid, levels, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    torch.testing.assert_close(pyramid[-1], deepest, rtol=0, atol=0)


@pytest.mark.parametrize("number", [0, 4, 12])
def test_filters_that_eight_groups_do_not_divide_are_refused(number):
    with pytest.raises(UserError, match=r"backbone\.init_filters"):
        build(SegResNet.Config, {"init_filters": number}, "backbone")


def test_levels_and_parts():
    check_levels_and_parts("segresnet", channels=(8, 16, 32, 64), edges=(32, 16, 8, 4), width=8)


def test_dropout_acts_on_the_deepest_features_alone():
    check_dropout("segresnet")
