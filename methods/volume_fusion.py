"""VolumeFusion: from a blend of two crops, predict the share of each crop at every voxel (Wang et al. 2023)."""

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from harness import (
    Backbone,
    Batch,
    Method,
    Settings,
    Triple,
    UserError,
    dice_loss,
    inside_boxes,
    previous,
    random_integers,
)


class VolumeFusion(Method):
    """Pseudo-segmentation: the classes are the fusion coefficients of boxes blended in from another crop.

    Source: Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale
    Unannotated Dataset", arXiv:2306.16925, section 3.2; repository HiLab-git/PyMIC. A crop is the background, and the
    previous crop of the batch is the foreground. Boxes of the foreground are blended in with coefficients k / K. The
    class of a voxel is its k. A later box replaces an earlier one. The loss is Dice plus cross-entropy over K + 1 classes.

    Defaults (published settings): K = 4, 10 to 39 boxes, edges of 8 % to 62.5 % of the crop's edges (5..40 of 64).
    Box centres are uniform over the crop and boxes are cut at its border, as in the released code.
    Deviations:
      * The released code draws 10 to 40 boxes, which is one box more.
      * The image may have any number of channels. All modalities of a voxel have the same coefficient.
    """

    name = "volume_fusion"
    reference = "Wang et al. 2023, arXiv:2306.16925; github.com/HiLab-git/PyMIC"

    class Config(Settings):
        """Settings of VolumeFusion: number of coefficients, number and size of the boxes."""

        coefficients: int = Field(4, ge=1, description="K: coefficients 0, 1/K, ..., 1; section 3.2")
        min_boxes: int = Field(10, ge=1, description="fewest boxes; published settings")
        max_boxes: int = Field(39, ge=1, description="most boxes; published settings")
        min_edge: float = Field(
            0.08, gt=0, le=1, description="shortest edge as a share of the crop's; published settings"
        )
        max_edge: float = Field(
            0.625, gt=0, le=1, description="longest edge as a share of the crop's; published settings"
        )

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.classify = nn.Conv3d(backbone.width, config.coefficients + 1, kernel_size=1)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError for a batch of one crop, or for a minimum above its maximum."""
        config = self.config
        if batch_size < 2:
            raise UserError("volume_fusion blends two crops of a batch: set pretrain.batch_size=2 or more")
        if config.min_boxes > config.max_boxes or config.min_edge > config.max_edge:
            raise UserError(
                f"method.min_boxes={config.min_boxes} and method.min_edge={config.min_edge:g} must not exceed "
                f"method.max_boxes={config.max_boxes} and method.max_edge={config.max_edge:g}"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `dice` and `cross_entropy` of the fusion class of every voxel."""
        image = batch["image"]
        label = self.draw_label(image)
        logits = self.classify(self.backbone.decode(self.backbone.encode(self.fuse(image, label)))).float()
        classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1, 1)
        dice = dice_loss(logits.softmax(dim=1), label[:, None] == classes)
        return {"dice": dice, "cross_entropy": F.cross_entropy(logits, label)}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The image, the blended image, the class of each voxel and the predicted class, both scaled to [0, 1]."""
        image = batch["image"]
        label = self.draw_label(image)
        fused = self.fuse(image, label)
        predicted = self.classify(self.backbone.decode(self.backbone.encode(fused))).argmax(dim=1)
        classes = {"class of each voxel": label, "predicted class": predicted}
        scaled = {name: (values / label.max().clamp_min(1))[:, None] for name, values in classes.items()}
        return {"image": image, "what it sees": fused, **scaled}

    def draw_label(self, image: Tensor) -> Tensor:
        """Fusion class of every voxel, (N, x, y, z) in 0..K."""
        config, extent = self.config, image.shape[2:]
        shape, device = (len(image), config.max_boxes), image.device

        def draw_integers(low: int, high: int) -> Tensor:
            """One integer per sample and box, both bounds included."""
            return random_integers(low, high, shape, device, self.generator)

        edges = [(max(1, round(config.min_edge * n)), max(1, round(config.max_edge * n))) for n in extent]
        size = torch.stack([draw_integers(low, high) for low, high in edges], dim=-1)
        start = torch.stack([draw_integers(0, n - 1) for n in extent], dim=-1) - size // 2
        kind = draw_integers(1, config.coefficients)
        number = random_integers(config.min_boxes, config.max_boxes, (len(image), 1), device, self.generator)
        # All `max_boxes` boxes are drawn. Those beyond `number` get class -1 and change nothing.
        kind = torch.where(torch.arange(config.max_boxes, device=device) < number, kind, -1)
        in_x, in_y, in_z = inside_boxes(start, start + size, extent)
        label = torch.zeros(len(image), *extent, dtype=torch.long, device=device)
        for k in range(config.max_boxes):
            here = in_x[:, k, :, None, None] & in_y[:, k, None, :, None] & in_z[:, k, None, None, :]
            drawn = kind[:, k, None, None, None]
            label = torch.where(here & (drawn > 0), drawn, label)
        return label

    def fuse(self, image: Tensor, label: Tensor) -> Tensor:
        """Blend each crop (background) with the previous crop of the batch (foreground, with weight `label` / K)."""
        weight = label[:, None].to(image.dtype) / self.config.coefficients
        return weight * previous(image) + (1 - weight) * image
