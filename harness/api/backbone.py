"""The contract of a segmentation network, which has three parts: encoder, decoder and head."""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.api.global_batch import Dropout
from harness.api.settings import Settings, Triple, size_text
from harness.system.errors import UserError

Pyramid = list[Tensor]
"""Features of all levels, from fine to coarse. Level l is (N, channels[l], x / strides[l][0], y / strides[l][1], ...)."""


class Backbone(nn.Module):
    """A segmentation network in three parts: encoder, decoder, head.

    A subclass sets `strides`, `channels` and `width` and implements `trunk`, `decode` and `set_head`. The head does
    not exist before `set_head` is called, so that a pretext task that does not use it trains no dead parameters.

    Attributes:
        name: name under which the user selects the network.
        version: version of the implementation; it enters the identity of a run.
        reference: publication of the network.
        presets: preset name -> {"backbone.field": value}. These values replace those of the engine's preset.
        strides: stride of each pyramid level relative to the image, per axis in voxels, from fine to coarse.
        channels: number of channels of each pyramid level.
        width: number of channels that the decoder returns.
        parts: for each part, the names of the child modules that it consists of. A network with published weights keeps
            the child names of those weights and maps them to parts here, so that their state dicts load unchanged.
        abilities: optional abilities that a method may require in its `needs`. "tokens" means that `encode_masked` puts
            the mask token in the place of embedded patches instead of voxels. "sparse" means that a method can compute the
            encoder at some positions only: its layers are `Conv3d`, batch, instance and group norms, poolings that are
            modules or whose windows do not overlap, and functions of one position that map 0 to 0; the backward pass
            computes none of them again.
        token_width: number of channels of a mask token; None means as many as the image has.
        token_stride: edge in voxels of the region that one token stands for; masks must be multiples of it.
        aliases: (pattern, replacement) pairs for `re.sub`, which translate key names of published weights into the
            names used here.
        dropout_inside: whether the trunk itself draws dropout. If it does not, two encodings share one trunk pass.
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
        """Settings of the network. A subclass defines its own `Config`."""

    def __init__(self, config: Settings, in_channels: int, dropout: float = 0.0) -> None:
        """Store the settings and make the dropout.

        Args:
            config: an instance of the class's own `Config`.
            in_channels: channels of the image.
            dropout: dropout probability of the deepest features. It is applied after the trunk, in training only.
        """
        super().__init__()
        self.config = config
        self.in_channels = in_channels
        self.dropout: nn.Module = Dropout(dropout)

    def trunk(self, image: Tensor) -> Pyramid:
        """Image (N, in_channels, x, y, z) -> pyramid, before dropout is applied to the deepest level."""
        raise NotImplementedError(f"{type(self).__name__} must implement trunk(image)")

    def decode(self, pyramid: Pyramid) -> Tensor:
        """Pyramid, whole or cropped by `harness.crop` -> features (N, width, x, y, z) at the resolution of level 0."""
        raise NotImplementedError(f"{type(self).__name__} must implement decode(pyramid)")

    def set_head(self, num_outputs: int) -> None:
        """Attach a new, randomly initialised head that maps `width` channels to `num_outputs`."""
        raise NotImplementedError(f"{type(self).__name__} must implement set_head(num_outputs)")

    def head(self, features: Tensor) -> Tensor:
        """Decoder features (N, width, ...) -> logits (N, num_outputs, ...). `set_head` must have been called before."""
        (name,) = self.parts["head"]
        logits: Tensor = getattr(self, name)(features)
        return logits

    @property
    def coarse_levels(self) -> list[int]:
        """Levels of the pyramid that are coarser than the image."""
        return [level for level, stride in enumerate(self.strides) if prod(stride) > 1]

    @property
    def stride(self) -> Triple:
        """Stride of the deepest level relative to the image, per axis in voxels."""
        return self.strides[-1]

    def encode(self, image: Tensor) -> Pyramid:
        """Image (N, in_channels, x, y, z) -> pyramid from fine to coarse, with dropout on the deepest level."""
        return self._drop(self.trunk(image))

    def encode_masked(self, image: Tensor, mask: Tensor, token: Tensor) -> Pyramid:
        """Encode an image in which a learnable token of the method replaces the masked regions.

        A convolutional network has no tokens: the mask token replaces the masked voxels. A network with the ability
        "tokens" inserts the mask token after its patch embedding (as SimMIM and MAE do), and no other layer may see a
        masked voxel.

        Args:
            image: (N, in_channels, x, y, z).
            mask: (N, 1, x, y, z) bool, True is masked. Along each axis, masked regions are aligned to multiples of
                `token_stride`.
            token: (token_width,), or (in_channels,) if `token_width` is None.

        Returns:
            Pyramid, as from `encode`.
        """
        return self.encode(torch.where(mask, token.view(1, -1, 1, 1, 1).to(image.dtype), image))

    def encode_twice(self, image: Tensor) -> tuple[Pyramid, Pyramid]:
        """Two encodings of one batch with independent dropout, at the lowest cost that keeps their distribution.

        If dropout acts after the trunk only, the trunk is deterministic: one trunk pass with two draws of dropout has the
        same distribution as two passes. If dropout acts inside the trunk, one batch of doubled size is encoded.
        """
        if not self.dropout_inside:
            shared = self.trunk(image)
            return self._drop(shared), self._drop(shared)
        both = self.trunk(torch.cat([image, image]))
        half = len(image)
        return self._drop([level[:half] for level in both]), self._drop([level[half:] for level in both])

    def check_view(self, size: Triple, setting: str) -> None:
        """Check that images of another extent than the crop can be encoded.

        Args:
            size: extent of the images in voxels.
            setting: name of the setting that gives it, for the message.

        Raises:
            UserError: an edge is no multiple of the deepest stride, or the deepest features are a single voxel that a norm
                refuses.
        """
        given = f"{setting}={size_text(size)}"
        if any(edge % step for edge, step in zip(size, self.stride, strict=True)):
            raise UserError(
                f"{given} is not a multiple of the deepest stride {size_text(self.stride)} of backbone {self.name!r}: "
                "set it to one"
            )
        try:
            with torch.no_grad():
                self.trunk(torch.zeros(2, self.in_channels, *size))
        except ValueError as error:
            # MONAI's instance norm refuses a single deepest voxel, but attention and group norm accept it. So it is tried.
            raise UserError(
                f"backbone {self.name!r} cannot encode crops of {given} ({error}): set {setting} to at least twice the "
                "stride along one axis"
            ) from None

    def forward(self, image: Tensor) -> Tensor:
        """Image (N, in_channels, x, y, z) -> logits (N, num_outputs, x, y, z)."""
        return self.head(self.decode(self.encode(image)))

    def supervised_logits(self, image: Tensor) -> list[Tensor]:
        """The logits that fine-tuning compares with the labels, from fine to coarse: (N, num_outputs, x / s, y / s, z / s).

        One level, that of the image, unless the network has deep supervision. Then, as in nnU-Net, the loss of each level
        counts half as much as that of the level before, and the coarsest one counts 0; coarser levels are compared with the
        nearest neighbours of the labels.
        """
        return [self(image)]

    def monai(self, num_outputs: int) -> tuple[str, dict[str, Any]] | None:
        """The equivalent network of `monai.networks.nets`: the name of its class and its arguments, or None.

        The equivalent network has the same state dict keys and the same outputs. `harness export --format monai` uses it,
        and checks that both are the same.
        """
        return None

    def part_of(self, key: str) -> str:
        """The part ("encoder", "decoder" or "head") that owns the parameter or buffer named `key`.

        Raises:
            KeyError: `parts` assigns the module of this key to no part.
        """
        child = key.split(".")[0]
        for part, children in self.parts.items():
            if child in children:
                return part
        raise KeyError(f"{type(self).__name__}.parts does not say which part owns {key!r}")

    def part_weights(self, parts: tuple[str, ...]) -> dict[str, Tensor]:
        """The parameters and buffers of `parts` by their state dict keys, as contiguous tensors on the CPU."""
        state = self.state_dict()
        return {key: value.detach().cpu().contiguous() for key, value in state.items() if self.part_of(key) in parts}

    def _drop(self, pyramid: Pyramid) -> Pyramid:
        return [*pyramid[:-1], self.dropout(pyramid[-1])]


def crop(pyramid: Pyramid, strides: Sequence[Triple], origin: Triple, size: Triple) -> Pyramid:
    """Crop every level to one region of the image, so that `decode` computes only that region (HybridMIM section III-B).

    Args:
        pyramid: features from fine to coarse.
        strides: `Backbone.strides`, one per level.
        origin: first voxel of the region, per axis of the image.
        size: extent of the region, in voxels of the image.

    Raises:
        ValueError: the origin or the size is not a multiple of the deepest stride, or the region leaves the image.
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
        # Negative padding instead of slices, whose gradient is computed axis by axis and comes out channels-first.
        padding = [margin // s for both, s in reversed(list(zip(margins, stride, strict=True))) for margin in both]
        cropped.append(F.pad(features, padding))
    return cropped


def inflate(value: Tensor, shape: torch.Size) -> Tensor:
    """Repeat the weight of a 3D convolution of one input channel for the `shape[1]` input channels of another one.

    The repeated weight is divided by `shape[1]`, so that equal input channels give the output that a single one gave.

    Args:
        value: weight (out, 1, x, y, z). A tensor that cannot be repeated to `shape` is returned unchanged.
        shape: shape of the weight that is needed, (out, in, x, y, z).
    """
    one_to_many = value.ndim == len(shape) == 5 and value.shape[1] == 1 and shape[1] > 1
    if one_to_many and value.shape[:1] + value.shape[2:] == shape[:1] + shape[2:]:
        return value.repeat(1, shape[1], 1, 1, 1) / shape[1]
    return value
