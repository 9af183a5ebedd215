"""DINO: a student predicts, from any crop of a volume, what its own average says of the large ones (Caron et al. 2021)."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import cos, pi, prod
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, NonNegativeInt, PositiveInt
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
    gather,
    new_teacher,
    origins,
    random_origin,
    size_text,
)
from methods.simclr import (
    adjust_gamma,
    blur,
    check_probabilities,
    check_range,
    flip,
    jitter,
    pooled_features,
    pooled_levels,
    random_edges,
)
from methods.transvw import resize

KEEPS = 0.1  # share of its initial weights that a teacher may keep without a remark


class DINO(Method):
    """Self-distillation with multi-crop: a student follows the assignment of a volume's crops by its EMA teacher.

    Source: Caron, Touvron, Misra, Jegou, Mairal, Bojanowski, Joulin, "Emerging Properties in Self-Supervised Vision
    Transformers", ICCV 2021, arXiv:2104.14294, section 3 and appendix C; repository facebookresearch/dino. Volumes: Xu et
    al., "A generalizable 3D framework and model for self-supervised learning in medical imaging" (3DINO), 2025,
    arXiv:2501.11755, which has the objective of DINOv2 (Oquab et al. 2023, arXiv:2304.07193). Two global and several local
    crops of a region are augmented. The student encodes all of them, the teacher the global ones. Both end in a head whose
    outputs are cosines with K prototypes. The teacher's outputs are balanced by Sinkhorn-Knopp (or centred) and sharpened.
    The loss is the cross-entropy of each teacher output with each student output of another crop of the same volume. The
    centre and the loss are those of the global batch. Only the encoder is trained and transferred.

    The loss is given as two terms, as in section 5.3: `entropy` of the teacher, which has no gradient, and `divergence` of
    the student from it. So the history of a run shows a collapse: the divergence falls to 0, and the entropy is 0 (one
    prototype for all) or log K (no preference).

    Defaults (paper): student temperature 0.1, momentum 0.996 to 1 by a cosine, centre momentum 0.9, 8 local crops of 5 to
    40 %, global ones of 40 to 100 %, head of three layers with 2048 channels and a bottleneck of 256; teacher temperature
    0.04 to 0.07 in the first 30 % of the training.
    Deviations:
      * 256 prototypes, where the papers have 65536 for 1024 images or more: 32 for each teacher output of a batch, which is
        that ratio for 4 volumes.
      * 100 % is a random region of the extent of the pre-training crop, at the resolution of fine-tuning; 3DINO's is the
        whole volume. The share is one of volume. Global crops are resized to that extent, local ones to half of it.
      * Codes are averages of all levels that are coarser than the image, as convolutional networks have no class token.
      * Distortions: flips along the first axis, jitter of brightness and contrast, gamma (3DINO), blur. There is no
        saturation, hue, grey value and solarisation; no quarter turn, sharpening, histogram shift, Gibbs and Gaussian noise.
      * Codes get batch norm before the head, over the global batch, each kind of crop by itself. The averages of
        instance-normalised features are nearly alike in all crops, and without it the teacher ends at log K.
      * The temperature rises by steps, in the papers by epochs. The last layer is trained from the first step, in the paper
        from the second epoch on. Weight decay does not change, and the optimizer's settings are those of all methods here.
      * DINOv2 and 3DINO add masked patch prediction (iBOT) and KoLeo. Here is the image-level objective only.
      * The teacher draws no dropout.
    """

    name = "dino"
    reference = (
        "Caron et al. 2021, arXiv:2104.14294; Xu et al. 2025, arXiv:2501.11755; github.com/facebookresearch/dino"
    )
    trains = ("encoder",)
    # With 0.996, a teacher keeps two thirds of its initial weights over 200 steps. Cosines of 256 channels spread too little
    # for a temperature of 0.07 until the prototypes are trained: the teacher stays near log K. So it does with 256 prototypes
    # for the 4 teacher outputs of a batch of 2: Sinkhorn-Knopp then gives each output an equal share of them.
    presets = {
        "check": {
            "method.local_crops": 2,
            "method.hidden": 64,
            "method.bottleneck": 64,
            "method.prototypes": 32,
            "method.momentum": 0.8,
        },
        "demo": {
            "pretrain.batch_size": 4,
            "method.prototypes": 64,
            "method.local_crops": 4,
            "method.hidden": 512,
            "method.bottleneck": 64,
            "method.teacher_temperature": 0.04,
            "method.momentum": 0.9,
        },
    }

    class Config(Settings):
        """Settings of DINO: crops, distortions, head, temperatures, centring, teacher."""

        prototypes: int = Field(
            256, ge=2, description="K, outputs of the head; 65536 in the papers, fewer for small batches"
        )
        hidden: PositiveInt = Field(2048, description="channels of the head's hidden layers; appendix C")
        bottleneck: PositiveInt = Field(256, description="channels that the prototypes are compared with; appendix C")
        pool: Literal["all", "deepest"] = Field(
            "all",
            description="which levels are averaged to a code: all that are coarser than the image, or the deepest; here",
        )
        batch_norm: bool = Field(
            True,
            description="batch norm of the codes before the head, over the global batch; here (released: none by default)",
        )
        local_crops: NonNegativeInt = Field(8, description="local crops of each sample; section 3.1, released code")
        global_share: tuple[float, float] = Field(
            (0.4, 1.0), description="least and largest share of the region that a global crop covers; released code"
        )
        local_share: tuple[float, float] = Field(
            (0.05, 0.4), description="least and largest share of the region that a local crop covers; released code"
        )
        aspect: float = Field(4 / 3, ge=1, description="largest ratio of two relative edges of a crop; released code")
        local_view: Size3 | None = Field(
            None,
            description="extent in voxels to which local crops are resized; none: half of the crop (3DINO: 48 of 96), rounded "
            "up to whole strides",
        )
        centring: Literal["centre", "sinkhorn"] = Field(
            "sinkhorn", description="what keeps the teacher from collapse; centre: DINO, sinkhorn: DINOv2 and 3DINO"
        )
        centre_momentum: float = Field(0.9, ge=0, lt=1, description="of the centre; section 3.1, released code")
        student_temperature: float = Field(0.1, gt=0, description="section 3.2")
        teacher_temperature: float = Field(0.07, gt=0, description="after its warm-up; section 3.2 and 3DINO")
        first_temperature: float = Field(
            0.04, gt=0, description="of the teacher at the first step; section 3.2 and 3DINO"
        )
        temperature_warmup: float = Field(
            0.3,
            ge=0,
            le=1,
            description="share of the training in which it rises; section 3.2: 30 epochs, of 100 in 3DINO",
        )
        momentum: float = Field(0.996, ge=0, le=1, description="of the teacher at the first step; section 3.1")
        last_momentum: float = Field(1.0, ge=0, le=1, description="of the teacher at the end; section 3.1")
        transfer: Literal["teacher", "student"] = Field(
            "teacher", description="whose encoder is handed over; the teacher in the released code"
        )
        flip: tuple[float, float, float] = Field(
            (0.5, 0.0, 0.0), description="probability of a flip along each axis; released code: 0.5, left-right"
        )
        jitter: float = Field(0.8, ge=0, le=1, description="probability of jitter; released code")
        strength: float = Field(0.4, ge=0, le=1, description="of jitter: largest change of its factors; released code")
        gamma: float = Field(0.3, ge=0, le=1, description="probability of a gamma; 3DINO: 0.8 of a third")
        gamma_range: tuple[float, float] = Field((0.5, 2.0), description="least and largest gamma; 3DINO")
        blur: tuple[float, float, float] = Field(
            (1.0, 0.1, 0.5),
            description="probability of a blur of the first, the second global and a local crop; released code",
        )
        sigma_range: tuple[float, float] = Field(
            (0.1, 2.0), description="least and largest sigma of the blur in voxels; released code"
        )

    config: Config
    centre: Tensor
    step: Tensor

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        width = sum(backbone.channels[level] for level in pooled_levels(backbone, config.pool))
        self.head = Head(width, config.hidden, config.bottleneck, config.prototypes)
        self.teacher_backbone = new_teacher(backbone)
        self.teacher_head = copy.deepcopy(self.head).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(config.prototypes))
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.steps = 0  # of the training; `prepare` sets it
        self.teacher_mean: Tensor | None = None  # of the batch, from the forward pass to `after_step`

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if a range is empty, there is nothing to compare, or the backbone cannot encode local views."""
        config = self.config
        if config.batch_norm and batch_size < 2:
            raise UserError(
                f"dino's batch norm has one volume only in a batch of {batch_size}: set pretrain.batch_size=2 or more, or "
                "method.batch_norm=false"
            )
        for name in ("global_share", "local_share", "gamma_range", "sigma_range"):
            check_range(name, getattr(config, name))
        for name in ("global_share", "local_share"):
            if getattr(config, name)[1] > 1:
                raise UserError(f"method.{name} ends with {getattr(config, name)[1]:g}: set it to a share, at most 1")
        check_probabilities("flip", config.flip)
        check_probabilities("blur", config.blur)
        if config.momentum > config.last_momentum:
            raise UserError(
                f"method.momentum={config.momentum:g} must not exceed method.last_momentum={config.last_momentum:g}: "
                "set it lower"
            )
        if config.local_crops:
            view = self._local_view(crop)
            if any(edge > whole for edge, whole in zip(view, crop, strict=True)):
                raise UserError(
                    f"method.local_view={size_text(view)} exceeds the crop {size_text(crop)}: set it to at most the crop"
                )
            self.backbone.check_view(view, "method.local_view")

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """A source of crops for each volume. Learns from `preparation` how long the training is, for the schedules."""
        config, self.steps = self.config, preparation.steps
        kept = prod(
            teacher_momentum(n, self.steps, config.momentum, config.last_momentum) for n in range(1, self.steps + 1)
        )
        if kept > KEEPS:
            preparation.report(
                f"dino: over {self.steps} steps the teacher keeps {kept:.0%} of its initial weights, which are random: "
                "set method.momentum lower, or pretrain.steps higher",
                teacher_keeps=kept,
            )
        view = self._local_view(preparation.crop)
        return [
            MultiCrop(volume, config.global_share, config.local_share, config.aspect, config.local_crops, view)
            for volume in volumes
        ]

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` and `second` (N, C, x, y, z), `local` (N, L, C, *view) -> `entropy` and `divergence`."""
        config, views, local = self.config, self.global_views(batch), self.local_views(batch)
        student = self.head(self.pooled(self.backbone, views)).unflatten(0, (-1, 2))
        if local is not None:
            outputs = self.head(self.pooled(self.backbone, local)).unflatten(0, (-1, config.local_crops))
            student = torch.cat([student, outputs], dim=1)
        with torch.no_grad():
            teacher = self.teacher_head(self.pooled(self.teacher_backbone, views)).unflatten(0, (-1, 2))
            self.teacher_mean = teacher.mean(dim=(0, 1))
            targets = self.targets(teacher)
        return distillation(targets, student, config.student_temperature)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Move the teacher towards the student, and the centre towards the batch's mean."""
        config = self.config
        momentum = teacher_momentum(step, self._steps(), config.momentum, config.last_momentum)
        follow(self.teacher_backbone, self.backbone, momentum)
        follow(self.teacher_head, self.head, momentum)
        if self.teacher_mean is not None:
            moved = self.centre.lerp(self.teacher_mean, 1 - config.centre_momentum)
            # A step that is not finite is left out, and must not spoil the centre.
            self.centre.copy_(torch.where(moved.isfinite().all(), moved, self.centre))
            self.teacher_mean = None
        self.step.fill_(step)

    def weights(self) -> dict[str, Tensor]:
        """The encoder of the teacher, or of the student if `transfer` says so."""
        backbone = self.teacher_backbone if self.config.transfer == "teacher" else self.backbone
        return backbone.part_weights(self.trains)

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """Both global crops, and both views of them."""
        views = self.global_views(batch)
        crops = {"first crop": batch["image"], "second crop": batch["second"]}
        return {**crops, "first view": views[0::2], "second view": views[1::2]}

    def global_views(self, batch: Batch) -> Tensor:
        """The augmented global crops (2 N, C, x, y, z). Those of a volume are adjacent rows."""
        views = torch.stack([batch["image"], batch["second"]], dim=1).flatten(0, 1)
        first, second, _ = self.config.blur
        probability = torch.tensor([first, second], device=views.device).repeat(len(views) // 2)
        return self._augment(views, probability.view(-1, 1, 1, 1, 1))

    def local_views(self, batch: Batch) -> Tensor | None:
        """The augmented local crops (N L, C, *view), those of a volume adjacent; None without any."""
        return self._augment(batch["local"].flatten(0, 1), self.config.blur[2]) if self.config.local_crops else None

    def pooled(self, backbone: Backbone, views: Tensor) -> Tensor:
        """Views (N, C, x, y, z) of this part -> codes of all such views of the global batch, (N * parts, channels).

        A code consists of the spatial means of the levels that `pool` names, with batch norm if `batch_norm` is set.
        """
        pooled = gather(pooled_features(backbone, views, self.config.pool, self.centre.dtype))
        return F.batch_norm(pooled, None, None, training=True) if self.config.batch_norm else pooled

    def targets(self, teacher: Tensor) -> Tensor:
        """Teacher outputs of the global batch, (N, 2, K) cosines -> probabilities."""
        temperature = self.temperature()
        if self.config.centring == "sinkhorn":
            return sinkhorn(teacher.flatten(0, 1), temperature).view_as(teacher)
        return ((teacher - self.centre) / temperature).softmax(dim=-1)

    def temperature(self) -> Tensor:
        """Temperature of the teacher after `step` steps: it rises linearly, then stays."""
        config = self.config
        warmup = max(config.temperature_warmup * self._steps(), 1e-6)
        share = (self.step / warmup).clamp(max=1)
        return config.first_temperature + (config.teacher_temperature - config.first_temperature) * share

    def _augment(self, views: Tensor, blur_probability: float | Tensor) -> Tensor:
        """Distort each view by itself."""
        config, generator = self.config, self.generator
        views = flip(views, config.flip, generator)
        views = jitter(views, config.jitter, config.strength, generator)
        views = adjust_gamma(views, config.gamma, config.gamma_range, generator)
        return blur(views, blur_probability, config.sigma_range, generator)

    def _local_view(self, crop: Triple) -> Triple:
        """Extent of a local view: the setting, or half of the crop in whole strides, but more than one deepest voxel."""
        if self.config.local_view is not None:
            return self.config.local_view
        stride = self.backbone.stride
        x, y, z = (-(-edge // (2 * step)) * step for edge, step in zip(crop, stride, strict=True))
        if (x, y, z) == tuple(stride):
            x, y, z = (min(edge, 2 * step) for edge, step in zip(crop, stride, strict=True))
        return x, y, z

    def _steps(self) -> int:
        """Steps of the training. Raises RuntimeError before `prepare`."""
        if not self.steps:
            raise RuntimeError("dino's schedules need the number of steps, which prepare sets: call it first")
        return self.steps


class Head(nn.Module):
    """Three layers with GELU, then cosines with K prototypes: (N, channels) -> (N, K).

    This is the paper's last layer with weight norm, whose norms stay 1 (`norm_last_layer` in the released code). Computes
    in fp32.
    """

    def __init__(self, channels: int, hidden: int, bottleneck: int, prototypes: int) -> None:
        super().__init__()
        widths = (channels, hidden, hidden, bottleneck)
        layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
        for layer in layers:
            nn.init.trunc_normal_(layer.weight, std=0.02)
            nn.init.zeros_(layer.bias)
        self.layers = nn.ModuleList(layers)
        self.prototypes = nn.Parameter(torch.randn(prototypes, bottleneck))

    def forward(self, pooled: Tensor) -> Tensor:
        """Pooled features -> cosines in [-1, 1]."""
        with torch.autocast(pooled.device.type, enabled=False):
            return self.bottleneck(pooled) @ F.normalize(self.prototypes, dim=1).T

    def bottleneck(self, pooled: Tensor) -> Tensor:
        """Pooled features -> codes of length 1, (N, bottleneck)."""
        with torch.autocast(pooled.device.type, enabled=False):
            first, second, last = self.layers
            return F.normalize(last(F.gelu(second(F.gelu(first(pooled))))), dim=-1)


def distillation(targets: Tensor, student: Tensor, temperature: float) -> dict[str, Tensor]:
    """Equation 3: cross-entropy of each target with each student output of another crop of the volume, averaged.

    Args:
        targets: the teacher's probabilities for the global crops, (N, 2, K).
        student: outputs (N, 2 + L, K). The first two are of the same crops as the targets.

    Returns:
        `entropy` of the targets and `divergence` of the student from them. Their sum is the cross-entropy.
    """
    with torch.autocast(student.device.type, enabled=False):
        log_probabilities = (student / temperature).log_softmax(dim=-1)
        cross = -torch.einsum("ntk,nvk->ntv", targets, log_probabilities)
    views = student.shape[1]
    same = torch.eye(2, views, dtype=torch.bool, device=student.device)
    loss = cross.masked_fill(same, 0).sum(dim=(1, 2)).mean() / (2 * views - 2)
    entropy = torch.special.entr(targets).sum(dim=-1).mean()
    return {"entropy": entropy, "divergence": loss - entropy}


def sinkhorn(outputs: Tensor, temperature: float | Tensor, iterations: int = 3) -> Tensor:
    """Sinkhorn-Knopp: probabilities (rows, K) in which all prototypes have nearly the same share of the batch.

    Args:
        outputs: of the teacher for the global batch, (rows, K).
        iterations: 3 in DINOv2.
    """
    scaled = outputs / temperature
    # A common factor cancels.
    weights = (scaled - scaled.max()).exp()
    for _ in range(iterations):
        weights = weights / weights.sum(dim=0, keepdim=True)
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights


def teacher_momentum(step: int, steps: int, first: float, last: float) -> float:
    """Momentum of the teacher at step `step`, from 1, of `steps`: a cosine from `first` to `last`."""
    share = min((step - 1) / steps, 1)
    return last - (last - first) * (cos(pi * share) + 1) / 2


@dataclass(frozen=True)
class MultiCrop:
    """Draws two global and several local crops of a region of one volume.

    Attributes:
        volume: the volume.
        global_share, local_share: least and largest share of the region that a crop covers.
        aspect: largest ratio of two relative edges of a crop.
        local_crops: number of local crops.
        local_view: extent in voxels to which they are resized.
    """

    volume: VolumeSource
    global_share: tuple[float, float]
    local_share: tuple[float, float]
    aspect: float
    local_crops: int
    local_view: Triple

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """`image` and `second` (C, *size), and `local` (L, C, *local_view) if there are any."""
        boxes = self.draw(size, rng)
        crops = [self.volume.crop(origin, edges) for origin, edges in boxes]
        sample = {"image": resize(crops[0], size), "second": resize(crops[1], size)}
        if self.local_crops:
            sample["local"] = np.stack([resize(crop, self.local_view) for crop in crops[2:]])
        return sample

    def draw(self, size: Triple, rng: np.random.Generator) -> list[tuple[Triple, Triple]]:
        """Origin and edges of each box in voxels of the volume, the global ones first.

        All lie in one region of `size` voxels, which is drawn as any pre-training crop is.
        """
        shape = self.volume.shape
        region = random_origin(shape, size, rng)
        boxes = []
        for number in range(2 + self.local_crops):
            share = self.global_share if number < 2 else self.local_share
            edges = random_edges(size, *share, self.aspect, rng)
            origin = []
            for start, whole, edge, low, high in zip(region, size, edges, *origins(shape, edges), strict=True):
                # Inside the region; and inside the volume, or around it. A crop of padding alone would say nothing.
                origin.append(int(rng.integers(max(low, start), min(high, start + whole - edge) + 1)))
            boxes.append(((origin[0], origin[1], origin[2]), edges))
        return boxes
