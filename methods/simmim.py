"""SimMIM: predict masked voxels from the deepest features with one layer (Xie et al. 2022)."""

from math import prod

import torch
from pydantic import Field
from torch import Tensor, nn

from harness import Backbone, Batch, Method, Settings, Size3, Triple, UserError, num_masked, random_patches, to_voxels


class SimMIM(Method):
    """Masked image modelling with a mask token, a one-layer head and L1 on the masked voxels.

    Source: Xie, Zhang, Cao, Lin, Bao, Yao, Dai, Hu, "SimMIM: A Simple Framework for Masked Image Modeling", CVPR 2022,
    sections 3.1-3.3; repository microsoft/SimMIM. Loss: L1 summed over masked voxels and divided by their number
    (equation 1). The head is a 1x1x1 convolution whose channels are the voxels under one deepest feature.

    Deviations:
      * Three dimensions, any number of channels: a patch is masked in all modalities at once.
      * Mask patch 16 (section 4.1 takes 32 pixels of 192): 32 voxels would leave few patches in a medical crop.
      * Networks without an embedding of patches (convolutional ones) get the token in the place of masked voxels.
      * Intensities are in [0, 1] as everywhere here, not standardised per image.
    Defaults: mask ratio 0.6, section 4.1.2 and its table 1.
    """

    name = "simmim"
    reference = "Xie et al. 2022, arXiv:2111.09886; github.com/microsoft/SimMIM"
    trains = ("encoder",)

    class Config(Settings):
        mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of patches masked; section 4.1")
        patch: Size3 = Field((16, 16, 16), description="edge of a masked patch in voxels; 32 pixels in the paper")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.token = new_token(backbone)
        self.predict = VoxelHead(backbone)

    def check(self, crop: Triple, batch_size: int) -> None:
        check_patches(self.backbone, crop, self.config.patch, self.config.mask_ratio)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `reconstruction`, L1 over the masked voxels."""
        mask, restored = self.restore(batch["image"])
        return {"reconstruction": masked_mean((restored - batch["image"]).abs(), mask)}

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, C, x, y, z) -> mask (N, 1, x, y, z), and the image predicted under it."""
        patch = self.config.patch
        mask = to_voxels(random_patches(image, patch, self.config.mask_ratio, self.generator), patch)
        return mask, self.predict(self.backbone.encode_masked(image, mask, self.token)[-1])

    def show(self, batch: Batch) -> dict[str, Tensor]:
        mask, restored = self.restore(batch["image"])
        return {"image": batch["image"], "what it sees": batch["image"] * ~mask, "what it restores": restored}


class VoxelHead(nn.Module):
    """Deepest features (N, D, x, y, z) -> voxels (N, C, x * stride, ...): one linear layer, then a rearrangement."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.stride, self.num_channels = backbone.stride, backbone.in_channels
        self.linear = nn.Conv3d(backbone.channels[-1], self.num_channels * prod(self.stride), kernel_size=1)

    def forward(self, deepest: Tensor) -> Tensor:
        n, _, x, y, z = deepest.shape
        a, b, c = self.stride
        cells = self.linear(deepest).float().view(n, self.num_channels, a, b, c, x, y, z)
        return cells.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(n, self.num_channels, x * a, y * b, z * c)


def new_token(backbone: Backbone) -> nn.Parameter:
    """A mask token for `Backbone.encode_masked`, normal with deviation 0.02 as SimMIM's."""
    return nn.Parameter(torch.randn(backbone.token_width or backbone.in_channels) * 0.02)


def masked_mean(error: Tensor, mask: Tensor) -> Tensor:
    """Mean of `error` (N, C, x, y, z) over the masked voxels, `mask` (N, 1, x, y, z) bool; visible ones do not count."""
    return (error * mask).sum() / (mask.sum() * error.shape[1])


def check_patches(backbone: Backbone, crop: Triple, patch: Triple, ratio: float) -> None:
    """Raises UserError where the patches do not fit the crop or the backbone's tokens."""
    num_masked(crop, patch, ratio)
    if any(edge % backbone.token_stride for edge in patch):
        raise UserError(
            f"method.patch={','.join(map(str, patch))} is not a multiple of the {backbone.token_stride} voxels that a token "
            f"of backbone {backbone.name!r} stands for: set it to one"
        )
