"""SimCLR: two augmented crops of one volume attract each other, those of other volumes repel (Chen et al. 2020)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import (
    Backbone,
    Batch,
    Method,
    Preparation,
    Settings,
    Source,
    Triple,
    UserError,
    VolumeSource,
    gather,
    origins,
    rand,
    randn,
)
from methods.transvw import resize


class SimCLR(Method):
    """Contrast of two views of a volume with the views of the other volumes of the batch.

    Source: Chen, Kornblith, Norouzi, Hinton, "A Simple Framework for Contrastive Learning of Visual Representations", ICML
    2020, arXiv:2002.05709, section 2 and appendix A; repository google-research/simclr. Each volume gives two random
    crops. A crop is resized to the pre-training crop, flipped, and distorted in intensity. The deepest features are
    averaged over space and projected by two layers. The loss is NT-Xent (equation 1) over all 2 N codes of the global
    batch: the two codes of a volume attract, all others repel. Only the encoder is trained and transferred.

    Defaults (paper): temperature 0.1 and codes of 128 numbers (ImageNet), crops of 8 to 100 % with aspect ratios of 3/4 to
    4/3, flip 0.5, jitter 0.8, blur 0.5 with sigma 0.1 to 2 and a kernel of a tenth of the edge.
    Deviations:
      * Volumes differ in size, so that a share of a volume is no scale. 100 % is the pre-training crop here, at the
        resolution of fine-tuning. The share is one of volume, not of area. Aspect ratios hold for each pair of axes.
      * The two crops overlap by at least half of what they could (`overlap`; MIC-DKFZ/nnssl has overlapping crops too).
        In the paper both lie in one image, and need not overlap. A volume may be far larger than a crop.
      * A volume smaller than a crop is padded with zeros, as everywhere here.
      * Flips are along the first axis, which is left-right, as volumes are in RAS order here.
      * Jitter changes brightness and contrast, in this order. The paper also has saturation, hue and grey values, which a
        scan lacks, and draws the order. Gamma and noise (as nnU-Net) take their place.
      * Batch norm in the projector has the moments of the global batch, and no running ones, which nothing would read. The
        paper's formula of the projector (section 2.1) has no batch norm, its released code has it after both layers.
      * The optimizer is AdamW for all methods here, with the batch size of the preset. The paper has LARS and 4096 images.
    `Taleb et al. 2020, arXiv:2006.03829`, which is often cited for SimCLR on volumes, has exemplars with a triplet loss.
    """

    name = "simclr"
    reference = "Chen et al. 2020, arXiv:2002.05709; github.com/google-research/simclr"
    trains = ("encoder",)
    # With a batch of 2, each code has two negatives only.
    presets = {
        "check": {"method.projection": 32},
        "demo": {"pretrain.batch_size": 4},
    }

    class Config(Settings):
        """Settings of SimCLR: crops, distortions, projector, temperature."""

        temperature: float = Field(0.1, gt=0, description="of NT-Xent; ImageNet's in the paper (table 5)")
        projection: PositiveInt = Field(128, description="numbers of a code; section 2.2")
        pool: Literal["all", "deepest"] = Field(
            "all",
            description="levels averaged to a code: all that are coarser than the image, or the deepest as in the paper",
        )
        smallest: float = Field(
            0.08, gt=0, le=1, description="least share of the pre-training crop that a random crop covers; appendix A"
        )
        largest: float = Field(1.0, gt=0, le=1, description="largest such share; appendix A")
        aspect: float = Field(4 / 3, ge=1, description="largest ratio of two relative edges of a crop; appendix A")
        overlap: float = Field(
            0.5, ge=0, le=1, description="least share of their largest possible overlap that two crops have; nnssl"
        )
        flip: tuple[float, float, float] = Field(
            (0.5, 0.0, 0.0), description="probability of a flip along each axis; appendix A: 0.5, left-right"
        )
        jitter: float = Field(0.8, ge=0, le=1, description="probability of jitter; appendix A")
        strength: float = Field(
            0.5,
            ge=0,
            le=1.25,
            description="of jitter: factors differ from 1 by 0.8 times this; released CIFAR-10 command",
        )
        gamma: float = Field(0.3, ge=0, le=1, description="probability of a gamma; nnU-Net")
        gamma_range: tuple[float, float] = Field((0.7, 1.5), description="least and largest gamma; nnU-Net")
        blur: float = Field(0.5, ge=0, le=1, description="probability of a Gaussian blur; appendix A")
        sigma_range: tuple[float, float] = Field(
            (0.1, 2.0), description="least and largest sigma of the blur in voxels; appendix A"
        )
        noise: float = Field(0.1, ge=0, le=1, description="probability of Gaussian noise; nnU-Net")
        noise_level: float = Field(0.05, ge=0, description="largest standard deviation of the noise; here")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        width = sum(backbone.channels[level] for level in pooled_levels(backbone, config.pool))
        self.projector = Projector(width, config.projection)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if there are no negatives, or a range is empty."""
        config = self.config
        if batch_size < 2:
            raise UserError(f"simclr has no negatives in a batch of {batch_size}: set pretrain.batch_size=2 or more")
        if config.smallest > config.largest:
            raise UserError(
                f"method.smallest={config.smallest:g} must not exceed method.largest={config.largest:g}: set it lower"
            )
        check_probabilities("flip", config.flip)
        check_range("gamma_range", config.gamma_range)
        check_range("sigma_range", config.sigma_range)

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """A source of pairs of crops for each volume."""
        c = self.config
        return [CropPair(volume, c.smallest, c.largest, c.aspect, c.overlap) for volume in volumes]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and `second` (N, C, x, y, z), two crops of each volume -> `nt_xent`."""
        return {"nt_xent": nt_xent(self.codes(self.views(batch)), self.config.temperature)}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """Both crops of a volume, and both views of it."""
        views = self.views(batch)
        crops = {"first crop": batch["image"], "second crop": batch["second"]}
        return {**crops, "first view": views[0::2], "second view": views[1::2]}

    def views(self, batch: Batch) -> Tensor:
        """The augmented crops (2 N, C, x, y, z). The two views of a volume are adjacent rows."""
        config, generator = self.config, self.generator
        views = torch.stack([batch["image"], batch["second"]], dim=1).flatten(0, 1)
        views = flip(views, config.flip, generator)
        views = jitter(views, config.jitter, 0.8 * config.strength, generator)
        views = adjust_gamma(views, config.gamma, config.gamma_range, generator)
        views = blur(views, config.blur, config.sigma_range, generator)
        return add_noise(views, config.noise, config.noise_level, generator)

    def codes(self, views: Tensor) -> Tensor:
        """Views (2 N, C, x, y, z) of this part -> codes of all views of the global batch, (2 N * parts, projection)."""
        pooled = pooled_features(self.backbone, views, self.config.pool, self.projector.output_weight.dtype)
        codes: Tensor = self.projector(gather(pooled))
        return codes


def pooled_levels(backbone: Backbone, pool: str) -> list[int]:
    """Levels of the pyramid that are averaged to a code: the deepest, or all that are coarser than the image."""
    return backbone.coarse_levels if pool == "all" else [len(backbone.strides) - 1]


def pooled_features(backbone: Backbone, views: Tensor, pool: str, dtype: torch.dtype) -> Tensor:
    """Views (N, C, x, y, z) -> spatial means of the levels that `pool` names, (N, channels).

    They have the precision of the head: the means of instance-normalised features differ little from crop to crop.
    """
    pyramid = backbone.encode(views)
    return torch.cat([pyramid[level].to(dtype).mean(dim=(2, 3, 4)) for level in pooled_levels(backbone, pool)], dim=1)


def nt_xent(codes: Tensor, temperature: float) -> Tensor:
    """Equation 1 and algorithm 1: NT-Xent, averaged over all codes.

    Args:
        codes: of the global batch, (2 N, D). Rows 2 k and 2 k + 1 belong to one volume.
    """
    with torch.autocast(codes.device.type, enabled=False):
        unit = F.normalize(codes, dim=1)
        similarity = unit @ unit.T / temperature
    rows = torch.arange(len(codes), device=codes.device)
    itself = rows[:, None] == rows
    return F.cross_entropy(similarity.masked_fill(itself, float("-inf")), rows ^ 1)


class Projector(nn.Module):
    """Two layers, each with batch norm, and ReLU between them: (rows, channels) -> (rows, size).

    The rows must be those of the global batch. The second norm has no bias, as in the released code. Computes in fp32.
    """

    def __init__(self, channels: int, size: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, channels, bias=False)
        self.output = nn.Linear(channels, size, bias=False)
        self.hidden_weight, self.hidden_bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.output_weight = nn.Parameter(torch.ones(size))

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features of all rows of the global batch -> their codes."""
        with torch.autocast(pooled.device.type, enabled=False):
            hidden = _batch_norm(self.hidden(pooled), self.hidden_weight, self.hidden_bias).relu()
            return _batch_norm(self.output(hidden), self.output_weight, None)


