"""Masked autoencoding in a dense form that convolutional and hierarchical networks can compute (He et al. 2022)."""

from math import prod

import torch
import torch.nn.functional as F
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
from methods.simmim import masked_mean


class MAE(Method):
    """Restore 75 % masked patches, set to 0, through the whole network; squared error on the masked voxels.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (ratio 0.75, section 4.1; squared
    error on masked patches, section 3). MAE drops masked tokens from the encoder, which only a plain transformer can do.
    This class is the dense form. Wald et al. ("Revisiting MAE pre-training for 3D medical image segmentation",
    arXiv:2410.23132) found that it serves 3D segmentation well. Masked voxels are set to 0, the network uses its own
    encoder and decoder, and masking saves no computation. `densify` adds the second half of SparK (Tian et al.,
    "Designing BERT for Convolutional Networks", ICLR 2023, section 3.2): a learned token replaces the features under
    masked patches at every level of the pyramid, so that the decoder gets nothing that the encoder invented there.

    Deviations:
      * With `densify` the encoder's convolutions stay dense, while SparK's are sparse. Near the border of a mask they
        see its zeros.
      * A patch is masked in all modalities at once. Its edge is 16, as in the other masked methods here (SparK: 32 of
        224).
      * `normalise_patches` is off, as in Wald et al. MAE found that normalised patches gain half a point on ImageNet.
    """

    name = "mae"
    unit_range = False
    reference = "He et al. 2022, arXiv:2111.06377; Wald et al. 2024, arXiv:2410.23132; SparK, arXiv:2301.03580"

    class Config(Settings):
        """Settings of MAE: masking, tokens on every level, normalised targets."""

        mask_ratio: float = Field(0.75, gt=0, lt=1, description="share of patches masked; MAE section 4.1")
        patch: Size3 = Field((16, 16, 16), description="edge of a masked patch in voxels; the other methods' here")
        densify: bool = Field(False, description="learned tokens at masked positions of every level; SparK section 3.2")
        normalise_patches: bool = Field(
            False, description="targets with mean 0 and deviation 1 per patch; MAE table 1d"
        )

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.predict = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)
        if config.densify:
            self.tokens = nn.ParameterList(torch.randn(width) * 0.02 for width in backbone.channels)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if the patches do not fit the crop or, with `densify`, the deepest stride."""
        config, stride = self.config, self.backbone.stride
        num_masked(crop, config.patch, config.mask_ratio)
        if config.densify and any(edge % step for edge, step in zip(config.patch, stride, strict=True)):
            raise UserError(
                f"method.densify=true needs method.patch to be a multiple of the deepest stride {size_text(stride)} "
                f"of backbone {self.backbone.name!r}, it is {size_text(config.patch)}: set it to one"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `reconstruction`, mean squared error over the masked voxels."""
        mask, restored = self.restore(batch["image"])
        target = self._normalised(batch["image"]) if self.config.normalise_patches else batch["image"]
        return {"reconstruction": masked_mean((restored - target).square(), mask)}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The image, the masked image, and the restored image unless patches are normalised."""
        mask, restored = self.restore(batch["image"])
        images = {"image": batch["image"], "what it sees": batch["image"] * ~mask}
        # Each normalised patch has its own scale. Together they do not form an image.
        return images if self.config.normalise_patches else {**images, "what it restores": restored}

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, C, x, y, z) -> mask (N, 1, x, y, z) bool, and the predicted image (or normalised patches)."""
        config = self.config
        patches = random_patches(image, config.patch, config.mask_ratio, self.generator)
        mask = to_voxels(patches, config.patch)
        pyramid = self.backbone.encode(image * ~mask)
        if config.densify:
            pyramid = [
                torch.where(self._at_level(patches, stride), token.view(1, -1, 1, 1, 1).to(level.dtype), level)
                for level, token, stride in zip(pyramid, self.tokens, self.backbone.strides, strict=True)
            ]
        return mask, self.predict(self.backbone.decode(pyramid)).float()

    def _at_level(self, patches: Tensor, stride: Triple) -> Tensor:
        """Patch mask (N, x, y, z) -> mask (N, 1, x, y, z) at a pyramid level of this stride."""
        return to_voxels(patches, [edge // step for edge, step in zip(self.config.patch, stride, strict=True)])

    def _normalised(self, image: Tensor) -> Tensor:
        """The image (N, C, x, y, z) with mean 0 and standard deviation 1 in every patch."""
        patch = self.config.patch
        # Mean and variance are those of all values of a patch, all channels together. The variance is unbiased, as in MAE.
        number = prod(patch) * image.shape[1]
        mean = F.avg_pool3d(image, patch).mean(dim=1, keepdim=True)
        variance = F.avg_pool3d(image.square(), patch).mean(dim=1, keepdim=True) - mean.square()
        spread = (variance.clamp_min(0) * number / (number - 1) + 1e-6).sqrt()
        mean, spread = (F.interpolate(value, size=image.shape[2:], mode="nearest") for value in (mean, spread))
        return (image - mean) / spread
