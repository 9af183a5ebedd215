"""Small networks that several backbone tests use."""

import torch

from harness.api.registry import Registry
from harness.api.settings import build

SMALL = {
    "unet": {"features": (4, 4, 8, 8, 16)},
    "swinunetr": {"feature_size": 12, "window_size": 4},
    "genesis_unet3d": {"first": 4},
    "segresnet": {"init_filters": 8},
    "resenc": {"features": (4, 4, 8, 8), "blocks": (1, 1, 1, 1)},
    "plainunet": {"features": (4, 4, 8, 8)},
    "mednext": {"filters": 4},
    "unetr": {"image_size": (64, 32, 32), "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3},
}


def make(name: str, in_channels: int = 2):
    cls = Registry().load("backbone", name)
    torch.manual_seed(0)
    return cls(build(cls.Config, SMALL.get(name, {}), "backbone"), in_channels)


def small(name: str, in_channels: int = 2, **settings):
    """As `make`, with further settings; the weights do not depend on them."""
    cls = Registry().load("backbone", name)
    torch.manual_seed(0)
    return cls(build(cls.Config, SMALL[name] | settings, "backbone"), in_channels)


def check_levels_and_parts(name: str, channels: tuple[int, ...], edges: tuple[int, ...], width: int):
    """The pyramid's shapes are the stated ones, and each part holds what computes it.

    Encoding uses the parameters of the encoder and no other, and so on; `edges` are those of the levels of an image of 32.
    """
    backbone = small(name)
    backbone.set_head(3)
    pyramid = backbone.encode(torch.rand(1, 2, 64, 32, 32))
    assert [tuple(level.shape) for level in pyramid] == [
        (1, number, 2 * edge, edge, edge) for number, edge in zip(channels, edges, strict=True)
    ]
    assert backbone.channels == channels
    assert tuple(backbone.strides) == tuple((32 // edge,) * 3 for edge in edges)
    assert backbone.width == width
    inputs = [level.detach() for level in pyramid]
    features = backbone.decode(inputs)
    assert features.shape == (1, width, 64, 32, 32)
    logits = backbone.head(features.detach())
    assert logits.shape == (1, 3, 64, 32, 32)
    for part, outputs in {"encoder": pyramid, "decoder": [features], "head": [logits]}.items():
        backbone.zero_grad()
        sum(output.square().sum() for output in outputs if output.requires_grad).backward()
        own = {key for key, parameter in backbone.named_parameters() if backbone.part_of(key) == part}
        assert {key for key, parameter in backbone.named_parameters() if parameter.grad is not None} == own
        assert own <= set(backbone.part_weights((part,)))


def check_dropout(name: str):
    """None by default. Otherwise on the deepest level, in training only, and two encodings have their own draws."""
    image = torch.rand(2, 2, 64, 64, 64)
    plain, dropping = small(name), small(name, dropout=0.3)
    expected = plain.encode(image)
    assert torch.equal(plain.encode(image)[-1], expected[-1])
    drawn = [dropping.encode(image), *dropping.encode_twice(image)]
    for pyramid in drawn:
        *others, deepest = pyramid
        for level, wanted in zip(others, expected, strict=False):
            torch.testing.assert_close(level, wanted, rtol=0, atol=1e-5)
        stays = deepest != 0
        torch.testing.assert_close(deepest[stays] * 0.7, expected[-1][stays], rtol=1e-4, atol=1e-5)
        already = (expected[-1] == 0).float().mean()
        assert abs(float(stays.float().mean()) - 0.7 * (1 - already)) < 0.12
    assert not torch.equal(drawn[0][-1], drawn[1][-1])
    assert not torch.equal(drawn[1][-1], drawn[2][-1])
    plain.eval(), dropping.eval()
    torch.testing.assert_close(dropping.encode(image)[-1], plain.encode(image)[-1], rtol=0, atol=0)


def check_tokens(name: str, embed):
    """The mask token takes the place of embedded patches, and no level shows what is masked.

    So a token that is the embedding of a constant patch gives what an image with this constant would, except on level 0,
    where masked voxels are 0. `embed` is the convolution that embeds the patches of a network.
    """
    backbone, image = small(name).eval(), torch.rand(2, 2, 64, 32, 32)
    step = backbone.token_stride
    mask = torch.rand(2, 1, *(edge // 16 for edge in image.shape[2:])) < 0.5
    mask = mask.repeat_interleave(16, 2).repeat_interleave(16, 3).repeat_interleave(16, 4)
    assert 0 < mask.float().mean() < 1
    constant = torch.full((1, 2, step, step, step), 0.7)
    constant[:, 1] = -0.4
    convolution = embed(backbone)
    token = torch.conv3d(constant, convolution.weight, convolution.bias, stride=step).flatten()
    assert backbone.token_width == len(token)
    finest, *levels = backbone.encode_masked(image, mask, token)
    assert torch.equal(finest, image * ~mask)
    filled = torch.where(mask, constant[:, :, :1, :1, :1], image)
    for level, expected in zip(levels, backbone.encode(filled)[1:], strict=True):
        torch.testing.assert_close(level, expected, rtol=1e-4, atol=1e-5)
    dropping = small(name, dropout=0.5)
    assert (dropping.encode_masked(image, mask, token)[-1] == 0).float().mean() > 0.3
