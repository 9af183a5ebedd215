"""SimMIM: one layer puts voxels back from the deepest features, and only masked ones count."""

import numpy as np
import pytest
import torch

from methods.simmim import SimMIM, VoxelHead, masked_mean, new_token
from tests.methods.masked import check_loss, check_mask, check_refusals, hidden_by, keep_argument, make
from tests.methods.parts import images, swin, unet, unetr


def test_masked_mean_has_no_gradient_at_visible_voxels():
    error = torch.rand(2, 3, 4, 4, 4, requires_grad=True)
    mask = torch.zeros(2, 1, 4, 4, 4, dtype=torch.bool)
    mask[:, :, :2] = True
    masked_mean(error, mask).backward()
    assert (error.grad[:, :, 2:] == 0).all()
    assert error.grad.sum().item() == pytest.approx(1)


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


@pytest.mark.parametrize("channels", [1, 2])
def test_the_loss_is_equation_1_in_numpy(channels):
    """L1 summed over the masked voxels of all channels, divided by their number; one layer on the deepest features."""
    made, image = make(SimMIM, lambda: unet(channels=channels)), images(2, channels) * 4 - 1
    deepest = made.backbone.encode_masked(image, hidden_by(made, image), made.token)[-1]
    check_loss(made, image, made.predict(deepest), np.abs)
    made.generator.manual_seed(0)
    shown = made.show({"image": image})
    assert torch.equal(shown["image"], image)
    made.generator.manual_seed(0)
    assert torch.equal(shown["what it restores"], made.restore(image)[1])


def test_six_patches_in_ten_are_masked():
    check_mask(make(SimMIM, unet), images(2), masked=10)


@pytest.mark.parametrize("backbone", [swin, unetr])
def test_a_transformer_learns_its_token_which_is_as_wide_as_an_embedding(backbone):
    made = make(SimMIM, backbone)
    made({"image": images()})["reconstruction"].backward()
    assert made.token.shape == (made.backbone.token_width,)
    assert made.token.grad.abs().sum() > 0


def test_settings_that_do_not_fit_are_refused():
    check_refusals(
        SimMIM,
        unetr,
        [
            ({"patch": (12, 16, 16)}, "does not divide the crop"),
            ({"patch": (32, 64, 32)}, "masks 1 of the 1 patches"),
            ({"patch": (16, 16, 8)}, "16,16,8 is not a multiple of the 16 voxels"),
        ],
    )


def test_a_convolutional_network_gets_the_token_in_the_place_of_masked_voxels(monkeypatch):
    made, image = make(SimMIM, unet), images(1)
    with torch.no_grad():
        made.token.fill_(-7.0)
    mask = hidden_by(made, image)
    seen = []
    monkeypatch.setattr(made.backbone, "trunk", keep_argument(made.backbone.trunk, seen))
    made({"image": image})
    assert (seen[0][mask] == -7).all()
    assert torch.equal(seen[0][~mask], image[~mask])


def test_the_token_is_drawn_with_the_published_deviation():
    """Truncation or another initialisation would show in the deviation of many draws."""
    torch.manual_seed(0)
    backbone = swin()
    drawn = np.concatenate([new_token(backbone).detach().numpy() for _ in range(1000)])
    assert drawn.shape == (1000 * backbone.token_width,)
    assert drawn.std() == pytest.approx(0.02, rel=0.02)
    assert abs(drawn.mean()) < 0.001


def test_only_the_encoder_is_passed_on():
    made = make(SimMIM, unet)
    assert {made.backbone.part_of(key) for key in made.weights()} == {"encoder"}
    made({"image": images()})["reconstruction"].backward()
    assert all(p.grad is None for name, p in made.backbone.named_parameters() if name.startswith("upcat"))
