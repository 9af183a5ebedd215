"""MedNeXt as a backbone, with the modules and keys of MONAI."""

from typing import Any, Literal

from monai.networks.nets.mednext import MedNeXt as MonaiMedNeXt
from monai.networks.nets.mednext import MedNeXtOutBlock
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings

LEVELS = 5
# Expansion ratios of encoder, bottleneck and decoder, and numbers of blocks of the same, as MONAI has them.
VARIANTS: dict[str, dict[str, Any]] = {
    "S": {
        "encoder_expansion_ratio": (2, 2, 2, 2),
        "bottleneck_expansion_ratio": 2,
        "decoder_expansion_ratio": (2, 2, 2, 2),
    },
    "B": {
        "encoder_expansion_ratio": (2, 3, 4, 4),
        "bottleneck_expansion_ratio": 4,
        "decoder_expansion_ratio": (4, 4, 3, 2),
    },
    "M": {
        "encoder_expansion_ratio": (2, 3, 4, 4),
        "bottleneck_expansion_ratio": 4,
        "decoder_expansion_ratio": (4, 4, 3, 2),
        "blocks_down": (3, 4, 4, 4),
        "blocks_bottleneck": 4,
        "blocks_up": (4, 4, 4, 3),
    },
    "L": {
        "encoder_expansion_ratio": (3, 4, 8, 8),
        "bottleneck_expansion_ratio": 8,
        "decoder_expansion_ratio": (8, 8, 4, 3),
        "blocks_down": (3, 4, 8, 8),
        "blocks_bottleneck": 8,
        "blocks_up": (8, 8, 4, 3),
    },
}


class MedNeXt(Backbone):
    """ConvNeXt blocks in a U-Net of five levels, stride 16 (keys of MONAI's MedNeXt)."""

    name = "mednext"
    reference = "Roy et al. 2023, arXiv:2303.09975; MONAI MedNeXt"
    presets = {
        "check": {"backbone.filters": 4},
        "demo": {"backbone.filters": 8},
        "fewshot": {"backbone.filters": 8},
        "small": {"backbone.filters": 16},
    }
    parts = {
        "encoder": ("stem", "enc_stages", "down_blocks", "bottleneck"),
        "decoder": ("up_blocks", "dec_stages"),
        "head": ("out_0",),
    }
    strides = tuple((2**level,) * 3 for level in range(LEVELS))

    # MONAI's modules under MONAI's names. `__init__` takes them from MONAI's network.
    stem: nn.Module
    enc_stages: nn.ModuleList
    down_blocks: nn.ModuleList
    bottleneck: nn.Module
    up_blocks: nn.ModuleList
    dec_stages: nn.ModuleList

    class Config(Settings):
        """Settings of the network: size, channels, kernel, dropout."""

        size: Literal["S", "B", "M", "L"] = Field(
            "S", description="numbers of blocks and expansion ratios, as in MONAI"
        )
        filters: PositiveInt = Field(32, description="channels of the first level; MONAI's 32")
        kernel: Literal[3, 5, 7] = Field(3, description="edge of the depthwise kernels; MONAI's 3")
        dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")

    config: Config

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__(config, in_channels, dropout=config.dropout)
        self.channels = tuple(config.filters * 2**level for level in range(LEVELS))
        self.width = config.filters
        self.dropout_inside = False
        network = MonaiMedNeXt(in_channels=in_channels, **self._arguments)
        for name in (*self.parts["encoder"], *self.parts["decoder"]):
            self.add_module(name, getattr(network, name))

    @property
    def _arguments(self) -> dict[str, Any]:
        """Arguments of MONAI's network, without channels of image and output."""
        config = self.config
        own = {"init_filters": config.filters, "kernel_size": config.kernel, "use_residual_connection": True}
        return own | VARIANTS[config.size]

    def set_head(self, num_outputs: int) -> None:
        """Attach a new head: one transposed 1x1x1 convolution, as in MONAI."""
        self.out_0 = MedNeXtOutBlock(in_channels=self.width, n_classes=num_outputs, dim="3d")

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]]:
        """MONAI's `MedNeXt` and its arguments. It has the same keys and outputs."""
        return "MedNeXt", {"in_channels": self.in_channels, "out_channels": num_outputs, **self._arguments}

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> five levels, fine to coarse, strides 1 to 16."""
        features, pyramid = self.stem(image), []
        for stage, down in zip(self.enc_stages, self.down_blocks, strict=True):
            pyramid.append(stage(features))
            features = down(pyramid[-1])
        return [*pyramid, self.bottleneck(features)]

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        *skips, features = pyramid
        for up, stage, skip in zip(self.up_blocks, self.dec_stages, reversed(skips), strict=True):
            features = stage(up(features) + skip)
        return features
