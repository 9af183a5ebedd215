"""SwinUNETR: outputs and gradients are MONAI's."""

import pytest
import torch
from monai.networks.nets import SwinUNETR as MonaiSwinUNETR

from backbones.swinunetr import SwinUNETR
from harness import UserError
from harness.api.settings import build
from tests.backbones.parts import check_dropout, check_levels_and_parts, check_tokens, make


def test_swinunetr_equals_monai_for_monais_state_dict():
    torch.manual_seed(0)
    theirs = MonaiSwinUNETR(in_channels=2, out_channels=3, feature_size=12).eval()
    ours = SwinUNETR(SwinUNETR.Config(feature_size=12), in_channels=2).eval()
    ours.set_head(3)
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    image = torch.rand(1, 2, 64, 32, 64)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5)


def test_swinunetr_trains_after_it_was_evaluated():
    """What it keeps of the partition is made by whichever comes first."""
    backbone = make("swinunetr")
    image = torch.rand(1, 2, 96, 32, 32)
    with torch.inference_mode():
        backbone.encode(image)
    backbone.encode(image)[-1].square().mean().backward()


def test_the_pyramid_is_the_image_and_the_states_of_monais_transformer():
    torch.manual_seed(0)
    theirs = MonaiSwinUNETR(in_channels=1, out_channels=2, feature_size=12).eval()
    ours = SwinUNETR(SwinUNETR.Config(feature_size=12), in_channels=1).eval()
    ours.load_state_dict({k: v for k, v in theirs.state_dict().items() if not k.startswith("out.")})
    image = torch.rand(1, 1, 64, 32, 32)
    pyramid = ours.encode(image)
    assert torch.equal(pyramid[0], image)
    for level, state in zip(pyramid[1:], theirs.swinViT(image, normalize=True), strict=True):
        torch.testing.assert_close(level, state, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"feature_size": 12, "num_heads": (3, 6, 12, 36)}, "36 heads do not divide the 96 channels of a stage"),
        ({"feature_size": 20}, r"backbone\.feature_size"),
        ({"depths": (2, 2, 2)}, r"backbone\.depths"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        build(SwinUNETR.Config, settings, "backbone")


def test_levels_and_parts():
    check_levels_and_parts("swinunetr", (2, 12, 24, 48, 96, 192), edges=(32, 16, 8, 4, 2, 1), width=12)


def test_dropout_acts_on_the_deepest_features_alone():
    check_dropout("swinunetr")


def test_the_token_takes_the_place_of_embedded_patches():
    check_tokens("swinunetr", lambda backbone: backbone.swinViT.patch_embed.proj)


def pair(window=7, depths=(2, 2, 2, 2), **settings):
    """Our network and MONAI's with equal weights, in double precision, so that nothing but the mathematics can differ."""
    torch.manual_seed(0)
    sizes = {"feature_size": 12, "depths": depths, "window_size": window}
    theirs = MonaiSwinUNETR(in_channels=2, out_channels=2, **sizes).double()
    ours = SwinUNETR(SwinUNETR.Config(**sizes, **settings), in_channels=2)
    ours.set_head(2)
    ours.double()
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs


def check_gradients(ours, theirs):
    """MONAI's mask of -100 and the order of sums leave a little. Gradients of bias tables are summed in single precision."""
    for (key, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert other.grad.abs().sum() > 0 or key.endswith("bias"), key
        largest, small = float(other.grad.abs().max()), 1e-6 if key.endswith("bias_table") else 1e-9
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=small * largest + 1e-12, msg=key)


# Windows of 7 that pad grids of 48, 24 and 12 tokens and windows of 4 that divide them; an axis that one window covers;
# samples in a batch; activations made again.
@pytest.mark.parametrize(
    ("crop", "batch", "window", "settings"),
    [
        pytest.param((96, 32, 64), 1, 7, {}, marks=pytest.mark.slow),
        ((64, 64, 32), 2, 4, {}),
        pytest.param((64, 32, 32), 2, 7, {"depths": (1, 2, 3, 2)}, marks=pytest.mark.slow),
        ((64, 32, 32), 1, 7, {"checkpoint": True}),
    ],
)
def test_the_transformer_has_monais_outputs_and_gradients(crop, batch, window, settings):
    ours, theirs = pair(window, **settings)
    image = torch.rand(batch, 2, *crop, dtype=torch.float64)
    (_, *levels), states = ours.encode(image), theirs.swinViT(image, normalize=True)
    slopes = [torch.randn_like(state) for state in states]
    for mine, other in zip(levels, states, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-9)
    for outputs in (levels, states):
        sum((output * slope).mean() for output, slope in zip(outputs, slopes, strict=True)).backward()
    check_gradients(ours.swinViT, theirs.swinViT)


def test_the_whole_network_has_monais_outputs_and_gradients():
    ours, theirs = pair(depths=(1, 1, 1, 1))
    image = torch.rand(1, 2, 64, 32, 32, dtype=torch.float64)
    outputs = [network(image) for network in (ours, theirs)]
    torch.testing.assert_close(*outputs, rtol=0, atol=1e-9)
    slope = torch.randn_like(outputs[0])
    for output in outputs:
        (output * slope).mean().backward()
    check_gradients(ours, theirs)
