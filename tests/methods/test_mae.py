"""MAE in its dense form: zeros where it is masked, squared errors there, tokens on every level if asked."""

import numpy as np
import pytest
import torch

from methods.mae import MAE
from tests.methods.masked import check_loss, check_mask, check_refusals, hidden_by, keep, keep_argument, make
from tests.methods.parts import images, swin, unet


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


def test_three_quarters_of_the_patches_are_masked():
    check_mask(make(MAE, unet), images(2), masked=12)


@pytest.mark.parametrize("channels", [1, 2])
def test_the_loss_is_the_squared_error_of_the_masked_voxels(channels):
    """The network gets 0 where it is masked. Intensities beyond 1 show that nothing limits what it restores."""
    made, image = make(MAE, lambda: unet(channels=channels)), images(2, channels) * 4 - 1
    mask, network = hidden_by(made, image), made.backbone
    restored = made.predict(network.decode(network.encode(torch.where(mask, 0, image))))
    check_loss(made, image, restored, np.square)
    assert torch.equal(made.show({"image": image})["image"], image)


def test_settings_that_do_not_fit_are_refused():
    check_refusals(
        MAE,
        swin,
        [
            ({"patch": (12, 16, 16)}, "does not divide the crop"),
            ({"mask_ratio": 0.99}, "masks 16 of the 16 patches"),
            ({"densify": True}, "multiple of the deepest stride 32,32,32 .* it is 16,16,16"),
        ],
    )
    make(MAE, swin, densify=True, patch=(32, 32, 32), mask_ratio=0.5).check((32, 64, 32), 2)


def test_densified_the_network_learns_from_the_same_loss():
    made, image = make(MAE, lambda: unet(channels=2), densify=True), images(2, 2) * 4 - 1
    mask, network = hidden_by(made, image), made.backbone
    pyramid = [
        torch.where(mask[:, :, :: 2**level, :: 2**level, :: 2**level], token.view(1, -1, 1, 1, 1), features)
        for level, (features, token) in enumerate(
            zip(network.encode(torch.where(mask, 0, image)), made.tokens, strict=True)
        )
    ]
    check_loss(made, image, made.predict(network.decode(pyramid)), np.square)
    assert [len(token) for token in made.tokens] == [4, 4, 8, 8, 16]


@pytest.mark.parametrize("channels", [1, 2])
def test_with_normalised_patches_the_loss_is_numpys(channels, monkeypatch):
    """Each patch, all of its channels together, is standardised with the unbiased variance before it is compared."""
    made, image = make(MAE, lambda: unet(channels=channels), normalise_patches=True), images(2, channels=channels)
    mask = np.broadcast_to(hidden_by(made, image).numpy(), image.shape)
    restored = []
    monkeypatch.setattr(made.predict, "forward", keep(made.predict.forward, restored))
    (loss,) = made({"image": image}).values()
    target = image.numpy().astype(np.float64)
    for n, x, y, z in np.ndindex(2, 2, 4, 2):
        patch = target[n, :, 16 * x : 16 * (x + 1), 16 * y : 16 * (y + 1), 16 * z : 16 * (z + 1)]
        patch[:] = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
    squares = (restored[0].detach().numpy() - target) ** 2
    assert loss.item() == pytest.approx(squares[mask].mean(), rel=1e-4)


def test_patches_that_are_normalised_on_their_own_are_not_shown_as_an_image():
    batch = {"image": images()}
    assert set(make(MAE, unet).show(batch)) == {"image", "what it sees", "what it restores"}
    assert set(make(MAE, unet, normalise_patches=True).show(batch)) == {"image", "what it sees"}


def test_densified_or_not_the_encoder_sees_the_same_and_the_decoder_something_else(monkeypatch):
    """Only masked positions of each level are replaced; where nothing is masked the pyramid stays as it is."""
    image, pyramids = images(1), {}
    for densify in (False, True):
        made = make(MAE, unet, densify=densify)
        mask = hidden_by(made, image)
        decoded = []
        monkeypatch.setattr(made.backbone, "decode", keep_argument(made.backbone.decode, decoded))
        made({"image": image})
        pyramids[densify] = decoded[0]
    for level, (plain, dense) in enumerate(zip(pyramids[False], pyramids[True], strict=True)):
        at = mask[:, :, :: 2**level, :: 2**level, :: 2**level].expand_as(plain)
        assert torch.equal(plain[~at], dense[~at])
        # One vector for all masked positions of a level.
        hidden = dense.movedim(1, -1)[at[:, 0]]
        assert torch.equal(hidden, hidden[:1].expand_as(hidden))
        assert not torch.equal(plain[at], dense[at])
