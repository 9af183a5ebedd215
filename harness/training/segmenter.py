"""A segmentation network with its fine-tuning loss."""

from torch import Tensor, nn

from harness.api.losses import segmentation_loss
from harness.api.method import Batch


class Segmenter(nn.Module):
    """A network with the losses of `segmentation_loss`.

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
        """`image` and `target` as the loss takes it -> two loss terms."""
        return segmentation_loss(self.network(batch["image"]), batch["target"], self.overlapping)
