"""The 3D U-Net of Models Genesis and TransVW, under the key names of their published weights."""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings


class GenesisUNet3D(Backbone):
    """The four-level 3D U-Net of Models Genesis and TransVW, stride 8 (keys of their published weights).

    Source: Zhou et al. 2021, repository MrGiovanni/ModelsGenesis (`pytorch/unet3d.py`). TransVW's network is the same
    with a classification head. Every convolution is followed by batch norm and ReLU. The batch norm uses the batch's
    statistics in evaluation too, so the output for a window depends on the other windows of its batch. `norm="running"`
    selects the usual evaluation instead. The published head ends in a sigmoid, which belongs to the restoration task, so
    this head has none.
    """

    name = "genesis_unet3d"
    reference = "Zhou et al. 2021, doi:10.1016/j.media.2020.101840; github.com/MrGiovanni/ModelsGenesis"
    presets = {"check": {"backbone.first": 4}, "demo": {"backbone.first": 8}, "small": {"backbone.first": 16}}
    parts = {
        "encoder": ("down_tr64", "down_tr128", "down_tr256", "down_tr512"),
        "decoder": ("up_tr256", "up_tr128", "up_tr64"),
        "head": ("out_tr",),
    }
    strides = tuple((2**level,) * 3 for level in range(4))
    abilities = frozenset({"sparse"})

    class Config(Settings):
        """Settings of the network: channels, norm, dropout."""

        first: PositiveInt = Field(32, description="channels of the first convolution; published weights have 32")
        norm: str = Field(
            "batch", pattern="^(batch|running)$", description="statistics in evaluation; published: batch"
        )
        dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__(config, in_channels, dropout=config.dropout)
        f, always = config.first, config.norm == "batch"
        self.channels = (2 * f, 4 * f, 8 * f, 16 * f)
        self.width = 2 * f
        self.dropout_inside = False
        self.down_tr64 = Down(in_channels, f, always)
        self.down_tr128 = Down(2 * f, 2 * f, always)
        self.down_tr256 = Down(4 * f, 4 * f, always)
        self.down_tr512 = Down(8 * f, 8 * f, always)
        self.up_tr256 = Up(16 * f, 8 * f, always)
        self.up_tr128 = Up(8 * f, 4 * f, always)
        self.up_tr64 = Up(4 * f, 2 * f, always)

    def set_head(self, num_outputs: int) -> None:
        """Attach a new head: one 1x1x1 convolution."""
        self.out_tr = Head(self.width, num_outputs)

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> four levels, fine to coarse, strides 1 to 8."""
        pyramid = [self.down_tr64(image)]
        for down in (self.down_tr128, self.down_tr256, self.down_tr512):
            pyramid.append(down(F.max_pool3d(pyramid[-1], 2)))
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        *skips, features = pyramid
        for up, skip in zip((self.up_tr256, self.up_tr128, self.up_tr64), reversed(skips), strict=True):
            features = up(features, skip)
        return features


class BatchStatisticsNorm(nn.BatchNorm3d):
    """Batch norm that uses the statistics of the current batch, in evaluation too if `always`.

    It is the published `ContBatchNorm3d`. The running statistics exist so that published weights load completely. They are
    updated in training only.
    """

    def __init__(self, channels: int, always: bool) -> None:
        super().__init__(channels)
        self.always = always

    def forward(self, features: Tensor) -> Tensor:
        """(N, channels, x, y, z) -> the same shape, normalised."""
        if self.training or not self.always:
            return super().forward(features)
        return F.batch_norm(features, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Convolution(nn.Module):
    """A 3x3x3 convolution, norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, always: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn1 = BatchStatisticsNorm(out_channels, always)

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> (N, out_channels, x, y, z)."""
        return F.relu(self.bn1(self.conv1(features)))


class Down(nn.Module):
    """Two convolutions. The second one doubles the channels."""

    def __init__(self, in_channels: int, channels: int, always: bool) -> None:
        super().__init__()
        self.ops = nn.Sequential(
            Convolution(in_channels, channels, always), Convolution(channels, 2 * channels, always)
        )

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> (N, 2 * channels, x, y, z)."""
        out: Tensor = self.ops(features)
        return out


class Up(nn.Module):
    """Upsampling by 2, concatenation with the skip connection, and two convolutions."""

    def __init__(self, in_channels: int, channels: int, always: bool) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(in_channels, in_channels, kernel_size=2, stride=2)
        self.ops = nn.Sequential(
            Convolution(in_channels + channels, channels, always), Convolution(channels, channels, always)
        )

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        """Features (N, in_channels, x, y, z) and `skip` at twice their extent -> (N, channels, 2x, 2y, 2z)."""
        out: Tensor = self.ops(torch.cat([self.up_conv(features), skip], dim=1))
        return out


class Head(nn.Module):
    """The segmentation head: one 1x1x1 convolution."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.final_conv = nn.Conv3d(in_channels, num_outputs, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> logits (N, num_outputs, x, y, z)."""
        logits: Tensor = self.final_conv(features)
        return logits
