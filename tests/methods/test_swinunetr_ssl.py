"""Swin UNETR's pretext tasks: turns are labelled right, boxes cover what they should, restoration sees the turn."""

import pytest
import torch

from harness import UserError
from methods.swinunetr_ssl import SwinUNETRSSL, plane, rotate
from tests.methods.parts import generator, images, swin, unet


def make(backbone=unet, **settings):
    made = SwinUNETRSSL(SwinUNETRSSL.Config(**settings), backbone())
    made.generator = generator()
    return made


def test_rotation_is_the_labelled_number_of_quarter_turns():
    image = images(4)
    turned = rotate(image, torch.arange(4))
    for number in range(4):
        torch.testing.assert_close(turned[number], image[number].rot90(number, (1, 3)))


@pytest.mark.parametrize(("crop", "axes"), [((32, 32, 64), (0, 1)), ((32, 64, 32), (0, 2)), ((64, 32, 32), (1, 2))])
def test_rotation_is_in_a_plane_of_equal_edges(crop, axes):
    assert plane(crop) == axes


def test_a_crop_of_three_edges_cannot_be_turned():
    with pytest.raises(UserError, match="two edges must be equal"):
        make().check((32, 64, 96), 2)


def test_cut_out_covers_the_published_share():
    made, image = make(), images(16, size=(48, 48, 48))
    share = (made.hide(image) != image).float().flatten(1).mean(dim=1)
    assert 0.25 < share.mean() < 0.37
    assert share.std() > 0  # each sample has its own boxes


def test_restoration_is_compared_with_the_turned_view(monkeypatch):
    made, image = make(), images()
    seen = []
    monkeypatch.setattr(made, "hide", lambda views: seen.append(views) or views)
    monkeypatch.setattr(made.restore, "forward", lambda deepest: seen[0])
    assert made({"image": image})["inpainting"].item() == 0
    assert not torch.equal(seen[0], torch.cat([image, image]))


def test_a_network_that_knows_the_turn_has_no_rotation_loss(monkeypatch):
    made = make()
    state = made.generator.get_state()
    from harness import random_integers

    turns = random_integers(0, 3, (4,), torch.device("cpu"), made.generator)
    made.generator.set_state(state)
    known = torch.nn.functional.one_hot(turns, 4).float() * 100
    monkeypatch.setattr(made.turn, "forward", lambda codes: known)
    assert made({"image": images()})["rotation"].item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("off", ["inpainting", "rotation", "contrastive"])
def test_every_term_can_be_switched_off_and_leaves_no_dead_parameters(off):
    made = make(swin, **{off: 0})
    terms = made({"image": images()})
    assert set(terms) == {"inpainting", "rotation", "contrastive"} - {off}
    sum(terms.values()).backward()
    assert all(p.grad is not None for n, p in made.named_parameters() if not n.startswith("backbone"))


def test_published_weights_and_one_sample():
    config = SwinUNETRSSL.Config()
    assert (config.inpainting, config.rotation, config.contrastive, config.temperature) == (1, 1, 1, 0.5)
    with pytest.raises(UserError, match="no negatives"):
        make().check((32, 64, 32), 1)
    make(contrastive=0).check((32, 64, 32), 1)
