"""Losses that fine-tuning and the methods share."""

import torch
import torch.nn.functional as F
from torch import Tensor

from harness.api.global_batch import total


def dice_loss(predicted: Tensor, target: Tensor, per_sample: bool = False) -> Tensor:
    """Soft Dice loss, averaged over targets: a scalar.

    It is the loss of Milletari et al. 2016 without the squares, and equals MONAI's `DiceLoss(batch=True)`. Intersections
    and sizes are summed over the whole batch (over all processes and micro-batches, too) before they are divided, so that
    a crop without a target does not count as a failure.

    Args:
        predicted: probabilities, (N, targets, x, y, z).
        target: 0 or 1, the same shape.
        per_sample: whether to divide the sums of each sample instead, and to average over samples: MONAI's
            `DiceLoss(batch=False)`, and nnU-Net's loss but for a constant.
    """
    axes, smooth = (2, 3, 4) if per_sample else (0, 2, 3, 4), 1e-5
    sums = [(predicted * target).sum(dim=axes), predicted.sum(dim=axes) + target.sum(dim=axes, dtype=predicted.dtype)]
    intersection, sizes = sums if per_sample else total(torch.stack(sums))
    loss: Tensor = 1 - ((2 * intersection + smooth) / (sizes + smooth)).mean()
    return loss


def segmentation_loss(
    logits: Tensor, target: Tensor, overlapping: bool, per_sample: bool = False, background: bool = True
) -> dict[str, Tensor]:
    """The loss of fine-tuning: soft Dice and cross-entropy, two scalars.

    MONAI's DiceCELoss is not used because it takes a softmax cross-entropy over any number of channels. That is wrong for
    targets that overlap, which need the binary cross-entropy. MONAI's DiceLoss has the same values as `dice_loss`, but it
    reads the target on the host, which makes a GPU wait in every step.

    Args:
        logits: (N, outputs, x, y, z).
        target: masks, (N, targets, x, y, z), if targets overlap; otherwise class indices, (N, 1, x, y, z).
        overlapping: whether a voxel may belong to several targets.
        per_sample: as `dice_loss`.
        background: whether soft Dice counts the background as a target. Targets that overlap have none.
    """
    logits = logits.float()
    if overlapping:
        entropy = F.binary_cross_entropy_with_logits(logits, target)
        return {"dice": dice_loss(logits.sigmoid(), target, per_sample), "cross_entropy": entropy}
    first = 0 if background else 1
    classes = torch.arange(first, logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
    entropy = F.cross_entropy(logits, target[:, 0])
    return {
        "dice": dice_loss(logits.softmax(dim=1)[:, first:], target == classes, per_sample),
        "cross_entropy": entropy,
    }
