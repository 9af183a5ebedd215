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
    Analysis", CVPR 2024, arXiv:2402.17300; repository Luffy03/VoCo, whose losses these are:
      * l, the similarity of a random crop and a base crop, is the mean of two cosines, student with teacher and teacher with
        student, negative ones cut off; y is the share of the random crop that lies in the base crop.
      * overlapping pairs: -y log(1 - |y - l| + 1e-6), divided by the sum of y; others: mean of l squared;
      * base crops are pushed to be orthogonal: mean over their pairs of the squared cosine, negative ones cut off.
      * The teacher (encoder and projector) follows the student with momentum 0.9. Without it the loss stays flat
        (MIC-DKFZ/nnssl#22).

    Defaults: 4 x 4 x 1 base crops, 2 random crops, projector of three layers with 2048 channels.
    Deviations:
      * The pre-training crop takes the place of the 384 x 384 x 96 volume: base crops are its 4 x 4 x 1 cells, which volumes
        of any size have. Cells are resized to `view` (there 96 to 64).
      * Codes are the averages of all levels coarser than the image; there also of the skip convolutions, which belong to
        the decoder here.
      * The teacher starts as a copy of the student (there: from weights of its own) and moves after the optimizer step.
      * Crops are not augmented (there: flips and quarter turns with probability 0.2, intensity shifts with 0.1).
      * The teacher draws no dropout; the released networks have none.
    """

    name = "voco"
    reference = "Wu et al. 2024, arXiv:2402.17300; github.com/Luffy03/VoCo"
    trains = ("encoder",)
    # 16 cells of a demo crop would each be a few voxels wide, and 36 views a step are not a demonstration's cost.
    presets = {
        "check": {"method.grid": (2, 4, 1), "method.projection": 64},
        "demo": {"method.grid": (2, 4, 1), "method.projection": 256},
    }

    class Config(Settings):
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
            *(nn.Linear(width, hidden), nn.BatchNorm1d(hidden, affine=False, track_running_stats=False), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.BatchNorm1d(hidden, affine=False, track_running_stats=False), nn.ReLU()),
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
        config, stride = self.config, self.backbone.stride
        if prod(config.grid) < 2:
            raise UserError(
                "method.grid=1,1,1 leaves one base crop, so there is no position to predict: set it to 4,4,1"
            )
        if any(edge % cells for edge, cells in zip(crop, config.grid, strict=True)):
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
            # MONAI's instance norm refuses a single deepest voxel; attention and group norm do not.
            raise UserError(
                f"backbone {self.backbone.name!r} cannot encode crops of method.view={','.join(map(str, self._view(crop)))} "
                f"({error}): set method.view to at least twice the stride along one axis"
            ) from None

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `overlap`, `apart` and `orthogonal`."""
        image = batch["image"]
        start, overlap = self.draw_crops(image)
        views = torch.cat([self.cut(image, self._cells(image)), self.cut(image, start)], dim=1)
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
        """The teacher follows the student."""
        momentum = self.config.momentum
        encoder = dict(self.backbone.named_parameters())
        for key, parameter in self.teacher_backbone.named_parameters():
            parameter.lerp_(encoder[key], 1 - momentum)
        for parameter, student in zip(self.teacher_projector.parameters(), self.projector.parameters(), strict=True):
            parameter.lerp_(student, 1 - momentum)
        # Buffers, where a network has any, are statistics and not learned.
        buffers = dict(self.backbone.named_buffers())
        for key, buffer in self.teacher_backbone.named_buffers():
            buffer.copy_(buffers[key])

    def draw_crops(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Random crops: origins (N, crops, 3) in voxels, and each one's share in every base crop (N, crops, bases)."""
        cell = self._cell(image.shape[2:])
        shape = (len(image), self.config.crops)
        axes = [
            random_integers(0, extent - edge, shape, image.device, self.generator)
            for extent, edge in zip(image.shape[2:], cell, strict=True)
        ]
        start = torch.stack(axes, dim=-1)
        shift = (start[:, :, None] - self._cells(image)[:, None]).abs()
        shares = [(1 - shift[..., axis] / edge).clamp_min(0) for axis, edge in enumerate(cell)]
        return start, shares[0] * shares[1] * shares[2]

    def cut(self, image: Tensor, start: Tensor) -> Tensor:
        """Cells that begin at `start` (N, K, 3), resized to the view by trilinear interpolation: (N, K, C, *view)."""
        n, k = start.shape[:2]
        extent, view = image.shape[2:], self._view(image.shape[2:])
        lines = []
        for axis, (length, edge) in enumerate(zip(extent, self._cell(extent), strict=True)):
            # Voxel centres of the view, in the coordinates of grid_sample, which count from -1 to 1.
            inside = (torch.arange(view[axis], device=image.device) + 0.5) * (edge / view[axis])
            lines.append(2 * (start[..., axis, None] + inside) / length - 1)
        x, y, z = lines[0][..., None, None], lines[1][..., None, :, None], lines[2][..., None, None, :]
        # It names the last axis first. One sampling for all cells of a volume: they are laid along its first axis.
        points = torch.stack(torch.broadcast_tensors(z, y, x), dim=-1).view(n, k * view[0], view[1], view[2], 3)
        sampled = F.grid_sample(image, points.to(image.dtype), padding_mode="border", align_corners=False)
        return sampled.view(n, image.shape[1], k, *view).transpose(1, 2)

    def _encode(self, views: Tensor, backbone: Backbone, projector: nn.Module) -> Tensor:
        pyramid = backbone.encode(views)
        pooled = torch.cat([pyramid[level].mean(dim=(2, 3, 4)) for level in self._levels()], dim=1)
        codes: Tensor = projector(pooled).float()
        return codes

    def _levels(self) -> list[int]:
        """Levels of the pyramid that are coarser than the image."""
        return [level for level, stride in enumerate(self.backbone.strides) if prod(stride) > 1]

    def _cell(self, extent: Sequence[int]) -> list[int]:
        return [length // cells for length, cells in zip(extent, self.config.grid, strict=True)]

    def _view(self, extent: Sequence[int]) -> Triple:
        if self.config.view is not None:
            return self.config.view
        x, y, z = (-(-n // t) * t for n, t in zip(self._cell(extent), self.backbone.stride, strict=True))
        return x, y, z

    def _cells(self, image: Tensor) -> Tensor:
        """Origins of the base crops, (1, bases, 3) for `draw_crops` and (N, bases, 3) for `cut`."""
        axes = [
            torch.arange(cells, device=image.device) * edge
            for cells, edge in zip(self.config.grid, self._cell(image.shape[2:]), strict=True)
        ]
        return torch.cartesian_prod(*axes).expand(len(image), -1, -1)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """(N, I, D) and (N, J, D) -> cosines (N, I, J), in full precision: near 1 they enter a logarithm."""
    with torch.autocast(a.device.type, enabled=False):
        return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).transpose(1, 2)


def overlap_losses(overlap: Tensor, likeness: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs that overlap: as alike as they overlap; the others: not alike. Both (N, crops, bases) in [0, 1]."""
    near = -overlap * torch.log(1 - (overlap - likeness).abs() + 1e-6)
    none = overlap == 0
    apart = total((likeness.square() * none).sum()) / total(none.sum()).clamp_min(1)
    return total(near.sum()) / total(overlap.sum()), apart


def orthogonality(bases: Tensor) -> Tensor:
    """Mean squared cosine of the pairs of base codes (N, K, D), negative ones cut off."""
    number = bases.shape[1]
    # The second of a pair is held fixed, as in the released code.
    pairs = cosine(bases, bases.detach()).relu().square()
    return pairs.triu(diagonal=1).sum() / (len(bases) * number * (number - 1) / 2)
