"""Losses that fine-tuning and methods share."""

import torch
from torch import Tensor

from harness.api.global_batch import total


def dice_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016, without the squares), averaged over targets; MONAI's `DiceLoss(batch=True)`.

    Summed over the batch, so that a crop without a target does not count as a failure.

    Args:
        predicted: probabilities, (N, targets, x, y, z).
        target: 0 or 1, the same shape.
    """
    axes, smooth = (0, 2, 3, 4), 1e-5
    sums = [(predicted * target).sum(dim=axes), predicted.sum(dim=axes) + target.sum(dim=axes, dtype=predicted.dtype)]
    both, each = total(torch.stack(sums))
    loss: Tensor = 1 - ((2 * both + smooth) / (each + smooth)).mean()
    return loss