def _batch_norm(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Batch norm with the moments of `rows` (N, D), in evaluation too. A module of torch would keep running moments."""
    return F.batch_norm(rows, None, None, weight, bias, training=True)


@dataclass(frozen=True)
class CropPair:
    """Draws two overlapping random crops of one volume.

    Attributes:
        volume: the volume.
        smallest, largest: share of the pre-training crop that a random crop covers, in (0, 1].
        aspect: largest ratio of two relative edges.
        overlap: least share of the overlap that two boxes of these sizes could have.
    """

    volume: VolumeSource
    smallest: float
    largest: float
    aspect: float
    overlap: float

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """`image` and `second` (C, *size): two crops, each resized to `size` voxels."""
        crops = [
            resize(self.volume.crop(origin, edges), size) for origin, edges in zip(*self.draw(size, rng), strict=True)
        ]
        return {"image": crops[0], "second": crops[1]}

    def draw(self, size: Triple, rng: np.random.Generator) -> tuple[list[Triple], list[Triple]]:
        """Origins and edges of the two boxes, in voxels of the volume. A box that exceeds the volume contains it."""
        first, second = (random_edges(size, self.smallest, self.largest, self.aspect, rng) for _ in range(2))
        shape = self.volume.shape
        starts: list[list[int]] = [[], []]
        # If each axis has this share, their product is the share of the volume.
        share = self.overlap ** (1 / 3)
        ranges = zip(*origins(shape, first), *origins(shape, second), strict=True)
        for a, b, (low, high, other_low, other_high) in zip(first, second, ranges, strict=True):
            start = int(rng.integers(low, high + 1))
            least = ceil(share * min(a, b) - 1e-9)
            # There is always an origin at which the shorter edge lies in the longer one, so the range is never empty.
            other_low, other_high = max(other_low, start + least - b), min(other_high, start + a - least)
            starts[0].append(start)
            starts[1].append(int(rng.integers(other_low, other_high + 1)))
        return [_triple(starts[0]), _triple(starts[1])], [first, second]


def random_edges(size: Triple, smallest: float, largest: float, aspect: float, rng: np.random.Generator) -> Triple:
    """Edges in voxels of a random box, none longer than `size`.

    Args:
        size: extent of the whole in voxels.
        smallest, largest: the share of the whole is uniform between them.
        aspect: largest ratio of two edges relative to `size`; ratios are log-uniform.
    """
    share = rng.uniform(smallest, largest)
    stretch = rng.uniform(-log(aspect) / 2, log(aspect) / 2, size=3)
    relative = share ** (1 / 3) * np.exp(stretch - stretch.mean())
    return _triple([max(1, min(edge, round(edge * factor))) for edge, factor in zip(size, relative, strict=True)])


def _triple(values: Sequence[int]) -> Triple:
    x, y, z = (int(value) for value in values)
    return x, y, z


def check_range(name: str, bounds: tuple[float, float]) -> None:
    """Raise UserError unless the setting `name` is a range of positive numbers."""
    low, high = bounds
    if not 0 < low <= high:
        raise UserError(f"method.{name}={low:g},{high:g} is no range of positive numbers: give the lower one first")


def check_probabilities(name: str, values: Sequence[float]) -> None:
    """Raise UserError unless all values of the setting `name` are probabilities."""
    if any(not 0 <= value <= 1 for value in values):
        given = ",".join(f"{value:g}" for value in values)
        raise UserError(f"method.{name}={given} must be three probabilities: set them within 0 to 1")


def chosen(views: Tensor, probability: float | Tensor, generator: torch.Generator | None) -> Tensor:
    """Which views a distortion acts on, (N, 1, 1, 1, 1) bool.

    Args:
        probability: one number, or one for each view, of shape (N, 1, 1, 1, 1).
    """
    return _uniform(views, 0, 1, generator) < probability


def _uniform(views: Tensor, low: float, high: float, generator: torch.Generator | None) -> Tensor:
    """One uniform random number for each view, (N, 1, 1, 1, 1)."""
    return low + (high - low) * rand((len(views), 1, 1, 1, 1), views.device, generator)


def flip(views: Tensor, probabilities: Sequence[float], generator: torch.Generator | None) -> Tensor:
    """Flip each view (N, C, x, y, z) along each of the three axes with that axis' probability, independently."""
    for axis, probability in enumerate(probabilities, start=2):
        views = torch.where(chosen(views, probability, generator), views.flip(axis), views)
    return views


def jitter(views: Tensor, probability: float, strength: float, generator: torch.Generator | None) -> Tensor:
    """Multiply brightness, then contrast about the view's mean, by factors in 1 - strength .. 1 + strength.

    Factors below 0 count as 0. Intensities are cut to [0, 1] after each of the two, as in the released code.
    """
    low, high = max(1 - strength, 0), 1 + strength
    bright = (views * _uniform(views, low, high, generator)).clamp(0, 1)
    mean = bright.mean(dim=(2, 3, 4), keepdim=True)
    contrast = (mean + (bright - mean) * _uniform(views, low, high, generator)).clamp(0, 1)
    return torch.where(chosen(views, probability, generator), contrast, views)


def adjust_gamma(
    views: Tensor, probability: float | Tensor, bounds: tuple[float, float], generator: torch.Generator | None
) -> Tensor:
    """Raise the intensities in [0, 1] of a view to a power that is uniform within `bounds`."""
    power = _uniform(views, *bounds, generator)
    return torch.where(chosen(views, probability, generator), views**power, views)


def blur(
    views: Tensor, probability: float | Tensor, bounds: tuple[float, float], generator: torch.Generator | None
) -> Tensor:
    """Gaussian blur of a view with a sigma in voxels that is uniform within `bounds`.

    The kernel spans a tenth of each edge, as in the paper, but at least three voxels. The border is repeated.
    """
    sigma = _uniform(views, *bounds, generator)
    blurred = views
    for axis, edge in enumerate(views.shape[2:]):
        radius = max(1, edge // 20)
        offset = torch.arange(-radius, radius + 1, device=views.device)
        weight = torch.exp(-offset.square() / (2 * sigma.square()))
        weight = weight / weight.sum(dim=4, keepdim=True)
        pad = [0] * 6
        pad[4 - 2 * axis] = pad[5 - 2 * axis] = radius
        padded = F.pad(blurred, pad, mode="replicate")
        blurred = sum(weight[..., k : k + 1] * padded.narrow(axis + 2, k, edge) for k in range(2 * radius + 1))  # type: ignore[assignment]
    return torch.where(chosen(views, probability, generator), blurred, views)


def add_noise(views: Tensor, probability: float | Tensor, level: float, generator: torch.Generator | None) -> Tensor:
    """Add Gaussian noise to a view, with a standard deviation that is uniform within 0 .. `level`; cut to [0, 1]."""
    noise = _uniform(views, 0, level, generator) * randn(views.shape, views.device, generator)
    return torch.where(chosen(views, probability, generator), (views + noise.to(views.dtype)).clamp(0, 1), views)
