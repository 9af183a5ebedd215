"""A segmentation network under its fine-tuning loss."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.api.losses import dice_loss
from harness.api.method import Batch


class Segmenter(nn.Module):
    """A network under the Dice and cross-entropy losses.

    MONAI's DiceCELoss is not used because it takes a softmax cross-entropy over any number of channels, which is
    wrong for targets that overlap; those get the binary one. Its DiceLoss has the same values and reads the target on the
    host, which stops a GPU in every step.
    """

    def __init__(self, network: nn.Module, overlapping: bool, fixed: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.network, self.overlapping, self.fixed = network, overlapping, fixed

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for all but what is fixed."""
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, ...), `target` (N, targets, ...) or class indices (N, 1, ...) -> two loss terms."""
        logits, target = self.network(batch["image"]).float(), batch["target"]
        if self.overlapping:
            entropy = F.binary_cross_entropy_with_logits(logits, target)
            return {"dice": dice_loss(logits.sigmoid(), target), "cross_entropy": entropy}
        classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
        entropy = F.cross_entropy(logits, target[:, 0])
        return {"dice": dice_loss(logits.softmax(dim=1), target == classes), "cross_entropy": entropy}
