"""VolumeFusion: the label map is the fusion weight of every voxel."""

import pytest
import torch

from harness import UserError
from methods.volume_fusion import VolumeFusion
from tests.methods.parts import generator, images, unet


def make(channels=1, **settings):
    made = VolumeFusion(VolumeFusion.Config(**settings), unet(channels))
    made.generator = generator()
    return made


@pytest.mark.parametrize("channels", [1, 3])
def test_the_label_map_equals_the_fusion_weights(channels):
    made, image = make(channels), images(3, channels)
    label = made.draw_label(image)
    fused = made.fuse(image, label)
    foreground = image.roll(1, dims=0)
    # Solve fused = w * foreground + (1 - w) * image for w at every voxel and modality.
    weight = (fused - image) / (foreground - image)
    clear = (foreground - image).abs() > 0.05
    torch.testing.assert_close(weight[clear], (label[:, None] / 4).expand_as(weight)[clear], atol=1e-4, rtol=0)
    assert set(label.unique().tolist()) == {0, 1, 2, 3, 4}


def test_boxes_have_the_published_number_and_edges():
    one = make(min_boxes=1, max_boxes=1)
    edges = []
    for _ in range(60):
        label = one.draw_label(images(4, size=(64, 64, 64)))
        for sample in label:
            inside = sample.nonzero()
            assert len(inside.unique(dim=0)) == sample.count_nonzero()
            extent = inside.max(dim=0).values - inside.min(dim=0).values + 1
            assert extent.prod() == len(inside)  # one box, cut at the border at most
            edges.append(extent.max().item())
    assert max(edges) <= 40  # 62.5 % of 64
    assert max(edges) > 32
    defaults = make().config
    assert (defaults.min_boxes, defaults.max_boxes, defaults.coefficients) == (10, 39, 4)


def test_later_boxes_replace_earlier_ones():
    made = make(min_boxes=39, max_boxes=39, min_edge=1.0, max_edge=1.0)
    label = made.draw_label(images(2))
    # Boxes as large as the crop: wherever the last one lies there is one class only.
    counts = torch.stack([(label == k).flatten(1).sum(dim=1) for k in range(5)])
    assert (counts.max(dim=0).values > 0.1 * label[0].numel()).all()


def test_samples_have_their_own_boxes():
    label = make().draw_label(images(4))
    assert not torch.equal(label[0], label[1])


def test_one_sample_has_no_partner():
    with pytest.raises(UserError, match=r"pretrain\.batch_size=2"):
        make().check((32, 64, 32), 1)


def test_perfect_logits_have_no_loss(monkeypatch):
    made, image = make(), images(2)
    label = made.draw_label(image)
    made.generator = generator()
    known = torch.nn.functional.one_hot(label, 5).movedim(-1, 1).float() * 100
    monkeypatch.setattr(made.classify, "forward", lambda features: known)
    terms = made({"image": image})
    assert terms["dice"].item() == pytest.approx(0, abs=1e-3)
    assert terms["cross_entropy"].item() == pytest.approx(0, abs=1e-6)
    known = known.roll(1, dims=1)
    assert made({"image": image})["dice"].item() > 0.5


def test_dice_is_monais(monkeypatch):
    """The term of a forward pass whose logits and classes are known."""
    from monai.losses import DiceLoss

    method, image = make(), images(2, size=(32, 32, 32))
    label = method.draw_label(image)
    logits = torch.randn(2, 1 + method.config.coefficients, 32, 32, 32, generator=generator())
    monkeypatch.setattr(method, "draw_label", lambda image: label)
    monkeypatch.setattr(method.classify, "forward", lambda features: logits)
    theirs = DiceLoss(softmax=True, to_onehot_y=True, batch=True)(logits, label[:, None])
    torch.testing.assert_close(method({"image": image})["dice"], theirs)
