"""UNETR as a backbone, with the modules and keys of MONAI."""

from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock
from monai.networks.nets.unetr import UNETR as MonaiUNETR  # noqa: N811
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from harness import Backbone, Pyramid, Settings, Size3

TAPS = (3, 6, 9)  # transformer blocks whose outputs feed the skip connections, as in MONAI


class UNETR(Backbone):
    """Plain vision transformer with a convolutional decoder, stride 16 (keys of MONAI's UNETR).

    The pyramid is the image and four states of the transformer. The states have stride 16. The upsampling of the skip
    connections belongs to the decoder. Position embeddings are made for `image_size` and interpolated (trilinear) for
    other extents, so that the extent of a crop can be any multiple of 16. MONAI's network accepts `image_size` only.
    """

    name = "unetr"
    reference = "Hatamizadeh et al. 2022, arXiv:2103.10504; MONAI UNETR"
    presets = {
        "check": {
            "backbone.image_size": (32, 64, 32),
            "backbone.feature_size": 4,
            "backbone.hidden_size": 24,
            "backbone.mlp_dim": 48,
            "backbone.num_heads": 3,
        },
        "demo": {
            "backbone.image_size": (32, 64, 32),
            "backbone.feature_size": 8,
            "backbone.hidden_size": 96,
            "backbone.mlp_dim": 384,
            "backbone.num_heads": 6,
        },
        "small": {"backbone.hidden_size": 384, "backbone.mlp_dim": 1536, "backbone.num_heads": 6},
    }
    parts = {
        "encoder": ("vit",),
        "decoder": (
            "encoder1",
            "encoder2",
            "encoder3",
            "encoder4",
            "decoder5",
            "decoder4",
            "decoder3",
            "decoder2",
        ),
        "head": ("out",),
    }
    abilities = frozenset({"tokens"})
    strides = ((1, 1, 1), *((16, 16, 16),) * 4)
    token_stride = 16

    # MONAI's modules under MONAI's names. `__init__` takes them from MONAI's network.
    vit: Any
    encoder1: nn.Module
    encoder2: nn.Module
    encoder3: nn.Module
    encoder4: nn.Module
    decoder5: nn.Module
    decoder4: nn.Module
    decoder3: nn.Module
    decoder2: nn.Module

    class Config(Settings):
        """Settings of the network: extent of the position embeddings, sizes of transformer and decoder, dropout."""

        image_size: Size3 = Field((96, 96, 96), description="extent that the position embeddings are made for")
        feature_size: PositiveInt = Field(16, description="channels of the decoder's finest level; MONAI's 16")
        hidden_size: PositiveInt = Field(768, description="channels of a token; the paper's 768")
        mlp_dim: PositiveInt = Field(3072, description="of the transformer's feed-forward layers; the paper's 3072")
        num_heads: PositiveInt = Field(12, description="attention heads; the paper's 12")
        dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")

        @model_validator(mode="after")
        def _sizes_fit(self) -> "UNETR.Config":
            if self.hidden_size % self.num_heads:
                raise ValueError(f"{self.num_heads} heads do not divide the {self.hidden_size} channels of a token")
            if any(edge % 16 for edge in self.image_size):
                raise ValueError(f"image_size {self.image_size} is not a multiple of 16")
            return self

    config: Config

    def __init__(self, config: Config, in_channels: int) -> None:
        super().__init__(config, in_channels, dropout=config.dropout)
        self.channels = (in_channels, *(config.hidden_size,) * 4)
        self.width = config.feature_size
        self.token_width = config.hidden_size
        self.dropout_inside = False
        network = MonaiUNETR(
            in_channels=in_channels,
            out_channels=1,
            img_size=config.image_size,
            feature_size=config.feature_size,
            hidden_size=config.hidden_size,
            mlp_dim=config.mlp_dim,
            num_heads=config.num_heads,
        )
        for name in (*self.parts["encoder"], *self.parts["decoder"]):
            self.add_module(name, getattr(network, name))
        for block in self.vit.blocks:
            # MONAI creates this norm for a cross-attention that UNETR does not have, so its parameters are never used.
            if hasattr(block, "norm_cross_attn"):
                del block.norm_cross_attn

    def set_head(self, num_outputs: int) -> None:
        """Attach a new head: one 1x1x1 convolution, as in MONAI."""
        self.out = UnetOutBlock(spatial_dims=3, in_channels=self.width, out_channels=num_outputs)

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]]:
        """MONAI's `UNETR` and its arguments. It has the same keys and outputs."""
        names = ("feature_size", "hidden_size", "mlp_dim", "num_heads")
        arguments = {name: getattr(self.config, name) for name in names} | {"img_size": self.config.image_size}
        return "UNETR", {"in_channels": self.in_channels, "out_channels": num_outputs, **arguments}

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> the image and four states of the transformer. The states have stride 16."""
        return self._states(image, self.vit.patch_embedding.patch_embeddings(image))

    def encode_masked(self, image: Tensor, mask: Tensor, token: Tensor) -> Pyramid:
        """Encode with the mask token in place of the embedded patches that are masked. Masked voxels are 0."""
        embedded = self.vit.patch_embedding.patch_embeddings(image * ~mask)
        hidden = mask[:, :, ::16, ::16, ::16]
        embedded = torch.where(hidden, token.view(1, -1, 1, 1, 1).to(embedded.dtype), embedded)
        return self._drop(self._states(image * ~mask, embedded))

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        image, *states, deepest = pyramid
        features = self.decoder5(deepest, self.encoder4(states[2]))
        features = self.decoder4(features, self.encoder3(states[1]))
        features = self.decoder3(features, self.encoder2(states[0]))
        whole: Tensor = self.decoder2(features, self.encoder1(image))
        return whole

    def _states(self, image: Tensor, embedded: Tensor) -> Pyramid:
        """Embedded patches (N, hidden_size, x, y, z) -> pyramid."""
        grid = embedded.shape[2:]
        tokens = embedded.flatten(2).transpose(1, 2) + self._positions(grid).to(embedded.dtype)
        pyramid = [image]
        for number, block in enumerate(self.vit.blocks):
            tokens = block(tokens)
            if number in TAPS:
                pyramid.append(_as_volume(tokens, grid))
        return [*pyramid, _as_volume(self.vit.norm(tokens), grid)]

    def _positions(self, grid: torch.Size) -> Tensor:
        """Position embeddings (1, tokens, hidden_size) for a grid of patches, interpolated if it is another grid."""
        positions: Tensor = self.vit.patch_embedding.position_embeddings
        own_grid = [edge // 16 for edge in self.config.image_size]
        if list(grid) == own_grid:
            return positions
        volume = positions.transpose(1, 2).unflatten(2, own_grid)
        return F.interpolate(volume, size=grid, mode="trilinear", align_corners=False).flatten(2).transpose(1, 2)


def _as_volume(tokens: Tensor, grid: torch.Size) -> Tensor:
    """(N, tokens, D) -> (N, D, x, y, z)."""
    return tokens.transpose(1, 2).unflatten(2, grid).contiguous()
