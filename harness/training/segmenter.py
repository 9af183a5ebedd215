"""A segmentation network with its fine-tuning loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.api.losses import dice_loss
from harness.api.method import Batch


class Segmenter(nn.Module):
    """A network with the Dice and cross-entropy losses.

    MONAI's DiceCELoss is not used because it takes a softmax cross-entropy over any number of channels. That is wrong for
    targets that overlap, which need the binary cross-entropy. MONAI's DiceLoss has the same values as `dice_loss`, but it
    reads the target on the host, which makes a GPU wait in every step.

    Args:
        overlapping: whether a voxel may belong to several targets.
        fixed: modules of the network that stay in evaluation mode.
    """

    def __init__(self, network: nn.Module, overlapping: bool, fixed: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.network, self.overlapping, self.fixed = network, overlapping, fixed

    def train(self, mode: bool = True) -> "Segmenter":
        """Set the training mode of all modules but the fixed ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, ...) and `target`, masks (N, targets, ...) or class indices (N, 1, ...) -> two loss terms."""
        logits, target = self.network(batch["image"]).float(), batch["target"]
        if self.overlapping:
            entropy = F.binary_cross_entropy_with_logits(logits, target)
            return {"dice": dice_loss(logits.sigmoid(), target), "cross_entropy": entropy}
        classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
        entropy = F.cross_entropy(logits, target[:, 0])
        return {"dice": dice_loss(logits.softmax(dim=1), target == classes), "cross_entropy": entropy}
