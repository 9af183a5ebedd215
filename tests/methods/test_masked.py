"""SimMIM, UNetFormer and MAE: what is hidden is hidden, and only that counts."""

import pytest
import torch

from harness import UserError, to_voxels
from methods.mae import MAE
from methods.simmim import SimMIM, VoxelHead, masked_mean
from methods.unetformer import UNetFormer
from tests.methods.parts import generator, images, swin, unet, unetr

METHODS = [SimMIM, UNetFormer, MAE]
BACKBONES = [unet, swin, unetr]


def make(method, backbone, **settings):
    made = method(method.Config(**settings), backbone()).eval()
    made.generator = generator()
    return made


def hidden_by(made, image):
    """The mask that the next forward draws."""
    from harness import random_patches

    state = made.generator.get_state()
    patches = random_patches(image, made.config.patch, made.config.mask_ratio, made.generator)
    made.generator.set_state(state)
    return to_voxels(patches, made.config.patch)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_network_never_sees_what_is_masked(method, backbone, monkeypatch):
    """The prediction is the same whatever lies under the mask: a leak would make the task trivial."""
    made, image = make(method, backbone), images()
    mask = hidden_by(made, image)
    other = torch.where(mask, torch.rand_like(image), image)
    predictions = []
    monkeypatch.setattr(made.predict, "forward", keep(made.predict.forward, predictions))
    for seen in (image, other):
        made.generator = generator()
        made({"image": seen})
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=1e-6)


def keep(forward, kept):
    def call(features):
        kept.append(forward(features))
        return kept[-1]

    return call


@pytest.mark.parametrize("method", METHODS)
def test_visible_voxels_do_not_count(method, monkeypatch):
    made, image = make(method, unet), images()
    mask = hidden_by(made, image)
    restored = []
    monkeypatch.setattr(made.predict, "forward", keep(made.predict.forward, restored))
    (loss,) = made({"image": image}).values()
    error = (restored[0] - image).abs() if method is not MAE else (restored[0] - image).square()
    assert loss.item() == pytest.approx(error[mask.expand_as(error)].mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(error.mean().item(), rel=1e-5)


def test_masked_mean_has_no_gradient_at_visible_voxels():
    error = torch.rand(2, 3, 4, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    masked_mean(error, mask).backward()
    assert (error.grad[:, :, 2:] == 0).all()
    assert error.grad.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(("method", "ratio", "masked"), [(SimMIM, 0.6, 10), (UNetFormer, 0.4, 7), (MAE, 0.75, 12)])
def test_published_ratios(method, ratio, masked):
    made = make(method, unet)
    assert made.config.mask_ratio == ratio
    mask = hidden_by(made, images(3))
    assert (mask.flatten(1).sum(dim=1) == masked * 16**3).all()


@pytest.mark.parametrize("method", [SimMIM, UNetFormer])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_mask_token_is_learned(method, backbone):
    made = make(method, backbone)
    sum(made({"image": images()}).values()).backward()
    assert made.token.grad.abs().sum() > 0
    assert made.token.shape == (made.backbone.token_width or 1,)


@pytest.mark.parametrize("backbone", [swin, unetr])
def test_tokens_take_the_place_of_embedded_patches(backbone):
    """Everything masked: all that the encoder has is the token and, in UNETR, positions."""
    made = backbone().eval()
    token, mask = torch.randn(made.token_width), torch.ones(1, 1, 32, 64, 32, dtype=torch.bool)
    one, other = (made.encode_masked(images(1) * scale, mask, token) for scale in (1.0, 0.5))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert (one[0] == 0).all()


def test_simmim_trains_the_encoder_and_unetformer_the_whole():
    assert SimMIM.trains == ("encoder",)
    assert make(UNetFormer, unet).trains == ("encoder", "decoder")
    alone = make(UNetFormer, unet, encoder_only=True)
    assert alone.trains == ("encoder",)
    assert isinstance(alone.predict, VoxelHead)


def test_voxel_head_puts_each_cells_values_into_its_cell():
    head = VoxelHead(unet(channels=2))
    deepest = torch.zeros(1, 16, 2, 3, 2)
    deepest[0, :, 1, 2, 0] = 1
    with torch.no_grad():
        head.linear.bias.zero_()
        restored = head(deepest)
        flat = head.linear(deepest)[0, :, 1, 2, 0].view(2, 16, 16, 16)
    assert restored.shape == (1, 2, 32, 48, 32)
    torch.testing.assert_close(restored[0, :, 16:32, 32:48, 0:16], flat)
    restored[0, :, 16:32, 32:48, 0:16] = 0
    assert (restored == 0).all()


def test_mae_densified_hides_every_level_behind_its_token():
    made = make(MAE, unet, densify=True, patch=(16, 16, 16))
    mask = torch.zeros(1, 2, 4, 2, dtype=torch.bool)
    mask[0, 1, 2, 0] = True
    for level, stride in enumerate(made.backbone.strides):
        at = made._at_level(mask, stride)
        edge = 16 // stride[0]
        assert at.sum() == edge**3, level
        assert at[0, 0, edge : 2 * edge, 2 * edge : 3 * edge, :edge].all()
    made({"image": images()})["reconstruction"].backward()
    assert all(token.grad.abs().sum() > 0 for token in made.tokens)


def test_mae_normalised_targets_have_mean_0_and_deviation_1_per_patch():
    made = make(MAE, unet, normalise_patches=True)
    patch = made._normalised(images(2, channels=2))[1, :, 16:32, 32:48, :16]
    assert patch.mean().item() == pytest.approx(0, abs=1e-4)
    assert patch.std().item() == pytest.approx(1, abs=1e-2)


@pytest.mark.parametrize(
    ("method", "backbone", "settings", "says"),
    [
        (SimMIM, unet, {"patch": (12, 16, 16)}, "does not divide the crop"),
        (SimMIM, unet, {"patch": (32, 64, 32)}, "masks 1 of the 1 patches"),
        (MAE, unet, {"mask_ratio": 0.99}, "masks 16 of the 16 patches"),
        (UNetFormer, unetr, {"patch": (8, 8, 8)}, "is not a multiple of the 16 voxels"),
        (MAE, swin, {"densify": True}, "multiple of the deepest stride"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, backbone, settings, says):
    with pytest.raises(UserError, match=says):
        make(method, backbone, **settings).check((32, 64, 32), 2)
