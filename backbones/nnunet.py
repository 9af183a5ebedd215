"""nnU-Net's two U-Nets: `resenc` with residual blocks in the encoder, `plainunet` with plain convolutions.

Source: Isensee et al. 2021 (plain) and 2024 (residual encoder, arXiv:2404.09556). Key names are those of the package
`dynamic_network_architectures` without its aliases (`all_modules`, `decoder.encoder`), and with `decoder.seg_layers` as
`seg_layers`. Its kernels are in the order (z, y, x), these in the order (x, y, z).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field, PositiveInt, model_validator
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings, Triple

SLOPE = 0.01  # of the leaky ReLU, and of He's initialisation
BLOCKS = (1, 3, 4, 6)  # residual blocks of the first stages; all further ones have 6


def _per_stage(value: Any) -> Any:
    """Turn `2`, `1;2;2` or `1;1,2,2;2` into one triple of whole numbers per stage; a single number serves all stages."""
    if isinstance(value, str) or (isinstance(value, tuple | list) and all(isinstance(each, str) for each in value)):
        text = value if isinstance(value, str) else ",".join(value)
        value = [stage.split(",") for stage in text.split(";")]
    if isinstance(value, int):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    stages = [[stage] if isinstance(stage, int | str) else list(stage) for stage in value]
    return tuple(tuple(stage * 3 if len(stage) == 1 else stage) for stage in stages)


PerStage = Annotated[tuple[tuple[PositiveInt, PositiveInt, PositiveInt], ...], BeforeValidator(_per_stage)]
"""One triple (x, y, z) per stage. On the command line stages are divided by `;`, and a single number is a cube."""


class NNUNetConfig(Settings):
    """What both networks can be set to."""

    features: tuple[PositiveInt, ...] = Field(
        (32, 64, 128, 256, 320, 320), min_length=2, description="channels of the stages, fine to coarse; nnU-Net's"
    )
    strides: PerStage | None = Field(
        None, description="of the stages, `1;2;2,2,1;...`; none: 1, then 2 along every axis; the first must be 1"
    )
    kernels: PerStage | None = Field(None, description="odd edges of the stages' kernels, as strides; none: 3")
    deep_supervision: bool = Field(
        False, description="whether fine-tuning supervises the levels of the decoder, as nnU-Net does"
    )
    dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")

    @model_validator(mode="after")
    def _same_number(self) -> "NNUNetConfig":
        """There must be a stride and a kernel for every stage, the first stride must be 1, and kernels must be odd."""
        for name in ("strides", "kernels"):
            given = getattr(self, name)
            if given is not None and len(given) not in (1, len(self.features)):
                raise ValueError(
                    f"{name} has {len(given)} stages, features has {len(self.features)}: give one for each"
                )
        if max(self.stage_strides[0]) > 1:
            raise ValueError("the stride of the first stage must be 1: give strides that begin with 1")
        if any(edge % 2 == 0 for kernel in self.stage_kernels for edge in kernel):
            raise ValueError("kernels must have odd edges")
        return self

    @property
    def stage_strides(self) -> list[Triple]:
        """The stride of each stage relative to the one before."""
        number = len(self.features)
        if self.strides is None or len(self.strides) == 1:
            stride = (2, 2, 2) if self.strides is None else self.strides[0]
            return [(1, 1, 1), *[stride] * (number - 1)]
        return list(self.strides)

    @property
    def stage_kernels(self) -> list[Triple]:
        """The kernel of each stage."""
        kernels = self.kernels or ((3, 3, 3),)
        return list(kernels) * (len(self.features) if len(kernels) == 1 else 1)


class NNUNet(Backbone):
    """The decoder and the heads that both networks share; a subclass makes the encoder."""

    parts = {"encoder": ("encoder",), "decoder": ("decoder",), "head": ("seg_layers",)}
    config: NNUNetConfig
    encoder: "Encoder"

    def __init__(self, config: NNUNetConfig, in_channels: int, encoder: "Encoder", convs: int) -> None:
        """Make the decoder for an encoder, with `convs` convolutions per stage."""
        super().__init__(config, in_channels, dropout=config.dropout)
        self.strides = tuple(accumulate(config.stage_strides, _times))
        self.channels, self.width = config.features, config.features[0]
        self.dropout_inside = False
        self.encoder = encoder
        self.decoder = Decoder(config, convs)
        initialise(self)

    def set_head(self, num_outputs: int) -> None:
        """Attach new heads of one 1x1x1 convolution: for the finest level, or for all levels under deep supervision."""
        *coarse, finest = reversed(self.config.features[:-1])
        heads = {str(len(coarse)): nn.Conv3d(finest, num_outputs, 1)}
        if self.config.deep_supervision:
            heads |= {str(number): nn.Conv3d(width, num_outputs, 1) for number, width in enumerate(coarse)}
        self.seg_layers = nn.ModuleDict(dict(sorted(heads.items(), key=lambda pair: int(pair[0]))))
        initialise(self.seg_layers)

    def head(self, features: Tensor) -> Tensor:
        """Decoder features of the finest level (N, width, x, y, z) -> logits (N, num_outputs, x, y, z)."""
        logits: Tensor = self.seg_layers[str(len(self.config.features) - 2)](features)
        return logits

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> the outputs of the stages, fine to coarse."""
        pyramid: Pyramid = self.encoder(image)
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        features: Tensor = self.decoder(pyramid)[-1]
        return features

    def supervised_logits(self, image: Tensor) -> list[Tensor]:
        """Logits of all decoder levels under deep supervision, from fine to coarse; else of the finest one."""
        if not self.config.deep_supervision:
            return [self(image)]
        levels = self.decoder(self.encode(image))
        return [self.seg_layers[str(number)](levels[number]) for number in reversed(range(len(levels)))]


