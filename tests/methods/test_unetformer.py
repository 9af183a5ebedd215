"""UNetFormer: the whole network restores, or the encoder alone with one layer."""

import numpy as np
import pytest

from methods.simmim import SimMIM, VoxelHead
from methods.unetformer import UNetFormer
from tests.methods.masked import hidden_by, make
from tests.methods.parts import images, unet


def test_simmim_trains_the_encoder_and_unetformer_the_whole():
    assert SimMIM.trains == ("encoder",)
    assert make(UNetFormer, unet).trains == ("encoder", "decoder")
    alone = make(UNetFormer, unet, encoder_only=True)
    assert alone.trains == ("encoder",)
    assert isinstance(alone.predict, VoxelHead)


@pytest.mark.parametrize("encoder_only", [False, True])
def test_the_loss_is_l1_on_masked_voxels_in_numpy(encoder_only):
    made, image = make(UNetFormer, unet, encoder_only=encoder_only), images(2)
    mask = hidden_by(made, image).numpy()
    restored = made.show({"image": image})["what it restores"].detach().numpy().astype(np.float64)
    made.generator.manual_seed(0)
    (loss,) = made({"image": image}).values()
    assert loss.item() == pytest.approx(np.abs(restored - image.numpy())[mask].mean(), rel=1e-5)


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
