"""SparK: sparse and hierarchical masked modelling for convolutional networks (Tian et al. 2023)."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from math import prod
from typing import Any, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness import (
    Backbone,
    Batch,
    Method,
    Pyramid,
    Settings,
    Size3,
    Triple,
    UserError,
    num_masked,
    random_patches,
    size_text,
    to_voxels,
    total,
)

MASKED = nn.Conv3d | nn.MaxPool3d | nn.AvgPool3d


class Spark(Method):
    """Encode only the visible patches, put an embedding in every empty position of every level, restore what is masked.

    Source: Tian, Jiang, Diao, Lin, Wang, Yuan, "Designing BERT for Convolutional Networks: Sparse and Hierarchical Masked
    Modeling", ICLR 2023, arXiv:2301.03580, section 3; repository keyu-tian/SparK (`pretrain/`). `docs/methods/spark.md`
    compares paper and released code with this class, line by line.

      * Sparse. No layer of the encoder sees a masked voxel. After every convolution, pooling and norm, masked positions are
        0 again, so that the mask does not shrink from layer to layer. Norms use the moments of visible positions only.
      * Hierarchical. Masked positions of every level get the learned embedding of that level. The decoder starts at the
        deepest level and takes in one finer level after another.
      * Target. Each patch has mean 0 and deviation 1. The loss is the squared error of masked patches.

    `decoder` chooses the decoder. "light" is the paper's: it is left behind, and the encoder alone is transferred.
    "backbone" is the network's own, which is then transferred, too (nnssl trains its U-Nets in this way).

    Deviations:
      * The image has three dimensions and any number of channels. A patch is masked in all modalities at once.
      * The pyramid begins at the image's own resolution, the paper's at stride 4. The finest level enters the light decoder
        just before its last layer.
      * The light decoder, and the norms before the embeddings, have instance norm, the released code batch norm of 4096
        images. Batches here have a few crops, and micro-batches must not change a result.
      * The light decoder is as wide as the deepest level, and half as wide at each finer one. Released code: 768.
      * The number of visible patches is rounded down as in all methods here, the released code rounds to the nearest.
      * Intensities are in [0, 1] as in all methods here. The constant that is added to a patch's variance, 1e-6, is the
        released code's, which standardises its images.
    A masked convolution computes all positions and sets some to 0, as in the released code: masking saves no time.
    The encoder must have the ability "sparse" (see `harness.Backbone`). Batch norm needs the whole batch at once, so that
    micro-batches are refused on such backbones, as for every method.
    """

    name = "spark"
    reference = "Tian et al. 2023, arXiv:2301.03580; github.com/keyu-tian/SparK"
    trains: tuple[str, ...] = ("encoder",)
    needs = frozenset({"sparse"})
    variants = {"light": {}, "backbone": {"method.decoder": "backbone"}}

    class Config(Settings):
        """Settings of SparK: masking, and the decoder."""

        mask_ratio: float = Field(0.6, gt=0, lt=1, description="share of patches masked; the paper's 60 %")
        patch: Size3 | None = Field(
            None,
            description="edge of a masked patch in voxels, a multiple of the deepest stride; none: that stride, so that a "
            "patch is one voxel of the deepest level, as in the paper",
        )
        decoder: Literal["light", "backbone"] = Field(
            "light", description="light: the paper's, not transferred; backbone: the network's own, transferred (nnssl)"
        )
        width: PositiveInt | None = Field(
            None,
            description="channels of the light decoder at the deepest level, halved at each finer one; none: those of the "
            "encoder's deepest level, or the next number that can be halved so often; released code: 768",
        )

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.patch = config.patch or backbone.stride
        self.encoder = SparseEncoder(backbone)
        self.tokens = nn.ParameterList(_new_embedding(width) for width in backbone.channels)
        if config.decoder == "light":
            halvings = 2 ** (len(backbone.channels) - 1)
            self.light = LightDecoder(backbone, config.width or -(-backbone.channels[-1] // halvings) * halvings)
            # The released code normalises a level before it fills it. The network's own decoder gets the features as they are.
            self.norms = nn.ModuleList(nn.InstanceNorm3d(width, affine=True) for width in backbone.channels)
        else:
            self.trains = ("encoder", "decoder")
            self.predict = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if patches do not fit the crop or the deepest level, or a layer cannot be computed sparsely."""
        config, stride, name = self.config, self.backbone.stride, self.backbone.name
        if self.encoder.unsuitable:
            raise UserError(
                f"spark cannot compute {self.encoder.unsuitable[0]} of backbone {name!r} at visible voxels only: choose "
                "another --backbone"
            )
        if any(edge % step for edge, step in zip(self.patch, stride, strict=True)):
            raise UserError(
                f"method.patch={size_text(self.patch)} is not a multiple of the deepest stride {size_text(stride)} of backbone "
                f"{name!r}, so that a deepest voxel would be masked in part: set it to a multiple, or to none"
            )
        masked, number = num_masked(crop, self.patch, config.mask_ratio)
        if (number - masked) * prod(self.patch) < 2 * prod(stride):
            raise UserError(
                f"method.mask_ratio={config.mask_ratio:g} leaves one visible voxel of the deepest features of backbone "
                f"{name!r} in the crop {size_text(crop)}, which cannot be normalised: set a lower ratio or a larger pretrain.crop"
            )
        halvings = 2 ** (len(self.backbone.channels) - 1)
        if config.width is not None and config.width % halvings:
            raise UserError(
                f"method.width={config.width} cannot be halved at each of the {len(self.backbone.channels)} levels of "
                f"backbone {name!r}: set it to a multiple of {halvings}"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `reconstruction`, mean squared error over the normalised masked patches."""
        image = batch["image"]
        hidden = self.draw_mask(image)
        target, _, _ = normalised(to_patches(image, self.patch))
        error = (to_patches(self.restore(image, hidden), self.patch) - target).square().mean(dim=-1)
        # The number of masked patches is the same in all parts of a batch, so that the mean over parts is that of the batch.
        return {"reconstruction": (error * hidden).sum() / hidden.sum()}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The image, its visible patches, and beside them the predicted ones with the mean and deviation of the true ones."""
        image = batch["image"]
        hidden = self.draw_mask(image)
        _, mean, spread = normalised(to_patches(image, self.patch))
        predicted = to_patches(self.restore(image, hidden), self.patch) * spread + mean
        restored = from_patches(predicted, self.patch, image.shape[1]).clamp(0, 1)
        mask = to_voxels(hidden, self.patch)
        return {
            "image": image,
            "what it sees": torch.where(mask, 0.0, image),
            "what it restores": torch.where(mask, restored, image.float()),
        }

    def draw_mask(self, image: Tensor) -> Tensor:
        """Mask of patches, (N, patches x, y, z) bool, True is masked."""
        return random_patches(image, self.patch, self.config.mask_ratio, self.generator)

    def restore(self, image: Tensor, hidden: Tensor) -> Tensor:
        """Image (N, C, x, y, z) and patch mask (N, x, y, z), True is masked -> predicted normalised patches, as an image."""
        dense = self.densify(self.encoder.encode(image, hidden), hidden)
        if self.config.decoder == "light":
            restored: Tensor = self.light(dense)
        else:
            restored = self.predict(self.backbone.decode(dense))
        return restored.float()

    def densify(self, pyramid: Pyramid, hidden: Tensor) -> Pyramid:
        """Sparse features -> dense ones: each masked position of a level gets the embedding of that level."""
        dense = []
        for level, (features, token) in enumerate(zip(pyramid, self.tokens, strict=True)):
            mask = at_resolution(hidden, features)
            if self.config.decoder == "light":
                features = sparse_norm(self.norms[level], features, ~mask)
            dense.append(torch.where(mask, token.view(1, -1, 1, 1, 1).to(features.dtype), features))
        return dense


class SparseEncoder:
    """Computes the encoder of a backbone at visible positions only, without a change of the backbone.

    While `encode` runs, its convolutions, norms and poolings have another `forward`. Afterwards they are what they were, so
    that the backbone can be copied, saved and used densely.

    Attributes:
        unsuitable: class names of layers with weights that are neither convolutions nor norms that it can compute.
    """

    def __init__(self, backbone: Backbone) -> None:
        self.backbone = backbone
        self.masks: dict[tuple[int, ...], Tensor] = {}
        self.unsuitable: list[str] = []
        self.forwards: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = []
        parts = [getattr(backbone, child) for child in backbone.parts["encoder"]]
        for layer in (layer for part in parts for layer in part.modules()):
            if isinstance(layer, MASKED):
                self.forwards.append((layer, partial(_masked_output, layer, self)))
            elif isinstance(layer, nn.GroupNorm | _BatchNorm) or _is_instance_norm(layer):
                self.forwards.append((layer, partial(_masked_norm, layer, self)))
            elif any(True for _ in layer.parameters(recurse=False)) and not isinstance(layer, nn.PReLU):
                self.unsuitable.append(type(layer).__name__)

    def encode(self, image: Tensor, hidden: Tensor) -> Pyramid:
        """Image (N, C, x, y, z) and patch mask (N, x, y, z), True is masked -> pyramid that is 0 at masked positions."""
        self.masks = {}
        self.hidden = hidden
        visible_image = torch.where(self.mask(image), 0.0, image)
        for layer, forward in self.forwards:
            layer.forward = forward
        try:
            return self.backbone.encode(visible_image)
        finally:
            for layer, _ in self.forwards:
                del layer.forward
            del self.hidden
            self.masks = {}

    def mask(self, features: Tensor) -> Tensor:
        """The mask at the resolution of `features` (N, C, x, y, z): (N, 1, x, y, z) bool, True is masked."""
        size = tuple(features.shape[2:])
        if size not in self.masks:
            self.masks[size] = at_resolution(self.hidden, features)
        return self.masks[size]


class LightDecoder(nn.Module):
    """The decoder of SparK: from the deepest level up, each level is projected and added before the next upsampling.

    A block is a transposed convolution, a convolution with norm and ReLU6, and a convolution with norm that halves the channels
    (released code, `pretrain/decoder.py`).
    """

    def __init__(self, backbone: Backbone, width: int) -> None:
        super().__init__()
        # `Spark.check` refuses a width that cannot be halved so often, but a decoder is built before that.
        widths = [max(1, width // 2**depth) for depth in range(len(backbone.channels))]
        deepest, *finer = reversed(backbone.channels)
        self.project = nn.ModuleList([nn.Identity() if deepest == width else nn.Conv3d(deepest, width, kernel_size=1)])
        self.project.extend(
            nn.Conv3d(channels, out, kernel_size=3, padding=1) for channels, out in zip(finer, widths[1:], strict=True)
        )
        strides = list(reversed(backbone.strides))
        steps = [(a // x, b // y, c // z) for (a, b, c), (x, y, z) in pairwise(strides)]
        self.blocks = nn.ModuleList(
            _up_block(wide, narrow, step) for wide, narrow, step in zip(widths[:-1], widths[1:], steps, strict=True)
        )
        self.predict = nn.Conv3d(widths[-1], backbone.in_channels, kernel_size=1)
        for layer in [*self.blocks.modules(), self.predict]:
            if isinstance(layer, nn.Conv3d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            elif isinstance(layer, nn.ConvTranspose3d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if isinstance(layer, nn.Conv3d | nn.ConvTranspose3d) and layer.bias is not None:
                nn.init.zeros_(layer.bias)

    def forward(self, pyramid: Pyramid) -> Tensor:
        """Dense pyramid, fine to coarse -> (N, in_channels, x, y, z) at the resolution of level 0."""
        deepest, *finer = reversed(pyramid)
        first, *others = self.project
        features: Tensor = first(deepest)
        for block, project, level in zip(self.blocks, others, finer, strict=True):
            features = block(features) + project(level)
        restored: Tensor = self.predict(features)
        return restored


def _up_block(wide: int, narrow: int, step: Triple) -> nn.Sequential:
    """(N, wide, x, y, z) -> (N, narrow, x * step[0], y * step[1], z * step[2])."""
    # These extents multiply the size by `step` exactly; for a step of 2 they are the published kernel of 4 and padding of 1.
    x, y, z = padding = (step[0] // 2, step[1] // 2, step[2] // 2)
    kernel = (step[0] + 2 * x, step[1] + 2 * y, step[2] + 2 * z)
    return nn.Sequential(
        nn.ConvTranspose3d(wide, wide, kernel_size=kernel, stride=step, padding=padding),
        nn.Conv3d(wide, wide, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm3d(wide, affine=True),
        nn.ReLU6(inplace=True),
        nn.Conv3d(wide, narrow, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm3d(narrow, affine=True),
    )


def _masked_output(layer: nn.Module, encoder: SparseEncoder, features: Tensor) -> Tensor:
    """The output of a convolution or a pooling, 0 at masked positions of its own resolution."""
    # The class's forward, because the layer's own is this function. The class may have been replaced since `__init__`.
    out: Tensor = type(layer).forward(layer, features)
    # `where` keeps channels-last; `masked_fill` with a mask of one channel does not.
    return torch.where(encoder.mask(out), 0.0, out)


def _masked_norm(layer: nn.Module, encoder: SparseEncoder, features: Tensor) -> Tensor:
    """The output of a norm over visible positions, 0 at masked ones."""
    return sparse_norm(layer, features, ~encoder.mask(features))


def sparse_norm(layer: Any, features: Tensor, visible: Tensor) -> Tensor:
    """A batch, instance or group norm of visible positions; masked positions become 0 and do not count.

    Batch norm uses the moments of the global batch, in evaluation too: a pretext task is evaluated on whole batches. In training
    it updates its running moments with them.

    Args:
        layer: a batch norm, an instance norm without running moments, or a group norm.
        features: (N, C, x, y, z).
        visible: (N, 1, x, y, z) bool.

    Returns:
        The normalised features, in the same shape, type and layout.
    """
    batch_norm = isinstance(layer, _BatchNorm)
    wide = features if features.dtype == torch.float64 else features.float()
    groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else features.shape[1]
    blocks, shown = wide.unflatten(1, (groups, -1)), visible[:, :, None]
    axes = (0, 2, 3, 4, 5) if batch_norm else (2, 3, 4, 5)
    count = shown.sum(axes, keepdim=True).to(wide.dtype) * blocks.shape[2]
    over_parts = total if batch_norm else _same
    count = over_parts(count)
    mean = over_parts(torch.where(shown, blocks, 0.0).sum(axes, keepdim=True)) / count
    centred = torch.where(shown, blocks - mean, 0.0)
    variance = over_parts(centred.square().sum(axes, keepdim=True)) / count
    if batch_norm and layer.training:
        _update_running(layer, mean.detach().flatten(), variance.detach().flatten(), count.flatten())
    out = (centred * (variance + layer.eps).rsqrt()).flatten(1, 2)
    if layer.weight is not None:
        out = out * layer.weight.view(1, -1, 1, 1, 1)
    if layer.bias is not None:
        out = out + layer.bias.view(1, -1, 1, 1, 1) * visible
    return out.to(features.dtype)


@torch.no_grad()
def _update_running(layer: _BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    """Update running moments, where a batch norm has them, with the mean and the unbiased variance (C,) of `count` values."""
    if layer.running_mean is None or layer.running_var is None or layer.num_batches_tracked is None:
        return
    layer.num_batches_tracked += 1
    momentum = 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum
    layer.running_mean.lerp_(mean.to(layer.running_mean), momentum)
    layer.running_var.lerp_((variance * count / (count - 1)).to(layer.running_var), momentum)


def _same(values: Tensor) -> Tensor:
    return values


def _is_instance_norm(layer: nn.Module) -> bool:
    """Whether a layer is an instance norm that uses the moments of its input always."""
    return isinstance(layer, nn.InstanceNorm3d) and not layer.track_running_stats


def at_resolution(hidden: Tensor, features: Tensor) -> Tensor:
    """Patch mask (N, x, y, z) -> the mask (N, 1, x', y', z') at the resolution of `features` (N, C, x', y', z')."""
    return to_voxels(
        hidden, [size // patches for size, patches in zip(features.shape[2:], hidden.shape[1:], strict=True)]
    )


def to_patches(image: Tensor, patch: Triple) -> Tensor:
    """Image (N, C, x, y, z) -> its patches (N, x / patch[0], y / patch[1], z / patch[2], C * voxels of a patch)."""
    n, channels, *size = image.shape
    x, y, z = (length // edge for length, edge in zip(size, patch, strict=True))
    blocks = image.reshape(n, channels, x, patch[0], y, patch[1], z, patch[2])
    return blocks.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)


def from_patches(patches: Tensor, patch: Triple, channels: int) -> Tensor:
    """The inverse of `to_patches`."""
    n, x, y, z, _ = patches.shape
    blocks = patches.view(n, x, y, z, channels, *patch).permute(0, 4, 1, 5, 2, 6, 3, 7)
    return blocks.reshape(n, channels, x * patch[0], y * patch[1], z * patch[2])


def normalised(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (..., values) -> with mean 0 and deviation 1 each, their means (..., 1), and their deviations (..., 1).

    The variance is unbiased, and 1e-6 is added to it (released code), so that a patch of one intensity becomes 0.
    """
    wide = patches.float()
    mean = wide.mean(dim=-1, keepdim=True)
    spread = (wide.var(dim=-1, keepdim=True) + 1e-6).sqrt()
    return (wide - mean) / spread, mean, spread


def _new_embedding(width: int) -> nn.Parameter:
    """A mask embedding (width,), drawn as in the released code: normal of deviation 0.02, cut off at 0.02."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02, a=-0.02, b=0.02))
