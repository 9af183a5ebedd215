"""The Dice loss against MONAI's, and by hand."""

import pytest
import torch
from monai.losses import DiceLoss

from harness import dice_loss, segmentation_loss
from harness.api.global_batch import BatchParts, batch_parts


def example(seed=0):
    torch.manual_seed(seed)
    predicted = torch.rand(3, 2, 5, 4, 6, dtype=torch.float64, requires_grad=True)
    return predicted, (torch.rand(3, 2, 5, 4, 6) > 0.7).double()


def test_value_and_gradient_are_those_of_monai():
    predicted, target = example()
    found = dice_loss(predicted, target)
    (slope,) = torch.autograd.grad(found, predicted)
    expected = DiceLoss(batch=True, smooth_nr=1e-5, smooth_dr=1e-5)(predicted, target)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(slope, torch.autograd.grad(expected, predicted)[0])


def test_by_hand():
    half = torch.zeros(1, 1, 2, 2, 2)
    half[0, 0, 0] = 1
    assert float(dice_loss(half, half)) == pytest.approx(0, abs=1e-6)
    assert float(dice_loss(1 - half, half)) == pytest.approx(1, abs=1e-5)
    # 4 voxels in common, 8 and 4 in each: 2 * 4 / 12.
    assert float(dice_loss(torch.ones_like(half), half)) == pytest.approx(1 - 8 / 12, abs=1e-5)
    assert float(dice_loss(torch.zeros_like(half), torch.zeros_like(half))) == pytest.approx(0, abs=1e-6)


def test_a_crop_without_the_target_is_no_failure():
    target = torch.zeros(2, 1, 4, 4, 4)
    target[0, 0, :2] = 1
    predicted = target.clone()
    predicted[1, 0, 0, 0, 0] = 0.5  # a little in the crop that has nothing
    assert float(dice_loss(predicted, target)) < 0.02


def test_a_target_of_numbers_or_of_truth_is_the_same():
    predicted, target = example(1)
    assert torch.equal(dice_loss(predicted, target), dice_loss(predicted, target.bool()))


def test_parts_have_the_loss_of_the_whole_batch():
    predicted, target = example(2)
    whole, parts = dice_loss(predicted, target), BatchParts(micro_batches=3)
    with batch_parts(parts), torch.no_grad():
        for number in range(3):
            parts.begin(number, recording=True)
            dice_loss(predicted[number : number + 1], target[number : number + 1])
        parts.previous_records = parts.recorded
        for number in range(3):
            parts.begin(number)
            torch.testing.assert_close(dice_loss(predicted[number : number + 1], target[number : number + 1]), whole)


def test_per_sample_is_monais_loss_without_batch():
    predicted, target = example()
    found = dice_loss(predicted, target, per_sample=True)
    torch.testing.assert_close(found, DiceLoss(batch=False, smooth_nr=1e-5, smooth_dr=1e-5)(predicted, target))
    assert not torch.isclose(found, dice_loss(predicted, target))


@pytest.mark.parametrize("background", [True, False])
def test_the_background_counts_in_dice_or_not(background):
    torch.manual_seed(1)
    logits, target = torch.randn(2, 3, 4, 5, 6), torch.randint(3, (2, 1, 4, 5, 6))
    found = segmentation_loss(logits, target, overlapping=False, per_sample=True, background=background)
    monai = DiceLoss(include_background=background, softmax=True, to_onehot_y=True, smooth_nr=1e-5, smooth_dr=1e-5)
    torch.testing.assert_close(found["dice"], monai(logits, target))
    torch.testing.assert_close(found["cross_entropy"], torch.nn.functional.cross_entropy(logits, target[:, 0]))


def test_targets_that_overlap_have_no_background_to_leave_out():
    torch.manual_seed(1)
    logits, target = torch.randn(2, 3, 4, 5, 6), (torch.rand(2, 3, 4, 5, 6) > 0.5).float()
    with_it, without = (segmentation_loss(logits, target, True, background=value) for value in (True, False))
    assert with_it == without
