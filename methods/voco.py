"""VoCo: predict where a crop lies by its similarity to the crops of a fixed grid (Wu et al. 2024)."""

import copy
from collections.abc import Sequence
from math import prod

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Batch, Method, Settings, Size3, Triple, UserError, random_integers, total


class VoCo(Method):
    """Contextual position prediction: overlap with each base crop, by a student and its EMA teacher.

    Source: Wu, Zhuang, Chen, "VoCo: A Simple-yet-Effective Volume Contrastive Learning Framework for 3D Medical Image
    Analysis", CVPR 2024, arXiv:2402.17300; repository Luffy03/VoCo. The losses are those of the repository:
      * The similarity l of a random crop and a base crop is the mean of two cosines, student with teacher and teacher
        with student. Negative cosines count as 0. The overlap y is the share of the random crop that lies in the base
        crop.
      * The loss of pairs that overlap is -y log(1 - |y - l| + 1e-6), summed and divided by the sum of y. The loss of the
        other pairs is the mean of l squared.
      * A third term makes base crops orthogonal: the mean of the squared cosine over their pairs. Negative cosines count
        as 0.
      * The teacher (encoder and projector) follows the student with momentum 0.9. Without a teacher the loss stays flat
        (MIC-DKFZ/nnssl#22).

    Defaults: 4 x 4 x 1 base crops, 2 random crops, projector of three layers with 2048 channels.
    Deviations:
      * The pre-training crop replaces the 384 x 384 x 96 volume. It is divided into 4 x 4 x 1 base crops, which is
        possible for volumes of any size. Base crops and random crops are resized to `view` (released code: 96 to 64).
      * Codes are averages of all levels that are coarser than the image. The released code also averages the skip
        convolutions, which belong to the decoder here.
      * The teacher starts as a copy of the student and moves after the optimizer step. The teacher of the released code
        starts from its own initial weights.
      * Crops are not augmented. The released code flips and turns them with probability 0.2 and shifts intensities with
        probability 0.1.
      * The teacher draws no dropout. The released networks have none.
    """

    name = "voco"
    reference = "Wu et al. 2024, arXiv:2402.17300; github.com/Luffy03/VoCo"
    trains = ("encoder",)
    # Each of 16 base crops of a demo crop would be a few voxels wide, and 36 views per step are too slow for a demo.
    presets = {
        "check": {"method.grid": (2, 4, 1), "method.projection": 64},
        "demo": {"method.grid": (2, 4, 1), "method.projection": 256},
    }

    class Config(Settings):
        """Settings of VoCo: grid of base crops, random crops, view, teacher and projector."""

        grid: Size3 = Field((4, 4, 1), description="base crops along each axis; released code")
        crops: PositiveInt = Field(2, description="random crops of each sample; released code")
        view: Size3 | None = Field(
            None,
            description="extent in voxels to which crops are resized; none: the cell, rounded up to whole strides",
        )
        momentum: float = Field(0.9, ge=0, lt=1, description="of the teacher; released code")
        projection: PositiveInt = Field(2048, description="channels of the projector; released code")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        width, hidden = sum(backbone.channels[level] for level in self._levels()), config.projection
        self.projector = nn.Sequential(
            nn.Linear(width, hidden),
            nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.BatchNorm1d(hidden, affine=False, track_running_stats=False),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
        )
        self.teacher_backbone = copy.deepcopy(backbone)
        self.teacher_backbone.dropout = nn.Identity()
        for child in (*backbone.parts["decoder"], *backbone.parts["head"]):
            # The teacher only encodes.
            if hasattr(self.teacher_backbone, child):
                delattr(self.teacher_backbone, child)
        self.teacher_projector = copy.deepcopy(self.projector)
        for parameter in (*self.teacher_backbone.parameters(), *self.teacher_projector.parameters()):
            parameter.requires_grad_(False)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if the grid does not fit the crop, or if the backbone cannot encode the view."""
        config, stride = self.config, self.backbone.stride
        if prod(config.grid) < 2:
            raise UserError(
                "method.grid=1,1,1 leaves one base crop, so there is no position to predict: set it to 4,4,1"
            )
        if any(edge % number for edge, number in zip(crop, config.grid, strict=True)):
            raise UserError(
                f"method.grid={','.join(map(str, config.grid))} does not divide the crop {','.join(map(str, crop))}: "
                "set pretrain.crop to a multiple of it"
            )
        if any(edge % step for edge, step in zip(self._view(crop), stride, strict=True)):
            raise UserError(
                f"method.view={','.join(map(str, self._view(crop)))} is not a multiple of the deepest stride "
                f"{','.join(map(str, stride))} of backbone {self.backbone.name!r}: set it to one"
            )
        try:
            with torch.no_grad():
                self.backbone.trunk(torch.zeros(2, self.backbone.in_channels, *self._view(crop)))
        except ValueError as error:
            # MONAI's instance norm refuses a single deepest voxel, but attention and group norm accept it. So it is tried.
            raise UserError(
                f"backbone {self.backbone.name!r} cannot encode crops of method.view={','.join(map(str, self._view(crop)))} "
                f"({error}): set method.view to at least twice the stride along one axis"
            ) from None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> the loss terms `overlap`, `apart` and `orthogonal`."""
        image = batch["image"]
        start, overlap = self.draw_crops(image)
        views = torch.cat([self.cut(image, self._base_origins(image)), self.cut(image, start)], dim=1)
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
        encoder = dict(self.backbone.named_parameters())
        for key, parameter in self.teacher_backbone.named_parameters():
            parameter.lerp_(encoder[key], 1 - momentum)
        for parameter, student in zip(self.teacher_projector.parameters(), self.projector.parameters(), strict=True):
            parameter.lerp_(student, 1 - momentum)
        # Buffers are statistics and not learned, so they are copied.
        buffers = dict(self.backbone.named_buffers())
        for key, buffer in self.teacher_backbone.named_buffers():
            buffer.copy_(buffers[key])

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

    def _encode(self, views: Tensor, backbone: Backbone, projector: nn.Module) -> Tensor:
        """Views (N, C, *view) -> codes (N, projection)."""
        pyramid = backbone.encode(views)
        pooled = torch.cat([pyramid[level].mean(dim=(2, 3, 4)) for level in self._levels()], dim=1)
        codes: Tensor = projector(pooled).float()
        return codes

    def _levels(self) -> list[int]:
        """Levels of the pyramid that are coarser than the image."""
        return [level for level, stride in enumerate(self.backbone.strides) if prod(stride) > 1]

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


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(N, I, D) and (N, J, D) -> cosines (N, I, J). Computed in fp32, because values near 1 enter a logarithm."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def overlap_losses(overlap: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor]:
    """Losses of the pairs that overlap (similarity = overlap) and of the others (similarity = 0).

    Args:
        overlap: share of each random crop in each base crop, (N, crops, bases) in [0, 1].
        likeness: similarity of their codes, (N, crops, bases) in [0, 1].
    """
    near = -overlap * torch.log(1 - (overlap - likeness).abs() + 1e-6)
    disjoint = overlap == 0
    apart = total((likeness.square() * disjoint).sum()) / total(disjoint.sum()).clamp_min(1)
    return total(near.sum()) / total(overlap.sum()), apart


def orthogonality(bases: Tensor) -> Tensor:
    """Mean squared cosine over the pairs of base codes (N, K, D). Negative cosines count as 0."""
    number = bases.shape[1]
    # The second code of a pair gets no gradient, as in the released code.
    pairs = cosine(bases, bases.detach()).relu().square()
    return pairs.triu(diagonal=1).sum() / (len(bases) * number * (number - 1) / 2)