class ResEnc(NNUNet):
    """nnU-Net's residual encoder U-Net; the default is ResEnc-L at its usual plan (102 million parameters).

    A stage has residual blocks of two convolutions; the first block of a stage has its stride. Where a block has a stride,
    its skip averages over it; where channels change, a 1x1x1 convolution and a norm follow. The last norm of every block
    begins at 0. The stem's output is no level of the pyramid.
    """

    name = "resenc"
    reference = "Isensee et al. 2024, arXiv:2404.09556; dynamic-network-architectures 0.4.4"
    abilities = frozenset({"sparse"})
    presets = {
        "check": {"backbone.features": (4, 4, 8, 8), "backbone.blocks": (1, 1, 1, 1)},
        "demo": {"backbone.features": (16, 32, 64, 128), "backbone.blocks": (1, 2, 2, 2)},
        "fewshot": {"backbone.features": (16, 32, 64, 128), "backbone.blocks": (1, 2, 2, 2)},
        "nnunet": {"backbone.deep_supervision": True},
    }

    class Config(NNUNetConfig):
        """Settings of the network: stages, blocks, deep supervision, dropout."""

        blocks: tuple[PositiveInt, ...] | None = Field(
            None, description="residual blocks of the stages; none: 1, 3, 4, 6, 6, ... (ResEnc M, L and XL)"
        )
        decoder_convs: PositiveInt = Field(1, description="convolutions of each decoder stage; ResEnc's 1")

        @model_validator(mode="after")
        def _blocks_of_all_stages(self) -> "ResEnc.Config":
            """There must be a number of blocks for every stage."""
            if self.blocks is not None and len(self.blocks) != len(self.features):
                raise ValueError(f"blocks has {len(self.blocks)} stages, features has {len(self.features)}")
            return self

        @property
        def stage_blocks(self) -> list[int]:
            """Number of residual blocks of each stage."""
            more = [BLOCKS[-1]] * max(0, len(self.features) - len(BLOCKS))
            return list(self.blocks or [*BLOCKS, *more][: len(self.features)])

    def __init__(self, config: Config, in_channels: int) -> None:
        encoder = ResidualEncoder(config, in_channels, config.stage_blocks)
        super().__init__(config, in_channels, encoder, config.decoder_convs)
        for module in self.encoder.modules():
            if isinstance(module, ResidualBlock):
                nn.init.zeros_(module.conv2.norm.weight)
                nn.init.zeros_(module.conv2.norm.bias)


class PlainUNet(NNUNet):
    """nnU-Net's plain U-Net: convolution, instance norm and leaky ReLU; strided convolutions instead of poolings."""

    name = "plainunet"
    reference = "Isensee et al. 2021, doi:10.1038/s41592-020-01008-z; dynamic-network-architectures 0.4.4"
    abilities = frozenset({"sparse"})
    presets = {
        "check": {"backbone.features": (4, 4, 8, 8)},
        "demo": {"backbone.features": (16, 32, 64, 128)},
        "fewshot": {"backbone.features": (16, 32, 64, 128)},
        "nnunet": {"backbone.deep_supervision": True},
    }

    class Config(NNUNetConfig):
        """Settings of the network: stages, convolutions, deep supervision, dropout."""

        convs: PositiveInt = Field(2, description="convolutions of each stage of encoder and decoder; nnU-Net's 2")

    def __init__(self, config: Config, in_channels: int) -> None:
        encoder = PlainEncoder(config, in_channels, config.convs)
        super().__init__(config, in_channels, encoder, config.convs)


class ConvNorm(nn.Module):
    """Convolution and instance norm, and a leaky ReLU if `activated`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: Triple,
        stride: Triple,
        activated: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__()
        padding = (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)
        self.conv = nn.Conv3d(in_channels, out_channels, kernel, stride, padding, bias=bias)
        self.norm = nn.InstanceNorm3d(out_channels, affine=True)
        self.activated = activated

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> (N, out_channels, x / stride, ...)."""
        out = self.norm(self.conv(features))
        return nn.functional.leaky_relu(out, SLOPE, inplace=True) if self.activated else out


