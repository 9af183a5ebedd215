"""Masked autoencoding in the form that convolutional and hierarchical networks allow (He et al. 2022)."""

from math import prod

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness import Backbone, Batch, Method, Settings, Size3, Triple, UserError, num_masked, random_patches, to_voxels
from methods.simmim import masked_mean


class MAE(Method):
    """Restore 75 % masked patches, set to 0, through the whole network; squared error on the masked voxels.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022 (ratio 0.75, section 4.1; squared error
    on masked patches, section 3). MAE drops masked tokens from the encoder, which only a plain transformer can do. This is
    its dense form, which Wald et al. ("Revisiting MAE pre-training for 3D medical image segmentation", arXiv:2410.23132)
    found to serve 3D segmentation well: masked voxels are 0, encoder and decoder are the network's own, and nothing is
    saved by masking. `densify` adds the second half of SparK (Tian et al., "Designing BERT for Convolutional Networks",
    ICLR 2023, section 3.2): at every level of the pyramid what lies under a masked patch is replaced by a learned token,
    so that the decoder gets nothing that the encoder made up there.

    Deviations:
      * With `densify` the encoder's convolutions stay dense, SparK's are sparse: near a mask's border they see its zeros.
      * A patch is masked in all modalities at once. Patch 16, as in the other masked methods here (SparK: 32 of 224).
      * `normalise_patches` is off, as in Wald et al.; MAE found it better by half a point on ImageNet.
    """

    name = "mae"
    reference = "He et al. 2022, arXiv:2111.06377; Wald et al. 2024, arXiv:2410.23132; SparK, arXiv:2301.03580"

    class Config(Settings):
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
        config, stride = self.config, self.backbone.stride
        num_masked(crop, config.patch, config.mask_ratio)
        if config.densify and any(edge % step for edge, step in zip(config.patch, stride, strict=True)):
            raise UserError(
                f"method.densify=true needs method.patch to be a multiple of the deepest stride {','.join(map(str, stride))} "
                f"of backbone {self.backbone.name!r}, it is {','.join(map(str, config.patch))}: set it to one"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `reconstruction`, squared error over the masked voxels."""
        mask, restored = self.restore(batch["image"])
        target = self._normalised(batch["image"]) if self.config.normalise_patches else batch["image"]
        return {"reconstruction": masked_mean((restored - target).square(), mask)}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        mask, restored = self.restore(batch["image"])
        shown = {"image": batch["image"], "what it sees": batch["image"] * ~mask}
        # Patches that are normalised on their own are no image.
        return shown if self.config.normalise_patches else {**shown, "what it restores": restored}

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, C, x, y, z) -> mask (N, 1, x, y, z), and the image (or its normalised patches) predicted under it."""
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
        return to_voxels(patches, [edge // step for edge, step in zip(self.config.patch, stride, strict=True)])

    def _normalised(self, image: Tensor) -> Tensor:
        patch = self.config.patch
        # Over all values of a patch, its channels together; the variance unbiased, as MAE's.
        number = prod(patch) * image.shape[1]
        mean = F.avg_pool3d(image, patch).mean(dim=1, keepdim=True)
        variance = F.avg_pool3d(image.square(), patch).mean(dim=1, keepdim=True) - mean.square()
        spread = (variance.clamp_min(0) * number / (number - 1) + 1e-6).sqrt()
        mean, spread = (F.interpolate(value, size=image.shape[2:], mode="nearest") for value in (mean, spread))
        return (image - mean) / spread
