"""Masks: as many as asked for, everywhere alike, and the same voxels as NumPy marks."""

import itertools

import numpy as np
import pytest
import torch

from harness import UserError, any_box, inside_boxes, num_masked, random_integers, random_patches, to_voxels

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("extent", "patch", "ratio", "counts"),
    [
        ((96, 96, 96), (16, 16, 16), 0.4, (87, 216)),  # 129.6 kept, rounded down
        ((10, 1, 1), (1, 1, 1), 0.9, (9, 10)),  # 10 * (1 - 0.9) is a little less than 1
        ((32, 16, 64), (16, 8, 16), 0.75, (12, 16)),
    ],
)
def test_how_many_are_masked(extent, patch, ratio, counts):
    assert num_masked(extent, patch, ratio) == counts


@pytest.mark.parametrize(
    ("extent", "ratio", "says"),
    [
        ((33, 32, 32), 0.5, r"16,16,16 does not divide the crop 33,32,32: set pretrain.crop"),
        ((32, 32, 32), 0.0, "masks 0 of the 8 patches"),
        ((32, 32, 32), 1.0, "masks 8 of the 8 patches"),
    ],
)
def test_a_mask_that_hides_all_or_nothing_is_refused(extent, ratio, says):
    with pytest.raises(UserError, match=says):
        num_masked(extent, (16, 16, 16), ratio)


def test_every_sample_has_as_many_masked_patches_and_every_patch_its_turn():
    image = torch.zeros(4000, 1, 4, 6, 2)
    masks = random_patches(image, (2, 3, 1), 0.3, torch.Generator().manual_seed(0))
    assert masks.shape == (4000, 2, 2, 2)
    assert masks.flatten(1).sum(dim=1).tolist() == [3] * 4000  # 5.6 of 8 kept, rounded down
    share = masks.float().mean(dim=0)
    assert (share - 3 / 8).abs().max() < 0.04
    assert len({tuple(mask) for mask in masks.flatten(1).tolist()}) == 56  # all choices of 3 of 8


def test_patches_become_voxels_as_a_kronecker_product():
    patches = torch.rand(2, 3, 2, 4) > 0.5
    voxels = to_voxels(patches, (2, 5, 3))
    for mask, found in zip(patches.numpy(), voxels.numpy(), strict=True):
        assert np.array_equal(found[0], np.kron(mask, np.ones((2, 5, 3), dtype=bool)))


def test_boxes_are_those_of_slices():
    start = torch.tensor([[[0, 1, 2], [3, 3, 0]], [[1, 1, 1], [-2, 0, 0]]])
    stop = torch.tensor([[[2, 4, 5], [4, 4, 9]], [[1, 4, 4], [2, 1, 2]]])
    extent, expected = (4, 5, 6), np.zeros((2, 2, 4, 5, 6), dtype=bool)
    for n, k in itertools.product(range(2), range(2)):
        expected[
            (n, k, *(slice(max(0, a), b) for a, b in zip(start[n, k].tolist(), stop[n, k].tolist(), strict=True)))
        ] = 1
    assert np.array_equal(any_box(start, stop, extent).numpy()[:, 0], expected.any(axis=1))
    x, y, z = inside_boxes(start, stop, extent)
    assert np.array_equal(np.einsum("nkx,nky,nkz->nkxyz", x, y, z), expected)


def test_whole_numbers_reach_both_bounds_and_no_further():
    generator = torch.Generator().manual_seed(0)
    drawn = random_integers(-1, 2, (3000, 2), CPU, generator)
    assert drawn.dtype == torch.int64
    shares = torch.stack([(drawn == value).float().mean() for value in (-1, 0, 1, 2)])
    assert float(shares.sum()) == 1
    assert (shares - 0.25).abs().max() < 0.03
    low, high = torch.tensor([[0, 5, 7]]).expand(500, 3), torch.tensor([[0, 6, 9]]).expand(500, 3)
    found = random_integers(low, high, (500, 3), CPU, generator)
    assert [set(column.tolist()) for column in found.T] == [{0}, {5, 6}, {7, 8, 9}]
    # 2**25 steps: the product of a draw just below 1 rounds up to the bound that it must stay below.
    assert int(random_integers(0, 2**25 - 1, (200_000,), CPU, generator).max()) <= 2**25 - 1
