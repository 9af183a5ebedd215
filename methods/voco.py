"""VoCo: predict where a crop lies by its similarity to the crops of a fixed grid (Wu et al. 2024)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
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
    Size3,
    Source,
    Triple,
    UserError,
    VolumeSource,
    follow,
    new_teacher,
    rand,
    random_integers,
    size_text,
)

FLIP, TURN, SHIFT = 0.2, 0.2, 0.1  # probabilities of the released augmentation
OFFSET = 0.1  # largest shift of the intensities, of the range [0, 1]; released code


class VoCo(Method):
    """Contextual position prediction: overlap with each base crop, by a student and its EMA teacher.

    Sources:
      * Wu, Zhuang, Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image
        Analysis", CVPR 2024, arXiv:2402.17300: base crops, overlaps and the three losses.
      * The code released in Luffy03/VoCo. It adds the teacher, which the CVPR paper does not have: by its author it belongs
        to the extension of the paper (issues 15 and 21 of that repository), which is Wu, Zhuang, Chen, "Large-Scale 3D
        Medical Image Pre-training with Geometric Context Priors", TPAMI, arXiv:2410.09890. The code of that extension
        (Luffy03/Large-Scale-Medical) is a later form again: its teacher is a projector only, and it contrasts volumes too.
    This is the form of Luffy03/VoCo:
      * A sample is a whole volume, resized to `pretrain.crop` and divided into 4 x 4 x 1 base crops. So a base crop is the
        same part of the anatomy in every volume.
      * Base crops and random crops of the same size are resized to `view`. Each is flipped along each axis with
        probability 0.2, turned in the xy plane with probability 0.2, and shifted in intensity by up to 0.1 with
        probability 0.1.
      * The similarity l of a random crop and a base crop is the mean of two cosines, student with teacher and teacher
        with student. Negative cosines count as 0. The overlap y is the share of the random crop that lies in the base
        crop.
      * The loss of pairs that overlap is -y log(1 - |y - l| + 1e-6), summed and divided by the sum of y. The loss of the
        other pairs is the mean of l squared. Both are computed for each sample and averaged over samples.
      * A third term makes base crops orthogonal: the mean of the squared cosine over their pairs. Negative cosines count
        as 0.
      * The teacher (encoder and projector) follows the student with momentum 0.9.

    Defaults: 4 x 4 x 1 base crops, 2 random crops, projector of three layers with 2048 channels. The preset `paper` has the
    released sizes: volumes of 384 x 384 x 96, base crops of 96^3, views of 64^3. `small` has 32^3 for both, whose voxels per
    step are about those of other methods. `demo` and `check` have 2 x 4 x 1 base crops.
    Deviations:
      * Codes are averages of the encoder's levels that are coarser than the image: 1488 channels on the default SwinUNETR.
        The released code averages the skip convolutions after the levels of stride 1, 2, 4, 8 and 32 (1152 channels, none
        of stride 16). They belong to the decoder here, and other backbones do not have them.
      * The teacher starts as a copy of the student and moves after the optimizer step. The teacher of the released code
        starts from its own initial weights and moves before its forward pass.
      * If `backbone.dropout` is set, it acts in the student only. By default there is no dropout, as in the released
        networks.
      * The volume is the one that the harness prepares. The released code crops CT to voxels above 0.3 of its window.
      * A random crop may start at any voxel. The released code leaves out the last one.
      * The optimizer is the harness's. Released: AdamW with amsgrad, rate 1e-4.
    """

    name = "voco"
    version = "2"
    reference = "Wu et al. 2024, arXiv:2402.17300; teacher: arXiv:2410.09890; github.com/Luffy03/VoCo"
    trains = ("encoder",)
    # The crop is the whole volume here. Its extent makes base crops cubes.
    presets = {
        "check": {"method.grid": (2, 4, 1), "method.projection": 64},
        "demo": {"method.grid": (2, 4, 1), "method.projection": 256, "pretrain.crop": (64, 128, 32)},
        "small": {"pretrain.crop": (128, 128, 32)},
        "paper": {"method.view": (64, 64, 64), "pretrain.crop": (384, 384, 96)},
    }

    class Config(Settings):
        """Settings of VoCo: what a sample is, grid of base crops, random crops, view, teacher and projector."""

        volume: Literal["whole", "crop"] = Field(
            "whole",
            description="what is divided into base crops: the whole volume, resized to pretrain.crop (released code), or a "
            "random crop of that extent, in which the position in the body is lost",
        )
        grid: Size3 = Field((4, 4, 1), description="base crops along each axis; released code")
        crops: PositiveInt = Field(2, description="random crops of each sample; released code")
        view: Size3 | None = Field(
            None,
            description="extent in voxels to which crops are resized; none: the cell, rounded up to whole strides",
        )
        augment: bool = Field(True, description="flip, turn and shift each crop; released code")
        momentum: float = Field(0.9, ge=0, lt=1, description="of the teacher; released code")
        projection: PositiveInt = Field(2048, description="channels of the projector; released code")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        width, hidden = sum(backbone.channels[level] for level in backbone.coarse_levels), config.projection
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
        )
        self.teacher_backbone = new_teacher(backbone)
        self.teacher_projector = copy.deepcopy(self.projector).requires_grad_(False)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if the grid does not fit the crop, or if the backbone cannot encode the view."""
        config = self.config
        if prod(config.grid) < 2:
            raise UserError(
                "method.grid=1,1,1 leaves one base crop, so there is no position to predict: set it to 4,4,1"
            )
        if any(edge % number for edge, number in zip(crop, config.grid, strict=True)):
            raise UserError(
                f"method.grid={size_text(config.grid)} does not divide the crop {size_text(crop)}: "
                "set pretrain.crop to a multiple of it"
            )
        self.backbone.check_view(self._view(crop), "method.view")
        x, y, _ = self._view(crop)
        if config.augment and x != y:
            raise UserError(
                f"voco turns crops in the xy plane, so the first two edges of method.view={size_text(self._view(crop))} "
                "must be equal: set method.view to such a size, or method.augment=false"
            )

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """Whole volumes as sources, or the volumes themselves, which give random crops."""
        return [WholeVolume(volume) for volume in volumes] if self.config.volume == "whole" else volumes

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> the loss terms `overlap`, `apart` and `orthogonal`."""
        image = batch["image"]
        start, overlap = self.draw_crops(image)
        views = torch.cat([self.cut(image, self._base_origins(image)), self.cut(image, start)], dim=1)
        if self.config.augment:
            views = self.augment(views)
        flat = views.flatten(0, 1)
        student = self._encode(flat, self.backbone, self.projector).view(*views.shape[:2], -1)
        with torch.no_grad():
            teacher = self._encode(flat, self.teacher_backbone, self.teacher_projector).view_as(student)
        number = prod(self.config.grid)
        bases, crops = student[:, :number], student[:, number:]
        likeness = (cosine(crops, teacher[:, :number]).relu() + cosine(teacher[:, number:], bases).relu()) / 2
        near, apart = overlap_losses(overlap, likeness)
        return {"overlap": near, "apart": apart, "orthogonal": orthogonality(bases)}

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, with the configured momentum."""
        momentum = self.config.momentum
        follow(self.teacher_backbone, self.backbone, momentum)
        follow(self.teacher_projector, self.projector, momentum)

    def draw_crops(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Draw random crops of the size of a base crop.

        Returns:
            Origins (N, crops, 3) in voxels, and the share of each random crop in every base crop (N, crops, bases).
        """
        size = self._base_size(image.shape[2:])
        shape = (len(image), self.config.crops)
        axes = [
            random_integers(0, extent - edge, shape, image.device, self.generator)
            for extent, edge in zip(image.shape[2:], size, strict=True)
        ]
        start = torch.stack(axes, dim=-1)
        shift = (start[:, :, None] - self._base_origins(image)[:, None]).abs()
        shares = [(1 - shift[..., axis] / edge).clamp_min(0) for axis, edge in enumerate(size)]
        return start, shares[0] * shares[1] * shares[2]

    def cut(self, image: Tensor, start: Tensor) -> Tensor:
        """Crops of the size of a base crop that start at `start` (N, K, 3) voxels -> (N, K, C, *view), trilinear."""
        n, k = start.shape[:2]
        extent, view = image.shape[2:], self._view(image.shape[2:])
        coordinates = []
        for axis, (length, edge) in enumerate(zip(extent, self._base_size(extent), strict=True)):
            # Voxel centres of the view, in the coordinates of grid_sample, which range from -1 to 1.
            inside = (torch.arange(view[axis], device=image.device) + 0.5) * (edge / view[axis])
            coordinates.append(2 * (start[..., axis, None] + inside) / length - 1)
        x, y, z = (
            coordinates[0][..., None, None],
            coordinates[1][..., None, :, None],
            coordinates[2][..., None, None, :],
        )
        # grid_sample takes coordinates of the last axis first. The crops of an image are stacked along the first axis,
        # so that one call samples all of them.
        points = torch.stack(torch.broadcast_tensors(z, y, x), dim=-1).view(n, k * view[0], view[1], view[2], 3)
        sampled = F.grid_sample(image, points.to(image.dtype), padding_mode="border", align_corners=False)
        return sampled.view(n, image.shape[1], k, *view).transpose(1, 2)

    def augment(self, views: Tensor) -> Tensor:
        """Flip, turn and shift each crop of (N, K, C, x, y, z) by draws of its own. The edges x and y must be equal."""
        drawn = rand((*views.shape[:2], 7), views.device, self.generator)[..., None, None, None, None]
        for axis in range(3):
            views = torch.where(drawn[:, :, axis] < FLIP, views.flip(axis + 3), views)
        turns = torch.where(drawn[:, :, 3] < TURN, 1 + (3 * drawn[:, :, 4]).floor(), 0)
        turned = views
        for number in (1, 2, 3):
            turned = torch.where(turns == number, views.rot90(number, (3, 4)), turned)
        offset = OFFSET * (2 * drawn[:, :, 6] - 1)
        return turned + torch.where(drawn[:, :, 5] < SHIFT, offset, 0).to(views.dtype)

    def _encode(self, views: Tensor, backbone: Backbone, projector: nn.Module) -> Tensor:
        """Views (N, C, *view) -> codes (N, projection)."""
        pyramid = backbone.encode(views)
        pooled = torch.cat([pyramid[level].mean(dim=(2, 3, 4)) for level in self.backbone.coarse_levels], dim=1)
        codes: Tensor = projector(pooled).float()
        return codes

    def _base_size(self, extent: Sequence[int]) -> list[int]:
        """Size of a base crop in voxels."""
        return [length // number for length, number in zip(extent, self.config.grid, strict=True)]

    def _view(self, extent: Sequence[int]) -> Triple:
        """Size in voxels to which crops are resized: the setting, or a base crop rounded up to whole strides."""
        if self.config.view is not None:
            return self.config.view
        x, y, z = (-(-n // t) * t for n, t in zip(self._base_size(extent), self.backbone.stride, strict=True))
        return x, y, z

    def _base_origins(self, image: Tensor) -> Tensor:
        """Origins of the base crops in voxels, (N, bases, 3). They are the same for every sample."""
        axes = [
            torch.arange(number, device=image.device) * edge
            for number, edge in zip(self.config.grid, self._base_size(image.shape[2:]), strict=True)
        ]
        return torch.cartesian_prod(*axes).expand(len(image), -1, -1)


@dataclass(frozen=True)
class WholeVolume:
    """A whole volume, resized to the extent that is asked for: a position in it is a position in the body."""

    volume: VolumeSource

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """The volume as `image` (C, *size), trilinear. Nothing is drawn from `rng`."""
        image = torch.from_numpy(self.volume.image)[None]
        return {"image": F.interpolate(image, size=size, mode="trilinear", align_corners=False)[0].numpy()}


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(N, I, D) and (N, J, D) -> cosines (N, I, J). Computed in fp32, because values near 1 enter a logarithm."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def overlap_losses(overlap: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the pairs that overlap (similarity = overlap) and of the others (similarity = 0), averaged over samples.

    Args:
        overlap: share of each random crop in each base crop, (N, crops, bases) in [0, 1].
        likeness: similarity of their codes, (N, crops, bases) in [0, 1].
    """
    near = -overlap * torch.log(1 - (overlap - likeness).abs() + 1e-6)
    disjoint = (overlap == 0).to(likeness.dtype)
    of_pairs, of_disjoint = near.sum(dim=(1, 2)), (likeness.square() * disjoint).sum(dim=(1, 2))
    near_mean = of_pairs / (overlap.sum(dim=(1, 2)) + 1e-6)
    return near_mean.mean(), (of_disjoint / (disjoint.sum(dim=(1, 2)) + 1e-6)).mean()


def orthogonality(bases: Tensor) -> Tensor:
    """Mean squared cosine over the pairs of base codes (N, K, D). Negative cosines count as 0."""
    number = bases.shape[1]
    # The second code of a pair gets no gradient, as in the released code.
    pairs = cosine(bases, bases.detach()).relu().square()
    return pairs.triu(diagonal=1).sum() / (len(bases) * number * (number - 1) / 2)
