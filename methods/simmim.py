"""SimMIM: predict masked voxels from the deepest features with one layer (Xie et al. 2022)."""

from math import prod
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from harness import (
    Backbone,
    Batch,
    Method,
    Settings,
    Size3,
    Triple,
    UserError,
    num_masked,
    random_patches,
    size_text,
    to_voxels,
)


class MaskedReconstruction(Method):
    """What methods share that predict masked voxels from the rest: L1 over the masked voxels.

    A subclass has the settings `patch` and `mask_ratio`, and implements `restore`.
    """

    config: Any

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if the patches do not fit the crop or the backbone's tokens."""
        check_patches(self.backbone, crop, self.config.patch, self.config.mask_ratio)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `reconstruction`, L1 over the masked voxels."""
        mask, restored = self.restore(batch["image"])
        return {"reconstruction": masked_mean((restored - batch["image"]).abs(), mask)}

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, C, x, y, z) -> mask (N, 1, x, y, z) bool, and the predicted image."""
        raise NotImplementedError(f"{type(self).__name__} must implement restore(image)")

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The image, the masked image, and the predicted image."""
        mask, restored = self.restore(batch["image"])
        return {"image": batch["image"], "what it sees": batch["image"] * ~mask, "what it restores": restored}


class SimMIM(MaskedReconstruction):
    """Masked image modelling with a mask token, a one-layer head and L1 on the masked voxels.

    Source: Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022,
    sections 3.1-3.3; repository microsoft/SimMIM. The loss is L1 summed over masked voxels, divided by their number
    (equation 1). The head is a 1x1x1 convolution. Its channels are the voxels under one deepest feature.

    Deviations:
      * The image has three dimensions and any number of channels. A patch is masked in all modalities at once.
      * The mask patch is 16 voxels (section 4.1: 32 pixels of 192). 32 voxels would leave few patches in a medical crop.
      * Networks without a patch embedding (convolutional ones) get the token in place of masked voxels.
      * Intensities are in [0, 1] as in all methods here, not standardised per image.
    Default: mask ratio 0.6, section 4.1.2 and its table 1.
    """

    name = "simmim"
    unit_range = False
    reference = "Xie et al. 2022, arXiv:2111.09886; github.com/microsoft/SimMIM"
    trains = ("encoder",)

    class Config(Settings):
        """Settings of SimMIM: mask ratio and mask patch."""

        mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of patches masked; section 4.1")
        patch: Size3 = Field((16, 16, 16), description="edge of a masked patch in voxels; 32 pixels in the paper")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.token = new_token(backbone)
        self.predict = VoxelHead(backbone)

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, C, x, y, z) -> mask (N, 1, x, y, z) bool, and the predicted image."""
        patch = self.config.patch
        mask = to_voxels(random_patches(image, patch, self.config.mask_ratio, self.generator), patch)
        return mask, self.predict(self.backbone.encode_masked(image, mask, self.token)[-1])


class VoxelHead(nn.Module):
    """Deepest features (N, D, x, y, z) -> voxels (N, C, x * stride, ...): one linear layer, then a rearrangement."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.stride, self.num_channels = backbone.stride, backbone.in_channels
        self.linear = nn.Conv3d(backbone.channels[-1], self.num_channels * prod(self.stride), kernel_size=1)

    def forward(self, deepest: Tensor) -> Tensor:
        """Deepest features (N, D, x, y, z) -> voxels (N, C, x * stride, y * stride, z * stride)."""
        n, _, x, y, z = deepest.shape
        a, b, c = self.stride
        blocks = self.linear(deepest).float().view(n, self.num_channels, a, b, c, x, y, z)
        return blocks.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, self.num_channels, x * a, y * b, z * c)


def new_token(backbone: Backbone) -> nn.Parameter:
    """A mask token for `Backbone.encode_masked`, drawn with standard deviation 0.02 as in SimMIM."""
    return nn.Parameter(torch.randn(backbone.token_width or backbone.in_channels) * 0.02)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of `error` (N, C, x, y, z) over the masked voxels; `mask` is (N, 1, x, y, z) bool."""
    return (error * mask).sum() / (mask.sum() * error.shape[1])


def check_patches(backbone: Backbone, crop: Triple, patch: Triple, ratio: float) -> None:
    """Raise UserError if the patches do not fit the crop or the backbone's tokens."""
    num_masked(crop, patch, ratio)
    if any(edge % backbone.token_stride for edge in patch):
        raise UserError(
            f"method.patch={size_text(patch)} is not a multiple of the {backbone.token_stride} voxels that a token "
            f"of backbone {backbone.name!r} stands for: set it to one"
        )
