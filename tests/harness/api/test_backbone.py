"""The network's three parts: masking, two encodings of one batch, crops of a pyramid, weights by part."""

from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness import Backbone, Settings, crop, inflate

STRIDES = ((1, 1, 1), (2, 2, 1), (4, 4, 2))


class Pooled(Backbone):
    """The image, and means over 2 x 2 x 1 and 4 x 4 x 2 voxels."""

    name = "pooled"
    strides, channels, width = STRIDES, (2, 2, 2), 2
    parts: ClassVar = {"encoder": ("stem",), "decoder": ("up", "down"), "head": ("out",)}

    def __init__(self, dropout=0.0, inside=False):
        super().__init__(Settings(), 2, dropout)
        self.dropout_inside, self.seen = inside, []
        self.stem, self.up, self.down = nn.Conv3d(2, 2, 1), nn.Conv3d(2, 2, 1), nn.BatchNorm3d(2)

    def trunk(self, image):
        self.seen.append(len(image))
        return [F.avg_pool3d(image, stride) for stride in self.strides]

    def set_head(self, num_outputs):
        self.out = nn.Conv3d(self.width, num_outputs, 1)


def test_masked_voxels_hold_the_token_and_no_other_voxel_changes():
    image, token = torch.randn(2, 2, 4, 4, 2), torch.tensor([5.0, -7.0])
    mask = torch.zeros(2, 1, 4, 4, 2, dtype=torch.bool)
    mask[0, 0, 1, 2, 0] = mask[1, 0, 3] = True
    expected = image.clone()
    expected[0, :, 1, 2, 0] = token
    expected[1, :, 3] = token[:, None, None]
    assert torch.equal(Pooled().encode_masked(image, mask, token)[0], expected)


@pytest.mark.parametrize(("inside", "passes"), [(False, [3]), (True, [6])])
def test_two_encodings_share_what_they_may_and_draw_their_own_dropout(inside, passes):
    torch.manual_seed(0)
    backbone, image = Pooled(0.5, inside), torch.randn(3, 2, 16, 16, 8)
    first, second = backbone.encode_twice(image)
    assert backbone.seen == passes
    plain = [F.avg_pool3d(image, stride) for stride in STRIDES]
    for both in (first, second):
        assert all(torch.equal(a, b) for a, b in zip(both[:2], plain[:2], strict=True))
        kept = both[2] != 0
        torch.testing.assert_close(both[2][kept], 2 * plain[2][kept])
        assert 0.3 < kept.float().mean() < 0.7
    assert not torch.equal(first[2], second[2])
    backbone.eval()
    for both in backbone.encode_twice(image):
        assert torch.equal(both[2], plain[2])


def test_a_cropped_pyramid_is_the_pyramid_of_the_cropped_image():
    image = torch.randn(2, 2, 12, 8, 6, requires_grad=True)
    pyramid = Pooled().encode(image)
    inside = image[:, :, 4:12, 0:4, 2:4]
    found = crop(pyramid, STRIDES, (4, 0, 2), (8, 4, 2))
    for level, stride in zip(found, STRIDES, strict=True):
        torch.testing.assert_close(level, F.avg_pool3d(inside, stride))
    sum(level.square().sum() for level in found).backward()
    outside = torch.ones(12, 8, 6, dtype=torch.bool)
    outside[4:12, 0:4, 2:4] = False
    assert not image.grad[:, :, outside].any()
    assert image.grad[:, :, ~outside].all()
    assert all(a is b for a, b in zip(crop(pyramid, STRIDES, (0, 0, 0), (12, 8, 6)), pyramid, strict=True))


@pytest.mark.parametrize(
    ("origin", "size", "says"),
    [
        ((2, 0, 0), (4, 4, 2), "multiple of the deepest stride"),
        ((0, 0, 0), (4, 4, 3), "multiple of the deepest stride"),
        ((8, 0, 0), (8, 4, 2), "leaves the image"),
        ((-4, 0, 0), (8, 4, 2), "leaves the image"),
        ((0, 0, 0), (0, 4, 2), "leaves the image"),
    ],
)
def test_a_region_off_the_grid_or_outside_is_refused(origin, size, says):
    with pytest.raises(ValueError, match=says):
        crop(Pooled().encode(torch.zeros(1, 2, 12, 8, 6)), STRIDES, origin, size)


def test_an_inflated_convolution_gives_equal_channels_what_one_channel_gave():
    weight, image = torch.randn(5, 1, 3, 3, 3), torch.randn(1, 1, 6, 6, 6)
    four = inflate(weight, torch.Size((5, 4, 3, 3, 3)))
    assert four.shape == (5, 4, 3, 3, 3)
    torch.testing.assert_close(
        F.conv3d(image.repeat(1, 4, 1, 1, 1), four), F.conv3d(image, weight), atol=1e-5, rtol=1e-5
    )
    for other in (torch.Size((6, 4, 3, 3, 3)), torch.Size((5, 1, 3, 3, 3)), torch.Size((5, 4))):
        assert inflate(weight, other) is weight


def test_every_tensor_belongs_to_one_part():
    backbone = Pooled()
    backbone.set_head(3)
    found = {part: set(backbone.part_weights((part,))) for part in backbone.parts}
    assert found["encoder"] == {"stem.weight", "stem.bias"}
    assert "down.running_mean" in found["decoder"]
    assert found["head"] == {"out.weight", "out.bias"}
    assert set.union(*found.values()) == set(backbone.state_dict())
    assert sum(map(len, found.values())) == len(backbone.state_dict())
    with pytest.raises(KeyError, match=r"Pooled.parts does not say which part owns 'other.weight'"):
        backbone.part_of("other.weight")
