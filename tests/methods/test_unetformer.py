"""UNetFormer: the whole network restores, or the encoder alone with one layer."""

import numpy as np
import pytest

from methods.simmim import SimMIM, VoxelHead
from methods.unetformer import UNetFormer
from tests.methods.masked import check_loss, check_mask, check_refusals, hidden_by, make
from tests.methods.parts import images, swin, unet, unetr


def test_simmim_trains_the_encoder_and_unetformer_the_whole():
    assert SimMIM.trains == ("encoder",)
    assert make(UNetFormer, unet).trains == ("encoder", "decoder")
    alone = make(UNetFormer, unet, encoder_only=True)
    assert alone.trains == ("encoder",)
    assert isinstance(alone.predict, VoxelHead)


@pytest.mark.parametrize("encoder_only", [False, True])
@pytest.mark.parametrize("channels", [1, 2])
def test_the_loss_is_l1_on_masked_voxels_in_numpy(channels, encoder_only):
    """Intensities beyond 1 show that nothing limits what is restored; the token learns, too."""
    made = make(UNetFormer, lambda: unet(channels=channels), encoder_only=encoder_only)
    image = images(2, channels) * 4 - 1
    pyramid = made.backbone.encode_masked(image, hidden_by(made, image), made.token)
    restored = made.predict(pyramid[-1] if encoder_only else made.backbone.decode(pyramid))
    check_loss(made, image, restored, np.abs)


def test_four_patches_in_ten_are_masked():
    check_mask(make(UNetFormer, unet), images(2), masked=7)


@pytest.mark.parametrize("backbone", [swin, unetr])
def test_a_transformer_learns_its_token(backbone):
    made = make(UNetFormer, backbone)
    made({"image": images()})["reconstruction"].backward()
    assert made.token.shape == (made.backbone.token_width,)
    assert made.token.grad.abs().sum() > 0


def test_settings_that_do_not_fit_are_refused():
    check_refusals(UNetFormer, unetr, [({"patch": (8, 8, 8)}, "is not a multiple of the 16 voxels")])


def test_the_decoder_learns_unless_the_encoder_is_trained_alone():
    for encoder_only in (False, True):
        made = make(UNetFormer, unet, encoder_only=encoder_only)
        made({"image": images()})["reconstruction"].backward()
        learns = {made.backbone.part_of(key) for key, p in made.backbone.named_parameters() if p.grad is not None}
        assert learns == ({"encoder"} if encoder_only else {"encoder", "decoder"})
        assert {made.backbone.part_of(key) for key in made.weights()} == learns


def test_alone_the_encoder_is_pre_trained_as_simmim_pre_trains_it():
    """Same mask, same token, same layer: one method under two names."""
    image = images()
    losses = [
        made({"image": image})["reconstruction"].item()
        for made in (make(UNetFormer, unet, encoder_only=True, mask_ratio=0.6), make(SimMIM, unet, mask_ratio=0.6))
    ]
    assert losses[0] == losses[1]
