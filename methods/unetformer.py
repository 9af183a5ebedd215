"""UNetFormer-style masked image modelling through the whole network (Hatamizadeh et al. 2022)."""

from pydantic import Field
from torch import Tensor, nn

from harness import Backbone, Settings, Size3, random_patches, to_voxels
from methods.simmim import MaskedReconstruction, VoxelHead, new_token


class UNetFormer(MaskedReconstruction):
    """Predict randomly masked volumetric tokens from the visible ones, through encoder and decoder.

    Source: Hatamizadeh, Xu, Yang, Li, Roth, Xu, "UNetFormer: A Unified Vision Transformer Model and Pre-Training
    Framework for 3D Medical Image Segmentation", arXiv:2204.00631; HybridMIM (section II-C) compares with it and
    says that the whole structure, encoder and decoder, reconstructs the masked sub-volumes. That is the default here.
    (HybridMIM's reference [15] names another UNetFormer by mistake.) `encoder_only` pre-trains the encoder alone, with
    one layer on the deepest features. The paper's abstract can be read that way.

    The code is no longer public. These settings come from third-party summaries and could not be checked against it:
    mask ratio 0.4, mask patch 16, a learnable mask token, L1 on masked voxels as in SimMIM.

    Deviations:
      * Any backbone can be used. The paper uses its own 3D Swin encoder with its own decoders.
      * Networks without a patch embedding (convolutional ones) get the token in place of masked voxels.
      * Deep supervision (weights 1 / 0.5 / 0.25 in the paper's fine-tuning) is left out, because fine-tuning is the
        same for all methods here.
    """

    name = "unetformer"
    reference = "Hatamizadeh et al. 2022, arXiv:2204.00631"
    trains: tuple[str, ...] = ("encoder", "decoder")

    class Config(Settings):
        """Settings of UNetFormer: masking, and whether the encoder is pre-trained alone."""

        mask_ratio: float = Field(0.4, gt=0, lt=1, description="share of patches masked; third-party summaries")
        patch: Size3 = Field((16, 16, 16), description="edge of a masked patch in voxels; third-party summaries")
        encoder_only: bool = Field(False, description="one layer on the deepest features instead of the decoder")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.token = new_token(backbone)
        if config.encoder_only:
            self.trains = ("encoder",)
            self.predict: nn.Module = VoxelHead(backbone)
        else:
            self.predict = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)

    def restore(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Image (N, C, x, y, z) -> mask (N, 1, x, y, z) bool, and the predicted image."""
        patch = self.config.patch
        mask = to_voxels(random_patches(image, patch, self.config.mask_ratio, self.generator), patch)
        pyramid = self.backbone.encode_masked(image, mask, self.token)
        features = pyramid[-1] if self.config.encoder_only else self.backbone.decode(pyramid)
        return mask, self.predict(features).float()
