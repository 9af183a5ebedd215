"""Denoising pre-training: a complete method in a package of its own, outside the harness."""

import torch
from pydantic import Field

from harness import Backbone, Batch, Method, Settings, randn


class Denoise(Method):
    """Remove Gaussian noise from an image, with encoder and decoder.

    Source: Vincent et al., "Extracting and Composing Robust Features with Denoising Autoencoders", ICML 2008.
    """

    name = "denoise"
    version = "1"
    reference = "Vincent et al. 2008, doi:10.1145/1390156.1390294"
    trains = ("encoder", "decoder")

    class Config(Settings):
        """Settings of Denoise: the noise."""

        noise: float = Field(0.2, gt=0, description="standard deviation, intensities are in [0, 1]")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.restore = torch.nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """`image` (N, C, x, y, z) -> `restoration`, the mean squared error over all voxels."""
        image = batch["image"]
        noise = randn(image.shape, image.device, self.generator)
        features = self.backbone.decode(self.backbone.encode(image + self.config.noise * noise))
        return {"restoration": (self.restore(features).float() - image).square().mean()}
