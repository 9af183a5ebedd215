"""The three pretext tasks of Swin UNETR: inpainting, rotation, contrast (Tang et al. 2022)."""

from math import ceil, log, prod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Batch, Method, Settings, Triple, UserError, any_box, rand, random_integers, size_text
from methods.hybridmim import contrastive_loss
from methods.simmim import VoxelHead

PLANES = ((0, 1), (0, 2), (1, 2))


class SwinUNETRSSL(Method):
    """Inpainting of cut-out boxes, 4-way rotation and contrast of two views, all from the encoder.

    Source: Tang, Yang, Li, Roth, Landman, Xu, Nath, Hatamizadeh, "Self-Supervised Pre-Training of Swin Transformers for
    3D Medical Image Analysis", CVPR 2022, arXiv:2111.14791, section 3.2; repository
    Project-MONAI/research-contributions, SwinUNETR/Pretrain. Each crop gives two views. Each view is rotated by a random
    number of quarter turns, then boxes are cut out of it. The terms have weight 1 each (equation 8):
      * L1 between the restored and the rotated view over all voxels (equation 5);
      * cross-entropy of the number of turns (equation 6);
      * InfoNCE of 512-d codes at temperature 0.5 (equation 7); all other codes of the batch are negatives.

    Defaults: 30 % of the voxels are cut out (section 4.1), by boxes of 5 % to a quarter of each edge (released code).
    Deviations:
      * The paper rotates about the z axis, and the released code in the yz plane. Here the rotation is in the first of the
        planes xy, xz, yz whose two edges are equal in the crop.
      * A box may begin anywhere that leaves a voxel of it in the crop, and is cut at the border, so that every voxel is as
        likely to be cut out as any other. Boxes are added until their expected union is `cut_out`: at 96^3 the union of a
        view is 30.1 % of the voxels on average, with a standard deviation of 1.4 %. In the released code the sum of the
        boxes' volumes reaches a share that is drawn from 0 to 0.3 for each view, and a box begins inside the crop and is
        cut at the upper border.
      * Boxes are filled with uniform noise. The released code fills them with normal noise scaled to [0, 1], and then cuts
        out again and fills with the same place of another crop of the batch.
      * The inpainting head is one linear layer from a token to its voxels: the released `large_kernel_deconv`, but for one
        bias per voxel of the token instead of one per channel. The released default has five upsampling steps.
      * Codes of rotation and contrast are spatial means of the deepest features, as the paper does not say what they are.
        The released heads read one token each, the first for rotation and the second for contrast: `codes=tokens`.
      * The target is the crop with its own intensities. The paper has no further augmentation either.
      * The optimizer is the harness's. Released: AdamW, rate 4e-4, weight decay 0.1, 500 steps of warm-up.
    """

    name = "swinunetr_ssl"
    version = "2"
    reference = "Tang et al. 2022, arXiv:2111.14791; github.com/Project-MONAI/research-contributions"
    trains = ("encoder",)

    class Config(Settings):
        """Settings of Swin UNETR's pretext tasks: weight of each term, cut-out boxes, codes, contrast."""

        inpainting: float = Field(1.0, ge=0, description="weight; 0 switches it off; equation 8")
        rotation: float = Field(1.0, ge=0, description="weight; 0 switches it off; equation 8")
        contrastive: float = Field(1.0, ge=0, description="weight; 0 switches it off; equation 8")
        cut_out: float = Field(0.3, gt=0, lt=1, description="share of voxels cut out; section 4.1")
        shortest: float = Field(
            0.05, gt=0, le=1, description="shortest edge of a box as a share of the crop's; released code"
        )
        longest: float = Field(
            0.25, gt=0, le=1, description="longest edge of a box as a share of the crop's; released code"
        )
        boxes: PositiveInt = Field(256, description="most boxes drawn for that share; here")
        codes: Literal["mean", "tokens"] = Field(
            "mean",
            description="what rotation and contrast read of the deepest features: the spatial mean (here), or the first and "
            "the second token (released code)",
        )
        temperature: float = Field(0.5, gt=0, description="of the contrast; released code")
        projection: PositiveInt = Field(512, description="dimensions of the contrasted code; section 4.1")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        deepest = backbone.channels[-1]
        # Each head exists only if a loss term uses it. Unused parameters are an error under DDP.
        if config.inpainting:
            self.restore = VoxelHead(backbone)
        if config.rotation:
            self.turn = nn.Linear(deepest, 4)
        if config.contrastive:
            self.project = nn.Linear(deepest, config.projection)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if no plane can be rotated, no term is switched on, or the contrast has no negatives."""
        config = self.config
        plane(crop)
        self._check_boxes(crop)
        if not (config.inpainting or config.rotation or config.contrastive):
            raise UserError("swinunetr_ssl has every loss term switched off: give at least one method.* weight above 0")
        if config.codes == "tokens" and prod(n // s for n, s in zip(crop, self.backbone.stride, strict=True)) < 2:
            raise UserError(
                f"method.codes=tokens needs two tokens, a crop of {size_text(crop)} has one on backbone "
                f"{self.backbone.name!r}: set a larger pretrain.crop, or method.codes=mean"
            )
        if config.contrastive and batch_size < 2:
            raise UserError(
                f"swinunetr_ssl's contrast has no negatives in a batch of {batch_size}: set pretrain.batch_size=2 or more, "
                "or method.contrastive=0"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> the weighted terms of equation 8 that are switched on."""
        config, image = self.config, batch["image"]
        # The two views of a crop are adjacent rows. So a part of the batch has the same rows as in the whole batch.
        twice = image.repeat_interleave(2, dim=0)
        turns = random_integers(0, 3, (len(twice),), image.device, self.generator)
        views = rotate(twice, turns)
        deepest = self.backbone.encode(self.hide(views))[-1]
        of_turn, of_contrast = self.read_codes(deepest)
        terms: dict[str, Tensor] = {}
        if config.inpainting:
            terms["inpainting"] = config.inpainting * (self.restore(deepest) - views).abs().mean()
        if config.rotation:
            terms["rotation"] = config.rotation * F.cross_entropy(self.turn(of_turn).float(), turns)
        if config.contrastive:
            projected = self.project(of_contrast)
            first, second = projected[0::2], projected[1::2]
            terms["contrastive"] = config.contrastive * contrastive_loss(first, second, config.temperature)
        return terms

    def read_codes(self, deepest: Tensor) -> tuple[Tensor, Tensor]:
        """Deepest features (N, D, x, y, z) -> the codes (N, D) that rotation and contrast read."""
        if self.config.codes == "tokens":
            tokens = deepest.flatten(2)
            return tokens[..., 0], tokens[..., 1]
        mean = deepest.mean(dim=(2, 3, 4))
        return mean, mean

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The rotated image, the image with boxes cut out, and the restored image if the inpainting term is on."""
        image = batch["image"]
        views = rotate(image, random_integers(0, 3, (len(image),), image.device, self.generator))
        hidden = self.hide(views)
        images = {"image": views, "what it sees": hidden}
        if not self.config.inpainting:
            return images
        return {**images, "what it restores": self.restore(self.backbone.encode(hidden)[-1])}

    def hide(self, views: Tensor) -> Tensor:
        """Views (N, C, x, y, z) -> the same with boxes of noise. Boxes are added until their expected union is `cut_out`."""
        config, extent, device = self.config, views.shape[2:], views.device
        shape = (len(views), config.boxes)
        sizes = [random_integers(*self._edges(length), shape, device, self.generator) for length in extent]
        starts = [
            random_integers(1 - size, length - 1, shape, device, self.generator)
            for length, size in zip(extent, sizes, strict=True)
        ]
        size, start = torch.stack(sizes, dim=-1), torch.stack(starts, dim=-1)
        # The probability that a box covers a voxel: of the `length + size - 1` positions along an axis `size` do.
        share = (size / (size + torch.tensor(extent, device=device) - 1)).prod(dim=-1)
        # Boxes may overlap. The expected union of boxes at random positions is 1 - product of (1 - share of a box).
        covered = 1 - (1 - share).cumprod(dim=1)
        needed = torch.cat([torch.ones_like(covered[:, :1]), covered[:, :-1] < config.cut_out], dim=1)
        mask = any_box(start, start + size * needed.long()[..., None], extent)
        noise = rand(views.shape, device, self.generator).to(views.dtype)
        return torch.where(mask, noise, views)

    def _check_boxes(self, crop: Triple) -> None:
        """Raise UserError if `boxes` boxes of mean size do not cover the share that is to be cut out."""
        edges = [range(low, high + 1) for low, high in map(self._edges, crop)]
        share = prod(sum(e / (e + n - 1) for e in sizes) / len(sizes) for sizes, n in zip(edges, crop, strict=True))
        number = ceil(log(1 - self.config.cut_out) / log(1 - share)) if share < 1 else 1
        if number > self.config.boxes:
            raise UserError(
                f"method.boxes={self.config.boxes} is too few: about {number} boxes cover method.cut_out="
                f"{self.config.cut_out:g} of a crop, set method.boxes={2 * number}"
            )

    def _edges(self, length: int) -> tuple[int, int]:
        """Shortest and longest edge of a box in voxels, for an axis of this length."""
        shortest, longest = (max(1, round(share * length)) for share in (self.config.shortest, self.config.longest))
        return min(shortest, longest), longest


def plane(crop: Triple) -> tuple[int, int]:
    """The first pair of axes whose edges are equal. Raises UserError if there is none."""
    for a, b in PLANES:
        if crop[a] == crop[b]:
            return a, b
    raise UserError(
        f"swinunetr_ssl turns crops by 90 degrees, so two edges must be equal, pretrain.crop={size_text(crop)}: "
        "set it to a size with two equal edges"
    )


def rotate(image: Tensor, turns: Tensor) -> Tensor:
    """Rotate each sample of (N, C, x, y, z) by its number of quarter turns, (N,) in 0..3. Does not wait for the device."""
    x, y, z = image.shape[2:]
    a, b = plane((x, y, z))
    of_sample = turns.view(-1, 1, 1, 1, 1)
    turned = image
    for number in (1, 2, 3):
        turned = torch.where(of_sample == number, image.rot90(number, (a + 2, b + 2)), turned)
    return turned
