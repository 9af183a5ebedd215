"""SegResNet as a backbone, with the modules and keys of MONAI."""

from typing import Any

from monai.networks.blocks.segresnet_block import get_conv_layer
from monai.networks.layers.utils import get_norm_layer
from monai.networks.nets.segresnet import SegResNet as MonaiSegResNet
from pydantic import Field
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings

NORM = ("GROUP", {"num_groups": 8})


class SegResNet(Backbone):
    """Residual encoder with a light decoder, stride 8 (keys of MONAI's SegResNet, without its variational branch)."""

    name = "segresnet"
    reference = "Myronenko 2018, arXiv:1810.11654; MONAI SegResNet"
    presets = {"demo": {"backbone.init_filters": 8}, "small": {"backbone.init_filters": 16}}
    parts = {
        "encoder": ("convInit", "down_layers"),
        "decoder": ("up_layers", "up_samples"),
        "head": ("conv_final",),
    }
    strides = tuple((2**level,) * 3 for level in range(4))
    abilities = frozenset({"sparse"})

    # MONAI's modules under MONAI's names. `__init__` takes them from MONAI's network.
    convInit: nn.Module  # noqa: N815
    down_layers: nn.ModuleList
    up_layers: nn.ModuleList
    up_samples: nn.ModuleList

    class Config(Settings):
        """Settings of the network: channels and dropout."""

        init_filters: int = Field(32, gt=0, multiple_of=8, description="channels of the first level; the paper's 32")
        dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")

    config: Config

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__(config, in_channels, dropout=config.dropout)
        first = config.init_filters
        self.channels = tuple(first * 2**level for level in range(4))
        self.width = first
        self.dropout_inside = False
        network = MonaiSegResNet(init_filters=first, in_channels=in_channels, norm=NORM)
        for name in (*self.parts["encoder"], *self.parts["decoder"]):
            self.add_module(name, getattr(network, name))

    def set_head(self, num_outputs: int) -> None:
        """Attach a new head: norm, ReLU and one 1x1x1 convolution, as in MONAI."""
        self.conv_final = nn.Sequential(
            get_norm_layer(name=NORM, spatial_dims=3, channels=self.width),
            nn.ReLU(inplace=True),
            get_conv_layer(3, self.width, num_outputs, kernel_size=1, bias=True),
        )

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]]:
        """MONAI's `SegResNet` and its arguments. It has the same keys and outputs."""
        arguments = {"init_filters": self.config.init_filters, "norm": NORM}
        return "SegResNet", {"in_channels": self.in_channels, "out_channels": num_outputs, **arguments}

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> four levels, fine to coarse, strides 1 to 8."""
        features, pyramid = self.convInit(image), []
        for down in self.down_layers:
            features = down(features)
            pyramid.append(features)
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        *skips, features = pyramid
        for sample, layer, skip in zip(self.up_samples, self.up_layers, reversed(skips), strict=True):
            features = layer(sample(features) + skip)
        return features
