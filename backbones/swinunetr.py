"""SwinUNETR: MONAI's modules and keys behind the encoder / decoder contract."""

from typing import Annotated, Any

import torch
from monai.networks.blocks import UnetOutBlock
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings

Stages = Annotated[tuple[PositiveInt, ...], Field(min_length=4, max_length=4)]


class SwinUNETR(Backbone):
    """Swin transformer encoder with a convolutional decoder, stride 32 (keys of MONAI's SwinUNETR).

    Level 0 of the pyramid is the image itself: the convolutions on the skip connections (`encoder1`..`encoder4`,
    `encoder10`) belong to the decoder, so that partial decoding does not pay for them on the whole volume.
    """

    name = "swinunetr"
    reference = "Hatamizadeh et al. 2022, arXiv:2201.01266; MONAI SwinUNETR"
    presets = {
        "check": {"backbone.feature_size": 12, "backbone.window_size": 4, "backbone.depths": (1, 1, 1, 1)},
        # Windows of 4 divide the token grids of the demo crops; those of 7 pad them.
        "demo": {"backbone.feature_size": 12, "backbone.window_size": 4},
        "small": {"backbone.feature_size": 24},
    }
    parts = {
        "encoder": ("swinViT",),
        "decoder": (
            *("encoder1", "encoder2", "encoder3", "encoder4", "encoder10"),
            *("decoder5", "decoder4", "decoder3", "decoder2", "decoder1"),
        ),
        "head": ("out",),
    }
    abilities = frozenset({"tokens"})
    aliases = (
        # MONAI's self-supervised weights name the encoder `swin_vit`, or nothing; disruptive autoencoders `encoder`.
        (r"^swin_vit\.", "swinViT."),
        (r"^encoder\.(layers\d\.0\.)0\.", r"swinViT.\1"),
        (r"^encoder\.(patch_embed\.)", r"swinViT.\1"),
        (r"^(patch_embed|layers[1-4])\.", r"swinViT.\1."),
        (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),
    )
    strides = tuple((2**level,) * 3 for level in range(6))
    token_stride = 2

    # MONAI's modules, under MONAI's names; `__init__` takes them over.
    swinViT: Any  # noqa: N815
    encoder1: nn.Module
    encoder2: nn.Module
    encoder3: nn.Module
    encoder4: nn.Module
    encoder10: nn.Module
    decoder5: nn.Module
    decoder4: nn.Module
    decoder3: nn.Module
    decoder2: nn.Module
    decoder1: nn.Module

    class Config(Settings):
        feature_size: int = Field(
            48, gt=0, multiple_of=12, description="channels after the patch embedding; MONAI's 48"
        )
        window_size: PositiveInt = Field(7, description="attention window in tokens; the paper's 7")
        depths: Stages = Field((2, 2, 2, 2), description="blocks per stage; the paper's 2")
        num_heads: Stages = Field((3, 6, 12, 24), description="attention heads per stage; the paper's")
        dropout: float = Field(0.1, ge=0, lt=1, description="on the deepest features, after the trunk; SimCSE's 0.1")
        drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth inside the trunk; MONAI's 0")

        @model_validator(mode="after")
        def _heads_fit(self) -> "SwinUNETR.Config":
            for stage, heads in enumerate(self.num_heads):
                if self.feature_size * 2**stage % heads:
                    raise ValueError(
                        f"{heads} heads do not divide the {self.feature_size * 2**stage} channels of a stage"
                    )
            return self

    config: Config

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__(config, in_channels, dropout=config.dropout)
        size = config.feature_size
        self.channels = (in_channels, size, 2 * size, 4 * size, 8 * size, 16 * size)
        self.width = self.token_width = size
        self.dropout_inside = config.drop_path > 0
        network = MonaiSwinUNETR(
            in_channels=in_channels,
            out_channels=1,
            depths=config.depths,
            num_heads=config.num_heads,
            window_size=config.window_size,
            feature_size=size,
            dropout_path_rate=config.drop_path,
        )
        for name, child in network.named_children():
            if name not in self.parts["head"]:
                self.add_module(name, child)

    def set_head(self, num_outputs: int) -> None:
        self.out = UnetOutBlock(spatial_dims=3, in_channels=self.width, out_channels=num_outputs)

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]]:
        names = ("depths", "num_heads", "window_size", "feature_size")
        arguments = {name: getattr(self.config, name) for name in names} | {"dropout_path_rate": self.config.drop_path}
        return "SwinUNETR", {"in_channels": self.in_channels, "out_channels": num_outputs, **arguments}

    def trunk(self, image: Tensor) -> Pyramid:
        return self._stages(image, self.swinViT.patch_embed(image))

    def encode_masked(self, image: Tensor, mask: Tensor, token: Tensor) -> Pyramid:
        visible = image * ~mask
        embedded = self.swinViT.patch_embed(visible)
        embedded = torch.where(mask[:, :, ::2, ::2, ::2], token.view(1, -1, 1, 1, 1).to(embedded.dtype), embedded)
        return self._drop(self._stages(visible, embedded))

    def _stages(self, image: Tensor, features: Tensor) -> Pyramid:
        """The four stages as MONAI's `SwinTransformer.forward` runs them; every level is normalised over channels."""
        swin = self.swinViT
        features = swin.pos_drop(features)
        pyramid = [image, swin.proj_out(features, True)]
        for (stage,) in (swin.layers1, swin.layers2, swin.layers3, swin.layers4):
            features = stage(features.contiguous())
            pyramid.append(swin.proj_out(features, True))
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        image, tokens_2, tokens_4, tokens_8, tokens_16, tokens_32 = pyramid
        features = self.decoder5(self.encoder10(tokens_32), tokens_16)
        features = self.decoder4(features, self.encoder4(tokens_8))
        features = self.decoder3(features, self.encoder3(tokens_4))
        features = self.decoder2(features, self.encoder2(tokens_2))
        whole: Tensor = self.decoder1(features, self.encoder1(image))
        return whole