class ResidualBlock(nn.Module):
    """Two convolutions with norms, beside a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, kernel: Triple, stride: Triple) -> None:
        super().__init__()
        self.conv1 = ConvNorm(in_channels, out_channels, kernel, stride)
        self.conv2 = ConvNorm(out_channels, out_channels, kernel, (1, 1, 1), activated=False)
        skip: list[nn.Module] = [] if max(stride) == 1 else [nn.AvgPool3d(stride, stride)]
        if in_channels != out_channels:
            skip.append(ConvNorm(in_channels, out_channels, (1, 1, 1), (1, 1, 1), activated=False, bias=False))
        self.skip = nn.Sequential(*skip)

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> (N, out_channels, x / stride, ...)."""
        out = self.conv2(self.conv1(features)) + self.skip(features)
        return nn.functional.leaky_relu(out, SLOPE, inplace=True)


class Encoder(nn.Module):
    """Stages one after another; their outputs are the pyramid."""

    stages: nn.Sequential

    def before(self, image: Tensor) -> Tensor:
        """What the first stage gets."""
        return image

    def forward(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> the outputs of all stages, fine to coarse."""
        features, pyramid = self.before(image), []
        for stage in self.stages:
            features = stage(features)
            pyramid.append(features)
        return pyramid


class Stack(nn.Module):
    """Layers one after another, under the name that published keys have for them."""

    def __init__(self, name: str, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.add_module(name, nn.Sequential(*layers))

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, x, y, z) -> the output of the last layer."""
        (layers,) = self.children()
        out: Tensor = layers(features)
        return out


class ResidualEncoder(Encoder):
    """A stem of one convolution, and stages of residual blocks."""

    def __init__(self, config: NNUNetConfig, in_channels: int, blocks: Sequence[int]) -> None:
        super().__init__()
        widths, kernels, strides = config.features, config.stage_kernels, config.stage_strides
        self.stem = Stack("convs", [ConvNorm(in_channels, widths[0], kernels[0], (1, 1, 1))])
        before = [widths[0], *widths[:-1]]
        self.stages = nn.Sequential(
            *(
                Stack(
                    "blocks",
                    [
                        ResidualBlock(old if first else new, new, kernel, stride if first else (1, 1, 1))
                        for first in [True] + [False] * (number - 1)
                    ],
                )
                for old, new, kernel, stride, number in zip(before, widths, kernels, strides, blocks, strict=True)
            )
        )

    def before(self, image: Tensor) -> Tensor:
        """The output of the stem, (N, features[0], x, y, z)."""
        out: Tensor = self.stem(image)
        return out


class PlainEncoder(Encoder):
    """Stages of `convs` convolutions, the first of which has the stage's stride."""

    def __init__(self, config: NNUNetConfig, in_channels: int, convs: int) -> None:
        super().__init__()
        before = [in_channels, *config.features[:-1]]
        stages = zip(before, config.features, config.stage_kernels, config.stage_strides, strict=True)
        self.stages = nn.Sequential(
            *(nn.Sequential(_convolutions(old, new, kernel, stride, convs)) for old, new, kernel, stride in stages)
        )


class Decoder(nn.Module):
    """Transposed convolutions, and stages of convolutions on the upsampled features and the skip."""

    def __init__(self, config: NNUNetConfig, convs: int) -> None:
        super().__init__()
        # From the deepest level up.
        widths, strides, kernels = config.features[::-1], config.stage_strides[::-1], config.stage_kernels[::-1]
        self.stages = nn.ModuleList(
            _convolutions(2 * skip, skip, kernel, (1, 1, 1), convs)
            for skip, kernel in zip(widths[1:], kernels[1:], strict=True)
        )
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose3d(deep, skip, stride, stride)
            for deep, skip, stride in zip(widths[:-1], widths[1:], strides[:-1], strict=True)
        )

    def forward(self, pyramid: Pyramid) -> Pyramid:
        """Pyramid, whole or cropped -> the outputs of all stages, from coarse to fine."""
        *skips, features = pyramid
        levels = []
        for up, stage, skip in zip(self.transpconvs, self.stages, reversed(skips), strict=True):
            features = stage(torch.cat([up(features), skip], dim=1))
            levels.append(features)
        return levels


def _convolutions(in_channels: int, out_channels: int, kernel: Triple, stride: Triple, number: int) -> Stack:
    """`number` convolutions with norm and activation, of which the first has the stride."""
    first = ConvNorm(in_channels, out_channels, kernel, stride)
    return Stack(
        "convs", [first, *(ConvNorm(out_channels, out_channels, kernel, (1, 1, 1)) for _ in range(number - 1))]
    )


def _times(first: Triple, second: Triple) -> Triple:
    """The products per axis."""
    return (first[0] * second[0], first[1] * second[1], first[2] * second[2])


def initialise(network: nn.Module) -> None:
    """He's normal initialisation of every convolution, with biases of 0, as nnU-Net does."""
    for module in network.modules():
        if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
