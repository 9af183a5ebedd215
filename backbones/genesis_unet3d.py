"""The 3D U-Net of Models Genesis and TransVW, under the key names of their published weights."""

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings


class GenesisUNet3D(Backbone):
    """The four-level 3D U-Net of Models Genesis and TransVW, stride 8 (keys of their published weights).

    Source: Zhou et al. 2021, repository MrGiovanni/ModelsGenesis (`pytorch/unet3d.py`); TransVW's network is the same with a
    classification head. Every convolution is followed by batch norm that uses the batch's statistics in evaluation too, and
    ReLU: what a window gives depends on the windows beside it. `norm="running"` has the usual evaluation instead. The
    published head ends in a sigmoid, which belongs to restoration and not to this head.
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

    class Config(Settings):
        first: PositiveInt = Field(32, description="channels of the first convolution; published weights have 32")
        norm: str = Field(
            "batch", pattern="^(batch|running)$", description="statistics in evaluation; published: batch"
        )
        dropout: float = Field(0.1, ge=0, lt=1, description="on the deepest features, after the trunk; SimCSE's 0.1")

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
        self.out_tr = Head(self.width, num_outputs)

    def trunk(self, image: Tensor) -> Pyramid:
        pyramid = [self.down_tr64(image)]
        for down in (self.down_tr128, self.down_tr256, self.down_tr512):
            pyramid.append(down(F.max_pool3d(pyramid[-1], 2)))
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        *skips, features = pyramid
        for up, skip in zip((self.up_tr256, self.up_tr128, self.up_tr64), reversed(skips), strict=True):
            features = up(features, skip)
        return features


class BatchStatisticsNorm(nn.BatchNorm3d):
    """Batch norm that normalises by the batch at hand, in evaluation too if `always`; the published `ContBatchNorm3d`.

    The running statistics exist, so that published weights load whole, and are updated in training only.
    """

    def __init__(self, channels: int, always: bool) -> None:
        super().__init__(channels)
        self.always = always

    def forward(self, features: Tensor) -> Tensor:
        if self.training or not self.always:
            return super().forward(features)
        return F.batch_norm(features, None, None, self.weight, self.bias, training=True, eps=self.eps)


class Convolution(nn.Module):
    """Convolution, norm, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, always: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.bn1 = BatchStatisticsNorm(out_channels, always)

    def forward(self, features: Tensor) -> Tensor:
        return F.relu(self.bn1(self.conv1(features)))


class Down(nn.Module):
    """Two convolutions; the second doubles the channels."""

    def __init__(self, in_channels: int, channels: int, always: bool) -> None:
        super().__init__()
        self.ops = nn.Sequential(
            Convolution(in_channels, channels, always), Convolution(channels, 2 * channels, always)
        )

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.ops(features)
        return out


class Up(nn.Module):
    """Upsample, put the skip connection behind it, two convolutions."""

    def __init__(self, in_channels: int, channels: int, always: bool) -> None:
        super().__init__()
        self.up_conv = nn.ConvTranspose3d(in_channels, in_channels, kernel_size=2, stride=2)
        self.ops = nn.Sequential(
            Convolution(in_channels + channels, channels, always), Convolution(channels, channels, always)
        )

    def forward(self, features: Tensor, skip: Tensor) -> Tensor:
        out: Tensor = self.ops(torch.cat([self.up_conv(features), skip], dim=1))
        return out


class Head(nn.Module):
    """One 1x1x1 convolution."""

    def __init__(self, in_channels: int, num_outputs: int) -> None:
        super().__init__()
        self.final_conv = nn.Conv3d(in_channels, num_outputs, kernel_size=1)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.final_conv(features)
        return logits
