"""SimMIM: one layer puts voxels back from the deepest features, and only masked ones count."""

import numpy as np
import pytest
import torch

from methods.simmim import SimMIM, VoxelHead, masked_mean, new_token
from tests.methods.masked import hidden_by, keep_argument, make
from tests.methods.parts import images, swin, unet


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


def test_the_loss_is_equation_1_in_numpy():
    """L1 summed over the masked voxels of all channels, divided by their number."""
    made, image = make(SimMIM, lambda: unet(channels=2)), images(2, channels=2)
    mask = np.broadcast_to(hidden_by(made, image).numpy(), image.shape)
    shown = made.show({"image": image})
    made.generator.manual_seed(0)
    (loss,) = made({"image": image}).values()
    restored = shown["what it restores"].detach().numpy().astype(np.float64)
    assert loss.item() == pytest.approx(np.abs(restored - image.numpy())[mask].sum() / mask.sum(), rel=1e-5)


def test_what_it_sees_is_the_image_with_zeros_where_it_is_masked():
    made, image = make(SimMIM, unet), images()
    mask = hidden_by(made, image).numpy()
    seen = made.show({"image": image})["what it sees"].numpy()
    np.testing.assert_array_equal(seen[~mask], image.numpy()[~mask])
    assert not seen[mask].any()
    assert mask.mean() == pytest.approx(10 / 16)


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
