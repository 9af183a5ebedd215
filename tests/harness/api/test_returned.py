"""What plugins return is what the contract says, or is named."""

import pytest
import torch
from torch import nn

from harness import Backbone, Settings
from harness.api.returned import wrong_features, wrong_images, wrong_terms

IMAGE = torch.zeros(2, 1, 4, 4, 4)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": torch.tensor(1.0), "b": torch.zeros((), requires_grad=True)}, ""),
        (torch.tensor(1.0), "it returned Tensor"),
        ({}, "it returned an empty dict"),
        (None, "it returned NoneType"),
        ({1: torch.tensor(1.0)}, "named a term 1: names are text"),
        ({"a": 0.5}, "term 'a' is not a scalar tensor but float"),
        ({"a": torch.zeros(1)}, "term 'a' is not a scalar tensor but of shape (1,)"),
    ],
)
def test_loss_terms_are_named_scalars(value, says):
    wrong = wrong_terms(value)
    assert says in wrong
    assert bool(wrong) == bool(says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, ""),
        ({"masked": IMAGE}, ""),
        ([IMAGE], "it returned list"),
        ({"masked": IMAGE.numpy()}, "ndarray: give tensors by name"),
        ({3: IMAGE}, "show gives 3"),
        ({"masked": IMAGE[0]}, "of shape (1, 4, 4, 4): give (N, C, x, y, z)"),
    ],
)
def test_pictures_are_named_volumes(value, says):
    wrong = wrong_images(value)
    assert says in wrong
    assert bool(wrong) == bool(says)


class Small(Backbone):
    """Two levels, of which each test breaks one thing."""

    name = "small"
    strides = ((1, 1, 1), (2, 2, 2))
    channels = (2, 4)
    width = 2

    def __init__(self, **broken):
        super().__init__(Settings(), 1)
        self.broken = broken
        self.fine, self.coarse = nn.Conv3d(1, 2, 3, padding=1), nn.Conv3d(2, 4, 2, stride=2)
        self.up = nn.ConvTranspose3d(4, 2, 2, stride=2)
        self.strides = broken.get("strides", self.strides)
        self.channels = broken.get("channels", self.channels)
        self.width = broken.get("width", self.width)

    def trunk(self, image):
        fine = self.fine(image)
        return self.broken.get("levels", list)([fine, self.coarse(fine)])

    def decode(self, pyramid):
        return self.broken.get("decoded", lambda features: features)(self.up(pyramid[1]))


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        ({}, ""),
        ({"strides": ((1, 1, 1),)}, "channels declares 2 levels, strides 1"),
        ({"levels": lambda levels: levels[:1]}, "trunk returned 1 levels, channels and strides declare 2"),
        ({"levels": lambda levels: levels[::-1]}, "level 0 of trunk is (1, 4, 4, 4, 4) for an image (1, 1, 8, 8, 8)"),
        (
            {"channels": (2, 3)},
            "level 1 of trunk is (1, 4, 4, 4, 4) for an image (1, 1, 8, 8, 8), channels and strides declare (1, 3,",
        ),
        ({"levels": lambda levels: None}, "trunk raised TypeError"),
        ({"width": 3}, "decode returned (1, 2, 8, 8, 8), width and the finest level declare (1, 3, 8, 8, 8)"),
        ({"decoded": lambda features: features[:, :, 1:]}, "decode returned (1, 2, 7, 8, 8)"),
        ({"decoded": lambda features: features @ features[:, :, :3]}, "decode raised RuntimeError"),
    ],
)
def test_features_are_what_a_backbone_declares(broken, says):
    backbone = Small(**broken).train()
    said = wrong_features(backbone, (8, 8, 8))
    assert said.startswith(says) if says else not said
    assert backbone.training
