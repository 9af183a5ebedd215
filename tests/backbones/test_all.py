"""The backbone contract over the whole registry."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness import crop
from harness.api.registry import Registry
from tests.backbones.parts import make, small
from tests.methods.parts import images, swin, unetr

NAMES = Registry().names("backbone")


@pytest.mark.parametrize("name", NAMES)
def test_pyramid_has_the_stated_shapes(name):
    backbone = make(name)
    pyramid = backbone.encode(torch.rand(1, 2, 64, 32, 32))
    assert len(pyramid) == len(backbone.strides) == len(backbone.channels)
    for level, stride, channels in zip(pyramid, backbone.strides, backbone.channels, strict=True):
        assert level.shape == (1, channels, 64 // stride[0], 32 // stride[1], 32 // stride[2])


@pytest.mark.parametrize("name", NAMES)
def test_decode_whole_and_partial(name):
    backbone = make(name)
    pyramid = backbone.encode(torch.rand(1, 2, 64, 64, 32))
    assert backbone.decode(pyramid).shape == (1, backbone.width, 64, 64, 32)
    part = crop(pyramid, backbone.strides, (32, 0, 0), (32, 64, 32))
    features = backbone.decode(part)
    assert features.shape == (1, backbone.width, 32, 64, 32)
    features.square().mean().backward()
    for key, parameter in backbone.named_parameters():
        assert parameter.grad is not None, key


@pytest.mark.parametrize("name", NAMES)
def test_partial_decoding_costs_its_share(name):
    backbone = make(name)
    with torch.no_grad():
        pyramid = backbone.encode(torch.rand(1, 2, 64, 64, 64))
        cost = []
        for size in ((64, 64, 64), (32, 64, 32)):
            counter = FlopCounterMode(display=False)
            with counter:
                backbone.decode(crop(pyramid, backbone.strides, (0, 0, 0), size))
            cost.append(counter.get_total_flops())
    # MedNeXt's upsampling computes 2 n - 1 voxels along an axis, which is no share of n.
    assert cost[0] / cost[1] == pytest.approx(4, rel=0.03 if name == "mednext" else 0.01)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_belongs_to_a_part(name):
    backbone = make(name)
    backbone.set_head(3)
    parts = {backbone.part_of(key) for key in backbone.state_dict()}
    assert parts == {"encoder", "decoder", "head"}
    assert backbone(torch.rand(1, 2, 64, 32, 32)).shape == (1, 3, 64, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_really_called(name):
    backbone = small(name, dropout=0.1)
    image = torch.rand(1, 2, 32, 32, 32)
    assert not torch.equal(backbone.encode(image)[-1], backbone.encode(image)[-1])
    backbone.eval()
    assert torch.equal(backbone.encode(image)[-1], backbone.encode(image)[-1])


@pytest.mark.parametrize(
    ("origin", "size"),
    [((8, 0, 0), (32, 32, 32)), ((0, 0, 0), (40, 32, 32)), ((48, 0, 0), (32, 32, 32)), ((-16, 0, 0), (32, 32, 32))],
)
def test_crop_refuses_regions_off_the_grid_or_outside(origin, size):
    backbone = make("unet")
    pyramid = backbone.encode(torch.rand(1, 2, 64, 64, 64))
    with pytest.raises(ValueError, match="region"):
        crop(pyramid, backbone.strides, origin, size)


def test_crop_cuts_every_level_at_the_same_place():
    backbone = make("unet")
    where = torch.arange(64.0).view(1, 1, 64, 1, 1).expand(1, 1, 64, 64, 64)
    pyramid = [where[:, :, :: s[0], :: s[1], :: s[2]] for s in backbone.strides]
    for level, (s, *_) in zip(
        crop(pyramid, backbone.strides, (16, 0, 32), (32, 16, 16)), backbone.strides, strict=True
    ):
        assert level.shape[2:] == (32 // s, 16 // s, 16 // s)
        assert level[0, 0, 0, 0, 0] == 16
        assert level[0, 0, -1, 0, 0] == 48 - s


@pytest.mark.parametrize("backbone", [swin, unetr])
def test_tokens_take_the_place_of_embedded_patches(backbone):
    """Everything masked: all that the encoder has is the token and, in UNETR, positions."""
    made = backbone().eval()
    token, mask = torch.randn(made.token_width), torch.ones(1, 1, 32, 64, 32, dtype=torch.bool)
    one, other = (made.encode_masked(images(1) * scale, mask, token) for scale in (1.0, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (one[0] == 0).all()
