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
    size_text,
)


class VolumeFusion(Method):
    """Pseudo-segmentation: the classes are the fusion coefficients of boxes blended in from another crop.

    Source: Wang et al., "MIS-FM: 3D Medical Image Segmentation using Foundation Models Pretrained on a Large-Scale
    Unannotated Dataset", arXiv:2306.16925, section 3.2; repositories HiLab-git/PyMIC (`volume_fusion` of January 2024, commit
    a906dfc) and HiLab-git/PyMIC_examples (its configuration for crops of 64 x 128 x 128, commit a581dc8). A crop is the
    background, and the previous crop of the batch is the foreground. Boxes of the foreground are blended in with
    coefficients k / K. The class of a voxel is its k. A later box replaces an earlier one. The loss is Dice plus
    cross-entropy over K + 1 classes, with weight 0.5 each.

    Defaults (that configuration): K = 4, 10 to 40 boxes, edges from 8 voxels to 62.5 % of the crop's edge (8..40 of 64, 8..80
    of 128). Box centres are uniform over the crop and boxes are cut at its border.
    Deviations:
      * Since September 2024 PyMIC's class `VolumeFusion` is another task: it blends two augmented crops of one volume, in
        blocks of a grid of which 70 % are foreground. This is the earlier form, which blends two volumes.
      * The released configuration flips the crops at random. Here they are plain.
      * The image may have any number of channels. All modalities of a voxel have the same coefficient.
      * The optimizer is the harness's. Released: Adam, rate 1e-3, halved every 40,000 steps, weight decay 1e-5.
    """

    name = "volume_fusion"
    version = "2"
    reference = "Wang et al. 2023, arXiv:2306.16925; github.com/HiLab-git/PyMIC"

    class Config(Settings):
        """Settings of VolumeFusion: number of coefficients, number and size of the boxes, weights of the terms."""

        coefficients: int = Field(4, ge=1, description="K: coefficients 0, 1/K, ..., 1; section 3.2")
        min_boxes: int = Field(10, ge=1, description="fewest boxes; released configuration")
        max_boxes: int = Field(40, ge=1, description="most boxes; released configuration")
        min_edge: int = Field(8, ge=1, description="shortest edge in voxels; released configuration")
        max_edge: float = Field(
            0.625, gt=0, le=1, description="longest edge as a share of the crop's; released configuration"
        )
        dice: float = Field(0.5, ge=0, description="weight; 0 switches it off; released configuration")
        cross_entropy: float = Field(0.5, ge=0, description="weight; 0 switches it off; released configuration")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.classify = nn.Conv3d(backbone.width, config.coefficients + 1, kernel_size=1)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError for a batch of one crop, no term, or a minimum above its maximum."""
        config = self.config
        if batch_size < 2:
            raise UserError("volume_fusion blends two crops of a batch: set pretrain.batch_size=2 or more")
        if not (config.dice or config.cross_entropy):
            raise UserError(
                "volume_fusion has both terms switched off: give method.dice or method.cross_entropy above 0"
            )
        longest = min(self._longest(edge) for edge in crop)
        if config.min_boxes > config.max_boxes or config.min_edge > longest:
            raise UserError(
                f"method.min_boxes={config.min_boxes} and method.min_edge={config.min_edge} must not exceed "
                f"method.max_boxes={config.max_boxes} and the {longest} voxels that method.max_edge={config.max_edge:g} allows "
                f"in a crop of {size_text(crop)}: set them lower"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> the weighted `dice` and `cross_entropy` of the fusion class of every voxel."""
        image = batch["image"]
        label = self.draw_label(image)
        logits = self.classify(self.backbone.decode(self.backbone.encode(self.fuse(image, label)))).float()
        terms: dict[str, Tensor] = {}
        if self.config.dice:
            classes = torch.arange(logits.shape[1], device=label.device).view(1, -1, 1, 1, 1)
            terms["dice"] = self.config.dice * dice_loss(logits.softmax(dim=1), label[:, None] == classes)
        if self.config.cross_entropy:
            terms["cross_entropy"] = self.config.cross_entropy * F.cross_entropy(logits, label)
        return terms

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

        size = torch.stack([draw_integers(config.min_edge, self._longest(n)) for n in extent], dim=-1)
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

    def _longest(self, edge: int) -> int:
        """Longest edge of a box in voxels, for an edge of the crop."""
        return round(self.config.max_edge * edge)
