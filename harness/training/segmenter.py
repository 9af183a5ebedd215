"""A segmentation network with its fine-tuning loss."""

import torch.nn.functional as F
from torch import Tensor, nn

from harness.api.backbone import Backbone
from harness.api.losses import segmentation_loss
from harness.api.method import Batch


class Segmenter(nn.Module):
    """A network with the losses of `segmentation_loss`.

    Args:
        overlapping: whether a voxel may belong to several targets.
        fixed: modules of the network that stay in evaluation mode.
        per_sample, background: as `segmentation_loss`.
    """

    def __init__(
        self,
        network: nn.Module,
        overlapping: bool,
        fixed: tuple[nn.Module, ...] = (),
        per_sample: bool = False,
        background: bool = True,
    ) -> None:
        super().__init__()
        self.network, self.overlapping, self.fixed = network, overlapping, fixed
        self.per_sample, self.background = per_sample, background

    def train(self, mode: bool = True) -> "Segmenter":
        """Set the training mode of all modules but the fixed ones, which stay in evaluation mode."""
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and `target` as the loss takes it -> two loss terms, weighted over the levels that are supervised."""
        image, target = batch["image"], batch["target"]
        if not isinstance(self.network, Backbone):
            return self._loss(self.network(image), target)
        levels = self.network.supervised_logits(image)
        weights = [0.5**number for number in range(len(levels) - 1)] + [0.0]
        losses = [self._loss(logits, _nearest(target, logits)) for logits in levels]
        if len(losses) == 1:
            return losses[0]
        pairs = list(zip(weights, losses, strict=True))
        return {
            name: sum((w * loss[name] for w, loss in pairs), image.new_zeros(())) / sum(weights) for name in losses[0]
        }

    def _loss(self, logits: Tensor, target: Tensor) -> dict[str, Tensor]:
        return segmentation_loss(logits, target, self.overlapping, self.per_sample, self.background)


def _nearest(target: Tensor, logits: Tensor) -> Tensor:
    """The target (N, C, x, y, z) at the extent of the logits, by nearest neighbours."""
    if target.shape[2:] == logits.shape[2:]:
        return target
    return F.interpolate(target.float(), logits.shape[2:], mode="nearest-exact").to(target.dtype)
