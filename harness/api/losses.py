"""Losses that fine-tuning and the methods share."""

import torch
import torch.nn.functional as F
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


def segmentation_loss(logits: Tensor, target: Tensor, overlapping: bool) -> dict[str, Tensor]:
    """The loss of fine-tuning: soft Dice and cross-entropy, two scalars.

    MONAI's DiceCELoss is not used because it takes a softmax cross-entropy over any number of channels. That is wrong for
    targets that overlap, which need the binary cross-entropy. MONAI's DiceLoss has the same values as `dice_loss`, but it
    reads the target on the host, which makes a GPU wait in every step.

    Args:
        logits: (N, outputs, x, y, z).
        target: masks, (N, targets, x, y, z), if targets overlap; otherwise class indices, (N, 1, x, y, z).
        overlapping: whether a voxel may belong to several targets.
    """
    logits = logits.float()
    if overlapping:
        entropy = F.binary_cross_entropy_with_logits(logits, target)
        return {"dice": dice_loss(logits.sigmoid(), target), "cross_entropy": entropy}
    classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
    entropy = F.cross_entropy(logits, target[:, 0])
    return {"dice": dice_loss(logits.softmax(dim=1), target == classes), "cross_entropy": entropy}
