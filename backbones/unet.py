"""3D U-Net made of the blocks of MONAI's BasicUNet."""

from typing import Annotated, Any

import torch
from monai.networks.nets.basic_unet import Down, TwoConv, UpCat
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings

ACTIVATION = ("LeakyReLU", {"negative_slope": 0.1, "inplace": True})
NORM = ("instance", {"affine": True})


class UNet(Backbone):
    """Five-level 3D U-Net (MONAI BasicUNet's blocks and keys), stride 16.

    Child modules have BasicUNet's names, so that its state dicts load unchanged. The default widths are those of
    HybridMIM's released network. The last pooling of that network keeps the size. Here every level halves it.
    """

    name = "unet"
    reference = "Falk et al. 2019, doi:10.1038/s41592-018-0261-2; MONAI BasicUNet"
    presets = {
        "check": {"backbone.features": (4, 4, 8, 8, 16)},
        "demo": {"backbone.features": (16, 16, 32, 64, 128)},
        "small": {"backbone.features": (32, 32, 64, 128, 256)},
    }
    parts = {
        "encoder": ("conv_0", "down_1", "down_2", "down_3", "down_4"),
        "decoder": ("upcat_4", "upcat_3", "upcat_2", "upcat_1"),
        "head": ("final_conv",),
    }
    strides = tuple((2**level,) * 3 for level in range(5))
    abilities = frozenset({"sparse"})

    class Config(Settings):
        """Settings of the network: channels and dropout."""

        features: Annotated[tuple[PositiveInt, ...], Field(min_length=5, max_length=5)] = Field(
            (64, 64, 128, 256, 512),
            description="channels of the five levels, fine to coarse; HybridMIM's released UNet",
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")
        block_dropout: float = Field(0.0, ge=0, lt=1, description="inside every convolution block; BasicUNet's 0")

    config: Config

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__(config, in_channels, dropout=config.dropout)
        self.channels = config.features
        self.width = config.features[0]
        self.dropout_inside = config.block_dropout > 0
        first, *_ = f = config.features
        style = (ACTIVATION, NORM, True, config.block_dropout)
        self.conv_0 = TwoConv(3, in_channels, first, *style)
        self.down_1 = Down(3, f[0], f[1], *style)
        self.down_2 = Down(3, f[1], f[2], *style)
        self.down_3 = Down(3, f[2], f[3], *style)
        self.down_4 = Down(3, f[3], f[4], *style)
        self.upcat_4 = UpCat(3, f[4], f[3], f[3], *style)
        self.upcat_3 = UpCat(3, f[3], f[2], f[2], *style)
        self.upcat_2 = UpCat(3, f[2], f[1], f[1], *style)
        self.upcat_1 = UpCat(3, f[1], f[0], self.width, *style, halves=False)

    def set_head(self, num_outputs: int) -> None:
        """Attach a new head: one 1x1x1 convolution."""
        self.final_conv = nn.Conv3d(self.width, num_outputs, kernel_size=1)

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]]:
        """MONAI's `BasicUNet` and its arguments. It has the same keys and outputs."""
        config = self.config
        arguments = {"spatial_dims": 3, "in_channels": self.in_channels, "out_channels": num_outputs}
        style = {"act": ACTIVATION, "norm": NORM, "dropout": config.block_dropout}
        return "BasicUNet", {**arguments, "features": (*config.features, self.width), **style}

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> five levels, fine to coarse, strides 1 to 16."""
        pyramid = [self.conv_0(image)]
        for down in (self.down_1, self.down_2, self.down_3, self.down_4):
            pyramid.append(down(pyramid[-1]))
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        *skips, features = pyramid
        for up, skip in zip((self.upcat_4, self.upcat_3, self.upcat_2, self.upcat_1), reversed(skips), strict=True):
            # MONAI's UpCat pads upsampled features to the skip's extent. Crops are multiples of the stride, so both
            # extents are equal here and nothing needs padding.
            features = up.convs(torch.cat([skip, up.upsample(features)], dim=1))
        return features
