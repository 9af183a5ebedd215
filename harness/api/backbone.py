"""What a segmentation network is: encoder, decoder, head."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.api.global_batch import Dropout
from harness.api.settings import Settings, Triple

Pyramid = list[Tensor]
"""Features fine to coarse; level l is (N, channels[l], x / strides[l][0], ...)."""


class Backbone(nn.Module):
    """A segmentation network in three parts: encoder, decoder, head.

    A subclass sets `strides`, `channels` and `width` and implements `trunk`, `decode` and `set_head`. The head does
    not exist before `set_head`, so that a pretext task that has no use for it trains no dead parameters.

    Attributes:
        strides: per pyramid level, per axis, cumulative, fine to coarse.
        channels: per pyramid level.
        width: channels that leave the decoder.
        parts: names of the child modules that make up each part; networks with published weights keep their own
            child names and map them here, so that those state dicts load as they are.
        abilities: optional abilities that a method may ask for in its `needs`. "tokens": `encode_masked` puts the
            mask token in the place of embedded patches, not of voxels.
        token_width: channels of a mask token; `None` stands for the image's channels.
        token_stride: edge in voxels of what one token stands for; masks must be multiples of it.
        aliases: (pattern, replacement) pairs for `re.sub` that turn the key names of published weights into ours.
        dropout_inside: whether the trunk itself draws dropout. If not, two encodings share one trunk pass.
    """

    plugin_kind: ClassVar[str] = "backbone"
    name: ClassVar[str]
    version: ClassVar[str] = "1"
    reference: ClassVar[str] = ""
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    parts: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "encoder": ("encoder",),
        "decoder": ("decoder",),
        "head": ("head",),
    }
    abilities: ClassVar[frozenset[str]] = frozenset()
    aliases: ClassVar[tuple[tuple[str, str], ...]] = ()
    token_width: int | None = None
    token_stride: int = 1
    dropout_inside: bool = True
    strides: tuple[Triple, ...]
    channels: tuple[int, ...]
    width: int

    class Config(Settings):
        """Settings of the network; a subclass defines its own."""

    def __init__(self, config: Settings, in_channels: int, dropout: float = 0.0) -> None:
        """`dropout` acts on the deepest features, after the trunk, in training only."""
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.dropout: nn.Module = Dropout(dropout)

    def trunk(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> pyramid, before the dropout on the deepest level."""
        raise NotImplementedError(f"{type(self).__name__} must implement trunk(image)")

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped -> (N, width, x, y, z) at the resolution of level 0."""
        raise NotImplementedError(f"{type(self).__name__} must implement decode(pyramid)")

    def set_head(self, num_outputs: int) -> None:
        """Attach a new, randomly initialised head: width -> num_outputs."""
        raise NotImplementedError(f"{type(self).__name__} must implement set_head(num_outputs)")

    def head(self, features: Tensor) -> Tensor:
        """(N, width, ...) -> logits (N, num_outputs, ...); `set_head` comes first."""
        (name,) = self.parts["head"]
        logits: Tensor = getattr(self, name)(features)
        return logits

    @property
    def stride(self) -> Triple:
        """Cumulative stride of the deepest level."""
        return self.strides[-1]

    def encode(self, image: Tensor) -> Pyramid:
        """(N, in_channels, x, y, z) -> pyramid, fine to coarse."""
        return self._drop(self.trunk(image))

    def encode_masked(self, image: Tensor, mask: Tensor, token: Tensor) -> Pyramid:
        """Encode with a learnable token in the place of what is masked; the token belongs to the method.

        Convolutional networks have no tokens: it takes the place of masked voxels. Networks with the ability "tokens"
        put it after their patch embedding (as SimMIM and MAE do) and see no masked voxel anywhere else.

        Args:
            mask: (N, 1, x, y, z) bool, True is masked; whole multiples of `token_stride`.
            token: (token_width or in_channels,).
        """
        return self.encode(torch.where(mask, token.view(1, -1, 1, 1, 1).to(image.dtype), image))

    def encode_twice(self, image: Tensor) -> tuple[Pyramid, Pyramid]:
        """Two encodings of one batch under independent dropout, at the least cost that keeps the distribution.

        With dropout after the trunk only, the trunk is deterministic: one pass and two draws are the same
        distribution as two passes. With dropout inside, one doubled batch is encoded.
        """
        if not self.dropout_inside:
            shared = self.trunk(image)
            return self._drop(shared), self._drop(shared)
        both = self.trunk(torch.cat([image, image]))
        half = len(image)
        return self._drop([level[:half] for level in both]), self._drop([level[half:] for level in both])

    def forward(self, image: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> logits (N, num_outputs, x, y, z)."""
        return self.head(self.decode(self.encode(image)))

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]] | None:
        """The network of `monai.networks.nets` that has the same keys and outputs: its class's name and arguments.

        None where there is none. `harness export --format monai` uses it, and checks that it is so.
        """
        return None

    def part_of(self, key: str) -> str:
        """The part ("encoder", "decoder" or "head") that owns the parameter or buffer named `key`."""
        child = key.split(".")[0]
        for part, children in self.parts.items():
            if child in children:
                return part
        raise KeyError(f"{type(self).__name__}.parts does not say which part owns {key!r}")

    def part_weights(self, parts: tuple[str, ...]) -> dict[str, Tensor]:
        """The tensors that belong to `parts`, on the CPU, under their own names."""
        state = self.state_dict()
        return {key: value.detach().cpu().contiguous() for key, value in state.items() if self.part_of(key) in parts}

    def _drop(self, pyramid: Pyramid) -> Pyramid:
        return [*pyramid[:-1], self.dropout(pyramid[-1])]


def crop(pyramid: Pyramid, strides: Sequence[Triple], origin: Triple, size: Triple) -> Pyramid:
    """Crop every level to one region of the image, so that `decode` runs only there (HybridMIM section III-B).

    Args:
        pyramid: features, fine to coarse.
        strides: the backbone's, one per level.
        origin, size: of the region, in voxels of the image.

    Raises:
        ValueError: the region is not a multiple of the deepest stride, or leaves the image.
    """
    deepest = strides[-1]
    extent = tuple(side * stride for side, stride in zip(pyramid[-1].shape[2:], deepest, strict=True))
    for start, length, step, limit in zip(origin, size, deepest, extent, strict=True):
        if start % step or length % step:
            raise ValueError(f"region {origin} + {size} is not a multiple of the deepest stride {tuple(deepest)}")
        if start < 0 or length <= 0 or start + length > limit:
            raise ValueError(f"region {origin} + {size} leaves the image of {extent}")
    if tuple(size) == extent:
        return list(pyramid)
    margins = [(-start, start + length - limit) for start, length, limit in zip(origin, size, extent, strict=True)]
    cropped = []
    for features, stride in zip(pyramid, strides, strict=True):
        # A negative padding: slices would make their gradient axis by axis, and channels-first.
        padding = [margin // s for both, s in reversed(list(zip(margins, stride, strict=True))) for margin in both]
        cropped.append(F.pad(features, padding))
    return cropped


def inflate(value: Tensor, shape: torch.Size) -> Tensor:
    """A convolution of one input channel for `shape[1]` of them, such that equal channels give what one gave."""
    one_to_many = value.ndim == len(shape) == 5 and value.shape[1] == 1 and shape[1] > 1
    if one_to_many and value.shape[:1] + value.shape[2:] == shape[:1] + shape[2:]:
        return value.repeat(1, shape[1], 1, 1, 1) / shape[1]
    return value
