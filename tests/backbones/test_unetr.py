"""UNETR: MONAI's in two halves, and for more than one extent."""

import pytest
import torch
from monai.networks import nets
from monai.networks.nets import UNETR as MonaiUNETR  # noqa: N811
from scipy import ndimage

from backbones.unetr import UNETR
from harness import UserError
from harness.api.settings import build
from tests.backbones.parts import check_dropout, check_levels_and_parts, check_tokens, make


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


SIZES = {"feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3}


def test_the_pyramid_is_the_image_and_four_states_of_monais_transformer():
    torch.manual_seed(0)
    theirs = MonaiUNETR(in_channels=1, out_channels=2, img_size=(32, 48, 16), **SIZES).eval()
    ours = UNETR(UNETR.Config(image_size=(32, 48, 16), **SIZES), in_channels=1).eval()
    used = {k: v for k, v in theirs.state_dict().items() if "norm_cross_attn" not in k and not k.startswith("out.")}
    ours.load_state_dict(used)
    image = torch.rand(2, 1, 32, 48, 16)
    last, hidden = theirs.vit(image)
    pyramid = ours.encode(image)
    assert torch.equal(pyramid[0], image)
    for level, tokens in zip(pyramid[1:], (hidden[3], hidden[6], hidden[9], last), strict=True):
        volume = tokens.transpose(1, 2).reshape(2, 24, 2, 3, 1)
        torch.testing.assert_close(level, volume, rtol=0, atol=1e-6)


def test_what_it_says_of_itself_builds_the_same_network_in_monai():
    torch.manual_seed(0)
    ours = UNETR(UNETR.Config(image_size=(16, 32, 16), **SIZES), in_channels=2).eval()
    ours.set_head(3)
    name, arguments = ours.monai(3)
    theirs = getattr(nets, name)(**arguments).eval()
    lacking = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not lacking.unexpected_keys
    assert all("norm_cross_attn" in key for key in lacking.missing_keys)
    image = torch.rand(1, 2, 16, 32, 16)
    torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=0)


def test_positions_of_another_extent_are_scipys_linear_interpolation():
    """As in a network that was made for that extent, with positions that SciPy interpolated."""
    key = "vit.patch_embedding.position_embeddings"
    torch.manual_seed(0)
    short = UNETR(UNETR.Config(image_size=(32, 48, 32), **SIZES), in_channels=1).eval()
    long = UNETR(UNETR.Config(image_size=(64, 48, 48), **SIZES), in_channels=1).eval()
    weights = short.state_dict()
    grid = weights[key][0].T.reshape(24, 2, 3, 2).double().numpy()
    zoomed = [ndimage.zoom(each, (2, 1, 1.5), order=1, mode="nearest", grid_mode=True) for each in grid]
    positions = torch.stack([torch.from_numpy(each).flatten() for each in zoomed]).T[None]
    assert positions.shape == long.state_dict()[key].shape
    long.load_state_dict(weights | {key: positions.float()})
    image = torch.rand(1, 1, 64, 48, 48)
    for mine, expected in zip(short.encode(image), long.encode(image), strict=True):
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)


def test_only_positions_tell_one_place_from_another():
    """Without them a transformer that gets the same patch everywhere gives the same everywhere."""
    torch.manual_seed(0)
    network = UNETR(UNETR.Config(image_size=(32, 32, 16), **SIZES), in_channels=1).eval()
    image = torch.rand(1, 1, 16, 16, 16).repeat(1, 1, 2, 2, 1)
    assert network.encode(image)[-1].flatten(2).std(dim=2).max() > 1e-3
    with torch.no_grad():
        network.vit.patch_embedding.position_embeddings.zero_()
    assert network.encode(image)[-1].flatten(2).std(dim=2).max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"hidden_size": 24, "num_heads": 5}, "5 heads do not divide the 24 channels of a token"),
        ({"image_size": (96, 96, 40)}, "is not a multiple of 16"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        build(UNETR.Config, settings, "backbone")


def test_levels_and_parts():
    check_levels_and_parts("unetr", channels=(2, 24, 24, 24, 24), edges=(32, 2, 2, 2, 2), width=4)


def test_dropout_acts_on_the_deepest_features_alone():
    check_dropout("unetr")


def test_the_token_takes_the_place_of_embedded_patches():
    check_tokens("unetr", lambda backbone: backbone.vit.patch_embedding.patch_embeddings)
