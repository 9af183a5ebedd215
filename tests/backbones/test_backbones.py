"""The backbone contract over the whole registry, and equality with MONAI's networks for MONAI's weights."""

import pytest
import torch
from monai.networks.nets import UNETR as MonaiUNETR  # noqa: N811
from monai.networks.nets import BasicUNet
from monai.networks.nets import SegResNet as MonaiSegResNet
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR
from torch.utils.flop_counter import FlopCounterMode

from backbones.genesis_unet3d import GenesisUNet3D
from backbones.segresnet import SegResNet
from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from backbones.unetr import UNETR
from harness import crop
from harness.api.registry import Registry
from harness.api.settings import build

SMALL = {
    "unet": {"features": (4, 4, 8, 8, 16)},
    "swinunetr": {"feature_size": 12, "window_size": 4},
    "genesis_unet3d": {"first": 4},
    "segresnet": {"init_filters": 8},
    "unetr": {"image_size": (64, 32, 32), "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3},
}
NAMES = Registry().names("backbone")


def make(name: str, in_channels: int = 2):
    cls = Registry().load("backbone", name)
    torch.manual_seed(0)
    return cls(build(cls.Config, SMALL.get(name, {}), "backbone"), in_channels)


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
    assert cost[0] / cost[1] == pytest.approx(4, rel=0.01)


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_belongs_to_a_part(name):
    backbone = make(name)
    backbone.set_head(3)
    parts = {backbone.part_of(key) for key in backbone.state_dict()}
    assert parts == {"encoder", "decoder", "head"}
    assert backbone(torch.rand(1, 2, 64, 32, 32)).shape == (1, 3, 64, 32, 32)


@pytest.mark.parametrize("name", NAMES)
def test_dropout_is_really_called(name):
    backbone = make(name)
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


def test_swinunetr_equals_monai_for_monais_state_dict():
    torch.manual_seed(0)
    theirs = MonaiSwinUNETR(in_channels=2, out_channels=3, feature_size=12).eval()
    ours = SwinUNETR(SwinUNETR.Config(feature_size=12), in_channels=2).eval()
    ours.set_head(3)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.rand(1, 2, 64, 32, 64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)


# Windows of 7 that pad grids of 48, 24 and 12 tokens and windows of 4 that divide them; an axis that one window covers;
# samples in a batch; activations made again.
@pytest.mark.parametrize(
    ("crop", "batch", "window", "settings"),
    [
        ((96, 32, 64), 1, 7, {}),
        ((64, 64, 32), 2, 4, {}),
        ((64, 32, 32), 2, 7, {"depths": (1, 2, 3, 2)}),
        ((64, 32, 32), 1, 7, {"checkpoint": True}),
    ],
)
def test_swinunetr_has_monais_outputs_and_gradients(crop, batch, window, settings):
    """In double precision, so that nothing but the mathematics can differ."""
    torch.manual_seed(0)
    sizes = {"feature_size": 12, "depths": settings.get("depths", (2, 2, 2, 2)), "window_size": window}
    theirs = MonaiSwinUNETR(in_channels=2, out_channels=2, **sizes).double()
    ours = SwinUNETR(SwinUNETR.Config(**{**sizes, **settings}, dropout=0.0), in_channels=2)
    ours.set_head(2)
    ours.double()
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(batch, 2, *crop, dtype=torch.float64)
    wanted = torch.randn(batch, 2, *crop, dtype=torch.float64)
    outputs = [network(image) for network in (ours, theirs)]
    # MONAI's mask of -100 and the order of sums leave this much.
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    for output in outputs:
        (output * wanted).mean().backward()
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(
            mine.grad, other.grad, rtol=1e-6, atol=1e-9 * float(other.grad.abs().max() + 1e-3), msg=key
        )


def test_swinunetr_trains_after_it_was_evaluated():
    """What it keeps of the partition is made by whichever comes first."""
    backbone = make("swinunetr")
    image = torch.rand(1, 2, 96, 32, 32)
    with torch.inference_mode():
        backbone.encode(image)
    backbone.encode(image)[-1].square().mean().backward()


def test_unet_equals_basicunet_for_its_state_dict():
    torch.manual_seed(0)
    theirs = BasicUNet(in_channels=2, out_channels=3, features=(4, 4, 8, 8, 16, 4)).eval()
    ours = UNet(UNet.Config(features=(4, 4, 8, 8, 16)), in_channels=2).eval()
    ours.set_head(3)
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 2, 32, 48, 32)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_segresnet_equals_monai_for_monais_state_dict():
    torch.manual_seed(0)
    theirs = MonaiSegResNet(init_filters=8, in_channels=2, out_channels=3).eval()
    ours = SegResNet(SegResNet.Config(init_filters=8), in_channels=2).eval()
    ours.set_head(3)
    ours.load_state_dict(theirs.state_dict())
    image = torch.rand(1, 2, 32, 48, 32)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_unetr_equals_monai_for_monais_state_dict():
    torch.manual_seed(0)
    sizes = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3}
    theirs = MonaiUNETR(in_channels=2, out_channels=3, img_size=(32, 48, 32), **sizes).eval()
    ours = UNETR(UNETR.Config(image_size=(32, 48, 32), **sizes), in_channels=2).eval()
    ours.set_head(3)
    # MONAI makes a norm that nothing in UNETR uses.
    used = {key: value for key, value in theirs.state_dict().items() if "norm_cross_attn" not in key}
    ours.load_state_dict(used)
    image = torch.rand(1, 2, 32, 48, 32)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_unetr_takes_other_extents_than_its_positions_are_made_for():
    backbone = make("unetr")
    backbone.set_head(2)
    assert backbone(torch.rand(1, 2, 96, 64, 32)).shape == (1, 2, 96, 64, 32)
    positions = backbone._positions(torch.Size((4, 2, 2)))
    assert positions is backbone.vit.patch_embedding.position_embeddings


def test_genesis_unet3d_uses_the_batchs_statistics_in_evaluation():
    published = make("genesis_unet3d").eval()
    image = torch.rand(2, 2, 16, 16, 16)
    image[1] *= 3
    alone, beside = published.encode(image[:1])[0], published.encode(image)[0][:1]
    assert not torch.allclose(alone, beside)
    assert published.down_tr64.ops[0].bn1.num_batches_tracked == 0
    torch.testing.assert_close(beside, published.train().encode(image)[0][:1])
    usual = GenesisUNet3D(GenesisUNet3D.Config(first=4, norm="running"), 2).eval()
    torch.testing.assert_close(usual.encode(image[:1])[0], usual.encode(image)[0][:1])
