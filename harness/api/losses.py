"""Losses that fine-tuning and the methods share."""

import torch
from torch import Tensor

from harness.api.global_batch import total


def dice_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss, averaged over targets: a scalar.

    It is the loss of Milletari et al. 2016 without the squares, and equals MONAI's `DiceLoss(batch=True)`. Intersections
    and sizes are summed over the whole batch (over all processes and micro-batches, too) before they are divided, so that
    a crop without a target does not count as a failure.

    Args:
        predicted: probabilities, (N, targets, x, y, z).
        target: 0 or 1, the same shape.
    """
    axes, smooth = (0, 2, 3, 4), 1e-5
    sums = [(predicted * target).sum(dim=axes), predicted.sum(dim=axes) + target.sum(dim=axes, dtype=predicted.dtype)]
    intersection, sizes = total(torch.stack(sums))
    loss: Tensor = 1 - ((2 * intersection + smooth) / (sizes + smooth)).mean()
    return loss
