"""SwinUNETR as a backbone, with the modules and keys of MONAI, and a faster forward pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from monai.networks.blocks import UnetOutBlock
from monai.networks.nets.swin_unetr import SwinUNETR as MonaiSwinUNETR
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from harness import Backbone, Pyramid, Settings

IN_CACHE = 2**20  # attention probabilities that the CPU's backward pass computes at a time, so that they fit its cache
Stages = Annotated[tuple[PositiveInt, ...], Field(min_length=4, max_length=4)]


class SwinUNETR(Backbone):
    """Swin transformer encoder with a convolutional decoder, stride 32 (keys of MONAI's SwinUNETR).

    Level 0 of the pyramid is the image itself. The convolutions on the skip connections (`encoder1`..`encoder4`,
    `encoder10`) belong to the decoder, so that partial decoding does not compute them on the whole volume.

    The modules are MONAI's, but their forward pass is written here. Tokens stay channels-last. One indexed copy replaces
    padding, roll and window partition. Attention is `scaled_dot_product_attention` with the relative position bias and
    the shift mask. Outputs and gradients equal MONAI's for MONAI's weights.
    """

    name = "swinunetr"
    reference = "Hatamizadeh et al. 2022, arXiv:2201.01266; MONAI SwinUNETR"
    presets = {
        "check": {"backbone.feature_size": 12, "backbone.window_size": 4, "backbone.depths": (1, 1, 1, 1)},
        # Windows of 4 divide the token grids of the demo crops. Windows of 7 would need padding.
        "demo": {"backbone.feature_size": 12, "backbone.window_size": 4},
        "small": {"backbone.feature_size": 24},
    }
    parts = {
        "encoder": ("swinViT",),
        "decoder": (
            "encoder1",
            "encoder2",
            "encoder3",
            "encoder4",
            "encoder10",
            "decoder5",
            "decoder4",
            "decoder3",
            "decoder2",
            "decoder1",
        ),
        "head": ("out",),
    }
    abilities = frozenset({"tokens"})
    aliases = (
        # In MONAI's self-supervised weights the prefix of the encoder is `swin_vit` or missing. In the weights of
        # disruptive autoencoders it is `encoder`.
        (r"^swin_vit\.", "swinViT."),
        (r"^encoder\.(layers\d\.0\.)0\.", r"swinViT.\1"),
        (r"^encoder\.(patch_embed\.)", r"swinViT.\1"),
        (r"^(patch_embed|layers[1-4])\.", r"swinViT.\1."),
        (r"\.mlp\.fc([12])\.", r".mlp.linear\1."),
    )
    strides = tuple((2**level,) * 3 for level in range(6))
    token_stride = 2

    # MONAI's modules under MONAI's names. `__init__` takes them from MONAI's network.
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
        """Settings of the network: widths, windows, depths, heads, dropout, checkpointing."""

        feature_size: int = Field(
            48, gt=0, multiple_of=12, description="channels after the patch embedding; MONAI's 48"
        )
        window_size: PositiveInt = Field(7, description="attention window in tokens; the paper's 7")
        depths: Stages = Field((2, 2, 2, 2), description="blocks per stage; the paper's 2")
        num_heads: Stages = Field((3, 6, 12, 24), description="attention heads per stage; the paper's")
        dropout: float = Field(0.0, ge=0, lt=1, description="on the deepest features, after the trunk, in every stage")
        drop_path: float = Field(0.0, ge=0, lt=1, description="stochastic depth inside the trunk; MONAI's 0")
        checkpoint: bool = Field(
            False,
            description="compute the transformer's activations again in the backward pass: less memory, more time",
        )

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
        """Attach a new head: one 1x1x1 convolution, as in MONAI."""
        self.out = UnetOutBlock(spatial_dims=3, in_channels=self.width, out_channels=num_outputs)

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]]:
        """MONAI's `SwinUNETR` and its arguments. It has the same keys and outputs."""
        names = ("depths", "num_heads", "window_size", "feature_size")
        arguments = {name: getattr(self.config, name) for name in names} | {"dropout_path_rate": self.config.drop_path}
        return "SwinUNETR", {"in_channels": self.in_channels, "out_channels": num_outputs, **arguments}

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> the image and the outputs of five encoder stages, strides 2 to 32."""
        return self._stages(image, self.swinViT.patch_embed(image))

    def encode_masked(self, image: Tensor, mask: Tensor, token: Tensor) -> Pyramid:
        """Encode with the mask token in place of the embedded patches that are masked. Masked voxels are 0."""
        visible = image * ~mask
        embedded = self.swinViT.patch_embed(visible)
        embedded = torch.where(mask[:, :, ::2, ::2, ::2], token.view(1, -1, 1, 1, 1).to(embedded.dtype), embedded)
        return self._drop(self._stages(visible, embedded))

    def _stages(self, image: Tensor, features: Tensor) -> Pyramid:
        """Patch embedding (N, feature_size, x, y, z) -> pyramid. Every level but the image is normalised over channels."""
        swin = self.swinViT
        tokens = swin.pos_drop(features).permute(0, 2, 3, 4, 1).contiguous()
        pyramid = [image, _as_level(tokens)]
        for (stage,) in (swin.layers1, swin.layers2, swin.layers3, swin.layers4):
            for block in stage.blocks:
                if self.config.checkpoint and torch.is_grad_enabled():
                    tokens = checkpoint(_block, block, tokens, use_reentrant=False)
                else:
                    tokens = _block(block, tokens)
            tokens = _merge(stage.downsample, tokens)
            pyramid.append(_as_level(tokens))
        return pyramid

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        image, tokens_2, tokens_4, tokens_8, tokens_16, tokens_32 = pyramid
        features = self.decoder5(self.encoder10(tokens_32), tokens_16)
        features = self.decoder4(features, self.encoder4(tokens_8))
        features = self.decoder3(features, self.encoder3(tokens_4))
        features = self.decoder2(features, self.encoder2(tokens_2))
        whole: Tensor = self.decoder1(features, self.encoder1(image))
        return whole


@dataclass(frozen=True)
class _Windows:
    """Where the tokens of a batch lie in (shifted) windows. Windows with the same mask are adjacent.

    Tokens are rows, in the order (sample, x, y, z). Slots are the positions inside windows, in the order (window,
    position).

    Attributes:
        tokens: for every slot, the row of its token.
        slots: for every token, its slot.
        padding: the slots without a token.
        volume: slots per window.
        groups: number of adjacent windows with the same mask, and this mask: (volume, volume), 0 or -100, or None if all
            tokens of a window attend to each other.
    """

    tokens: Tensor
    slots: Tensor
    padding: Tensor
    volume: int
    groups: tuple[tuple[int, Tensor | None], ...]


# The cached tensors may be created during evaluation and used in training later. Inference tensors cannot be used in
# computations that need gradients, so inference mode is switched off.
@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _windows(
    samples: int, grid: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...], device: torch.device
) -> _Windows:
    """The window partition of Liu et al. 2021, as in MONAI: pad at the end, roll back by `shift`, cut into windows."""
    padded = [-(-extent // edge) * edge for extent, edge in zip(grid, window, strict=True)]
    numbers = [extent // edge for extent, edge in zip(padded, window, strict=True)]
    row, region, last = torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, 1, dtype=torch.long), torch.zeros(1)
    missing = torch.zeros(1, 1, dtype=torch.bool)
    for extent, whole, edge, step, number in zip(grid, padded, window, shift, numbers, strict=True):
        position = (torch.arange(whole) + step) % whole
        # The roll puts the first `step` positions behind the last ones, though they are far apart. They must not attend
        # to each other.
        beyond = (torch.arange(whole) >= whole - step).long()
        at_end = torch.arange(number) == number - 1 if step else torch.zeros(number)
        row, region, missing = (
            _outer(whole_so_far, along.view(number, edge))
            for whole_so_far, along in (
                (row * extent, position.clamp(max=extent - 1)),
                (region * 2, beyond),
                (missing.long(), (position >= extent).long()),
            )
        )
        last = (last[:, None] * 2 + at_end[None]).flatten()
    missing = missing > 0
    count = grid[0] * grid[1] * grid[2]
    tokens, padding, groups = [], [], []
    for kind in last.unique().tolist():
        members = (last == kind).nonzero()[:, 0]
        tokens.append((row[members] + count * torch.arange(samples)[:, None, None]).flatten())
        padding.append(missing[members].expand(samples, -1, -1).flatten())
        regions = region[members[0]]
        mask = -100.0 * (regions[:, None] != regions[None]).float()
        groups.append((samples * len(members), mask.to(device) if mask.any() else None))
    all_tokens, is_padding = torch.cat(tokens), torch.cat(padding)
    slots = torch.empty(samples * count, dtype=torch.long)
    slots[all_tokens[~is_padding]] = (~is_padding).nonzero()[:, 0]
    blank = is_padding.nonzero()[:, 0]
    return _Windows(all_tokens.to(device), slots.to(device), blank.to(device), row.shape[1], tuple(groups))


def _outer(so_far: Tensor, along: Tensor) -> Tensor:
    """Add every index of (windows, slots) to every index of one more axis, (windows, edge). Returns all combinations."""
    return (so_far[:, None, :, None] + along[None, :, None, :]).flatten(2).flatten(0, 1)


@torch.compiler.disable
@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _merging(samples: int, grid: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Rows of the 2 x 2 x 2 tokens that MONAI's `PatchMerging` joins, in its order, and the inverse permutation."""
    row = torch.arange(samples * grid[0] * grid[1] * grid[2]).view(samples, *grid)
    # MONAI's order: 000 100 010 001 110 101 011 111.
    corners = sorted(product(range(2), repeat=3), key=lambda corner: (sum(corner), tuple(-c for c in corner)))
    tokens = torch.stack([row[:, i::2, j::2, k::2] for i, j, k in corners], dim=-1).flatten()
    return tokens.to(device), tokens.argsort().to(device)


class _Reorder(torch.autograd.Function):
    """Rows (R, C) -> rows[index], with 0 at `blank`.

    Each row goes to one position. So the gradient is a copy as well, by the inverse index `back` with 0 at `lost`, and not
    a sum.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, index: Tensor, back: Tensor, blank: Tensor | None, lost: Tensor | None
    ) -> Tensor:
        """Rows (R, C) -> rows[index], with 0 at `blank`."""
        ctx.save_for_backward(back, lost)
        return _take(rows, index, blank)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None, None, None, None]:
        """The gradient of the rows, (R, C)."""
        back, lost = ctx.saved_tensors
        return _take(slope, back, lost), None, None, None, None


def _take(rows: Tensor, index: Tensor, blank: Tensor | None) -> Tensor:
    """rows[index], with 0 at `blank`."""
    taken = rows.index_select(0, index)
    return taken if blank is None or not len(blank) else taken.index_fill_(0, blank, 0)


def _as_level(tokens: Tensor) -> Tensor:
    """Tokens (N, x, y, z, C) -> (N, C, x, y, z), normalised over channels. The axes are swapped without a copy."""
    return F.layer_norm(tokens, tokens.shape[-1:]).permute(0, 4, 1, 2, 3)


def _merge(downsample: Any, tokens: Tensor) -> Tensor:
    """MONAI's `PatchMerging`: 2 x 2 x 2 tokens become one token with twice the channels."""
    samples, *grid, width = tokens.shape
    x, y, z = grid
    order, back = _merging(samples, (x, y, z), tokens.device)
    joined = _Reorder.apply(tokens.reshape(-1, width), order, back, None, None).view(-1, 8 * width)
    merged: Tensor = downsample.reduction(downsample.norm(joined))
    return merged.view(samples, x // 2, y // 2, z // 2, -1)


def _block(block: Any, tokens: Tensor) -> Tensor:
    """MONAI's `SwinTransformerBlock` on tokens (N, x, y, z, C)."""
    samples, *grid, width = tokens.shape
    # An axis is neither cut nor shifted if one window covers it.
    fits = [extent <= edge for extent, edge in zip(grid, block.window_size, strict=True)]
    window = tuple(n if whole else w for n, w, whole in zip(grid, block.window_size, fits, strict=True))
    shift = tuple(0 if whole else s for s, whole in zip(block.shift_size, fits, strict=True))
    windows = _windows(samples, tuple(grid), window, shift, tokens.device)
    rows = tokens.reshape(-1, width)
    in_windows = _Reorder.apply(block.norm1(rows), windows.tokens, windows.slots, windows.padding, None)
    attended = _attend(block.attn, in_windows, windows)
    attended = block.attn.proj(_Reorder.apply(attended, windows.slots, windows.tokens, None, windows.padding))
    tokens = tokens + block.drop_path(attended.view(tokens.shape))
    mixed: Tensor = tokens + block.drop_path(block.mlp(block.norm2(tokens)))
    return mixed


def _attend(attention: Any, in_windows: Tensor, windows: _Windows) -> Tensor:
    """Rows in windows (B * volume, C) -> output of the attention before its projection, same shape."""
    volume, heads = windows.volume, attention.num_heads
    qkv = attention.qkv(in_windows).view(-1, volume, 3, heads, in_windows.shape[1] // heads)
    index = attention.relative_position_index[:volume, :volume].flatten()
    bias = attention.relative_position_bias_table.index_select(0, index).view(volume, volume, heads).permute(2, 0, 1)
    bias = bias.to(qkv.dtype).contiguous()
    if qkv.device.type == "cpu" and torch.is_grad_enabled():
        attended: Tensor = _Attention.apply(qkv, bias, windows.groups)
    else:
        attended = _attention(qkv, bias, windows.groups)
    return attended.reshape(-1, in_windows.shape[1])


def _attention(qkv: Tensor, bias: Tensor, groups: Sequence[tuple[int, Tensor | None]]) -> Tensor:
    """Queries, keys and values (B, volume, 3, heads, d) and `bias` (heads, volume, volume) -> (B, volume, heads, d)."""
    outputs = []
    for of_group, (_, mask) in zip(qkv.split([number for number, _ in groups]), groups, strict=True):
        q, k, v = of_group.permute(2, 0, 3, 1, 4).contiguous()
        added = bias if mask is None else bias + mask.to(bias.dtype)
        # The GPU's kernels take the bias only if its stride over windows is 0, as `expand` makes it.
        outputs.append(F.scaled_dot_product_attention(q, k, v, attn_mask=added.expand(len(q), -1, -1, -1)))
    return torch.cat(outputs).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """`_attention` for a CPU. Torch has no fused gradient there if the bias needs a gradient.

    The backward pass computes the probabilities again, for a few windows at a time. So they fit the CPU's cache and are
    never stored. Those of a whole stage take half a gigabyte for a crop of 96^3.
    """

    @staticmethod
    def forward(ctx: Any, qkv: Tensor, bias: Tensor, groups: Sequence[tuple[int, Tensor | None]]) -> Tensor:
        """See `_attention`."""
        ctx.save_for_backward(qkv, bias)
        ctx.groups = groups
        # Torch does not use its fused kernel for a bias that requires a gradient, not even in the forward pass.
        return _attention(qkv, bias.detach(), groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor, None]:
        """The gradients of queries, keys and values, and of the bias."""
        qkv, bias = ctx.saved_tensors
        heads, volume, _ = bias.shape
        scale, at_once = qkv.shape[-1] ** -0.5, max(1, IN_CACHE // (heads * volume**2))
        qkv_slope, bias_slope = torch.empty_like(qkv), torch.zeros_like(bias, dtype=torch.float32)
        start = 0
        for number, mask in ctx.groups:
            added = bias if mask is None else bias + mask.to(bias.dtype)
            for first in range(start, start + number, at_once):
                windows = slice(first, min(first + at_once, start + number))
                # The channel axis comes before the token axis. For heads of few channels such products are much faster.
                q, k, v = qkv[windows].permute(2, 0, 3, 4, 1).contiguous()
                output_slope = slope[windows].permute(0, 2, 3, 1).contiguous()
                q = q * scale
                p = (q.transpose(2, 3) @ k).add_(added).softmax(dim=-1)
                ds = torch.ops.aten._softmax_backward_data(output_slope.transpose(2, 3) @ v, p, -1, p.dtype)
                gradients = qkv_slope[windows].permute(2, 0, 3, 4, 1)
                gradients[0] = (k @ ds.transpose(2, 3)) * scale
                gradients[1] = q @ ds
                gradients[2] = output_slope @ p
                bias_slope += ds.sum(dim=0, dtype=torch.float32)
            start += number
        return qkv_slope, bias_slope.to(bias.dtype), None
