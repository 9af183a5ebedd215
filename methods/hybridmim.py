"""HybridMIM: hybrid masked image modelling at pixel, region and sample level (Xing et al. 2023)."""

from collections.abc import Sequence
from math import prod
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from harness import (
    Backbone,
    Batch,
    Method,
    Settings,
    Size3,
    Triple,
    UserError,
    crop,
    gather,
    random_patches,
    to_voxels,
    total,
)


class HybridMIM(Method):
    """Two-level masking with partial reconstruction, patch-masking perception and dropout contrast.

    Source: Xing, Zhu, Yu, Xing, Wan, "HybridMIM: A Hybrid Masked Image Modeling Framework for 3D Medical Image
    Segmentation", sections III and IV-C; equations are its numbers. Repository: ge-xing/HybridMIM.

    Where the released code differs from the paper, the paper is the default; the differences are:
      * Labels. The code groups 8 consecutive patches in raster order, but predicts from features pooled over 2x2x2
        blocks; here bit k of sub-volume r is the patch that lies there (section III-C).
      * Reconstruction. Equation 1 is the unsquared L2 norm per sub-volume; the code has the mean squared error over
        all masked voxels. `distance` offers both. Both: sigmoid output, masked voxels of the region only.
      * Region. The paper's lies around the centre, the code's in a corner.
      * Consistency. The paper's squared error is on probabilities and trains the location head; the code thresholds
        first, which leaves that half without a gradient. `consistency_on` offers both.
      * Location. The code averages the binary cross-entropy over the bits of a sub-volume, equation 4 sums it.
      * Contrast. The code detaches the second view; here both views have gradients. For SwinUNETR the code contrasts
        one token; here, as for UNet, the spatial mean.
      * Dropout. The code draws it inside the networks (`block_dropout`, `drop_path` come nearest); here it acts after
        the trunk, so that two encodings cost one pass.
    Where the paper is not definite:
      * Equation 5 sums over sub-volumes while 2 and 4 average; here all three average, so that the weights do not
        depend on the crop.
      * Equation 1 sums over whole sub-volumes. A region on the stride's grid may cut them (64 at 16 of 96): each piece
        then counts as one sub-volume.
      * Equation 3 calls p = 0 masked; here 1 is masked, as equation 5 and the code need.
      * Equation 6 leaves the positive out of the denominator, its text does not; here as in the text (and the code).
      * Section III-A sets SwinUNETR's token to the patch; here, as in the code, the token stays 2 voxels, so that
        the network is the one that is fine-tuned.
    The mask is kept as a tensor, never found by comparing voxels with 0: the background of skull-stripped MR and the
    padding of small volumes are 0 as well, so labels cannot be read from patches that lie wholly there.
    """

    name = "hybridmim"
    reference = "Xing et al. 2023, HybridMIM; github.com/ge-xing/HybridMIM"
    trains: tuple[str, ...] = ("encoder", "decoder")
    variants = {
        "partial": {},
        "whole": {"method.region": "whole"},
        "with-contrast": {},
        "without-contrast": {"method.contrastive": 0},
    }

    class Config(Settings):
        mask_ratio: float = Field(0.4, gt=0, lt=1, description="share of patches masked; section IV-C")
        sub_volume: Size3 = Field((32, 32, 32), description="first-level edge in voxels; section IV-C")
        patch: Size3 = Field((16, 16, 16), description="second-level edge in voxels; section IV-C")
        region: Size3 | Literal["whole"] | None = Field(
            None,
            description="extent reconstructed, in voxels, or `whole`; none: the largest multiple of the backbone's stride "
            "within 3/4 of the crop, which is section IV-C's 96 of 128 and 64 of 96; an axis of two strides or fewer stays "
            "whole",
        )
        reconstruction: float = Field(1.0, ge=0, description="weight of L_PR, 0 switches it off; equation 7")
        number: float = Field(0.1, ge=0, description="weight of L_Num, 0 switches it off; equation 7")
        location: float = Field(0.1, ge=0, description="weight of L_Loc, 0 switches it off; equation 7")
        consistency: float = Field(0.01, ge=0, description="weight of L_Con, 0 switches it off; equation 7")
        contrastive: float = Field(0.1, ge=0, description="weight of L_CL, 0 switches it off; equation 7")
        distance: Literal["norm", "mse"] = Field("norm", description="norm: equation 1; mse: released code")
        consistency_on: Literal["probabilities", "bits"] = Field(
            "probabilities", description="what equation 5 sums; probabilities: the paper, bits: released code"
        )
        temperature: float = Field(0.5, gt=0, description="of the contrast; released code")
        projection: int = Field(384, gt=0, description="dimensions of the contrasted code; released code")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        deepest = backbone.channels[-1]
        self.num_patches = prod(s // p for s, p in zip(config.sub_volume, config.patch, strict=True))
        if not config.reconstruction:
            # Nothing reaches the decoder: handing it over would replace the control's initial values by others.
            self.trains = ("encoder",)
        # A head exists only where a term uses it: an unused one would be a dead parameter under DDP.
        if config.reconstruction:
            self.reconstruct = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)
        if config.number or config.consistency:
            self.count = nn.Linear(deepest, self.num_patches + 1)
        if config.location or config.consistency:
            self.locate = nn.Linear(deepest, self.num_patches)
        if config.contrastive:
            self.project = nn.Linear(deepest, config.projection)

    def check(self, crop: Triple, batch_size: int) -> None:
        config, stride = self.config, self.backbone.stride
        for axis, extent in enumerate(crop):
            sub, patch = config.sub_volume[axis], config.patch[axis]
            if extent % sub:
                raise UserError(
                    f"method.sub_volume={_text(config.sub_volume)} does not divide the crop {_text(crop)}: "
                    "set pretrain.crop to a multiple of it, or another method.sub_volume"
                )
            if sub % patch or sub == patch:
                raise UserError(
                    f"method.patch={_text(config.patch)} must divide method.sub_volume={_text(config.sub_volume)} "
                    "into at least two along every axis"
                )
            if sub % stride[axis]:
                raise UserError(
                    f"method.sub_volume={_text(config.sub_volume)} is not a multiple of the deepest stride "
                    f"{_text(stride)} of backbone {self.backbone.name!r}, so it has no features of its own: "
                    "set it to a multiple"
                )
        if config.reconstruction:
            self._region(crop)
        if not any((config.reconstruction, config.number, config.location, config.consistency, config.contrastive)):
            raise UserError("hybridmim has every loss term switched off: give at least one method.* weight above 0")
        if config.contrastive and batch_size < 2:
            raise UserError(
                f"hybridmim's contrastive term has no negatives in a batch of {batch_size}: set pretrain.batch_size=2 "
                "or more, or method.contrastive=0"
            )
        if config.contrastive and not self.backbone.dropout_inside and self.backbone.dropout.p == 0:
            raise UserError(
                "hybridmim's contrastive term needs dropout, without it the two encodings are the same: "
                "set backbone.dropout=0.1, or method.contrastive=0"
            )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> the weighted terms of equation 7 that are switched on."""
        config, image = self.config, batch["image"]
        mask = self.draw_mask(image)
        masked = image * ~to_voxels(mask, config.patch)
        if config.contrastive:
            first, second = self.backbone.encode_twice(masked)
        else:
            first, second = self.backbone.encode(masked), []
        terms: dict[str, Tensor] = {}
        if config.reconstruction:
            terms["reconstruction"] = config.reconstruction * self.reconstruction_loss(first, image, mask)
        terms |= self._region_terms(first[-1], mask)
        if config.contrastive:
            here, there = (self.project(view[-1].mean(dim=(2, 3, 4))) for view in (first, second))
            terms["contrastive"] = config.contrastive * contrastive_loss(here, there, config.temperature)
        return terms

    def show(self, batch: Batch) -> dict[str, Tensor]:
        image = batch["image"]
        masked = image * ~to_voxels(self.draw_mask(image), self.config.patch)
        if not self.config.reconstruction:
            return {"image": image, "what it sees": masked}
        restored = torch.sigmoid(self.reconstruct(self.backbone.decode(self.backbone.encode(masked))).float())
        return {"image": image, "what it sees": masked, "what it restores": restored}

    def draw_mask(self, image: Tensor) -> Tensor:
        """Patches masked in each sample, (N, patches x, y, z) bool: the same number, drawn independently.

        216 patches at ratio 0.4: 129 kept, 87 masked, as in the released code.
        """
        return random_patches(image, self.config.patch, self.config.mask_ratio, self.generator)

    def bits(self, mask: Tensor) -> Tensor:
        """Patch mask (N, x, y, z) -> (N, sub-volumes, patches per sub-volume) bool, both in raster order."""
        x, y, z = (s // p for s, p in zip(self.config.sub_volume, self.config.patch, strict=True))
        n, gx, gy, gz = mask.shape
        cells = mask.view(n, gx // x, x, gy // y, y, gz // z, z).permute(0, 1, 3, 5, 2, 4, 6)
        return cells.reshape(n, -1, x * y * z)

    def region_features(self, deepest: Tensor) -> Tensor:
        """Deepest features averaged over each sub-volume's footprint, (N, sub-volumes, channels) in raster order."""
        footprint = [s // t for s, t in zip(self.config.sub_volume, self.backbone.stride, strict=True)]
        return F.avg_pool3d(deepest, footprint).flatten(2).transpose(1, 2)

    def reconstruction_loss(self, pyramid: list[Tensor], image: Tensor, mask: Tensor) -> Tensor:
        """Equation 1: distance over the masked voxels of the target region, decoded there only."""
        origin, size = self._region(image.shape[2:])
        features = self.backbone.decode(crop(pyramid, self.backbone.strides, origin, size))
        spans = [slice(start, start + length) for start, length in zip(origin, size, strict=True)]
        target = image[(slice(None), slice(None), *spans)]
        hidden = to_voxels(mask, self.config.patch)[(slice(None), slice(None), *spans)]
        restored = torch.sigmoid(self.reconstruct(features).float())
        squared = (restored - target).square() * hidden
        if self.config.distance == "mse":
            return total(squared.sum()) / (total(hidden.sum()) * squared.shape[1]).clamp_min(1)
        cells = self._sum_over_sub_volumes(squared.sum(dim=1), origin)
        # A sub-volume without a masked voxel is at distance 0, where the root has no gradient.
        return torch.where(cells > 0, cells.clamp_min(1e-12).sqrt(), 0).mean()

    def _region_terms(self, deepest: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Equations 2, 4 and 5."""
        config = self.config
        terms: dict[str, Tensor] = {}
        if not (config.number or config.location or config.consistency):
            return terms
        features, bits = self.region_features(deepest), self.bits(mask)
        if config.number or config.consistency:
            count = self.count(features).float()
        if config.location or config.consistency:
            locate = self.locate(features).float()
        if config.number:
            terms["number"] = config.number * F.cross_entropy(count.flatten(0, 1), bits.sum(dim=2).flatten())
        if config.location:
            per_bit = F.binary_cross_entropy_with_logits(locate, bits.to(locate.dtype), reduction="none")
            terms["location"] = config.location * per_bit.sum(dim=2).mean()
        if config.consistency:
            on_bits = config.consistency_on == "bits"
            terms["consistency"] = config.consistency * consistency_loss(count, locate, on_bits)
        return terms

    def _region(self, extent: Sequence[int]) -> tuple[Triple, Triple]:
        """Origin and size of the target region: on the deepest stride's grid, as near the centre as that allows."""
        stride, wanted = self.backbone.stride, self.config.region
        if wanted == "whole":
            size = list(extent)
        elif wanted is None:
            # Of two strides or fewer, what remains would lie in a corner and be a fraction of the axis.
            size = [
                length if length <= 2 * t else length * 3 // 4 // t * t
                for length, t in zip(extent, stride, strict=True)
            ]
        else:
            size = list(wanted)
        if any(edge % t or edge > length for edge, t, length in zip(size, stride, extent, strict=True)):
            raise UserError(
                f"method.region={_text(size)} must be a multiple of the deepest stride {_text(stride)} of backbone "
                f"{self.backbone.name!r} and fit the crop {_text(extent)}"
            )
        if size == list(stride):
            raise UserError(
                f"method.region={_text(size)} is a single voxel of the deepest features of backbone "
                f"{self.backbone.name!r}, which cannot be normalised: set it to at least twice the stride along one axis"
            )
        x, y, z = ((length - edge) // 2 // t * t for length, edge, t in zip(extent, size, stride, strict=True))
        return (x, y, z), (size[0], size[1], size[2])

    def _sum_over_sub_volumes(self, values: Tensor, origin: Triple) -> Tensor:
        """(N, region) -> (N, sub-volumes that the region touches): the region need not lie on their grid."""
        for axis, (start, edge) in enumerate(zip(origin, self.config.sub_volume, strict=True), start=1):
            length = values.shape[axis]
            owner = (torch.arange(length, device=values.device) + start) // edge - start // edge
            cells = (start + length - 1) // edge - start // edge + 1
            shape = [*values.shape[:axis], cells, *values.shape[axis + 1 :]]
            values = values.new_zeros(shape).index_add(axis, owner, values)
        return values.flatten(1)


def consistency_loss(count: Tensor, locate: Tensor, on_bits: bool = False) -> Tensor:
    """Equation 5: the number and the locations that are predicted for a sub-volume must agree.

    Args:
        count: logits of the number, (N, R, K + 1).
        locate: logits of the locations, (N, R, K).
        on_bits: sum thresholded bits instead of probabilities (released code; no gradient for the location head).
    """
    probabilities = locate.sigmoid()
    bits = probabilities > 0.5
    number_follows = F.cross_entropy(count.flatten(0, 1), bits.sum(dim=2).flatten())
    total = bits.to(locate.dtype).sum(dim=2) if on_bits else probabilities.sum(dim=2)
    location_follows = F.mse_loss(total, count.argmax(dim=2).to(total.dtype))
    return (number_follows + location_follows) / 2


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 6 over the global batch: two codes of a sample attract, the other 2N - 2 repel.

    Args:
        first, second: codes of the two encodings, (N, D) each, of this part of the batch.

    Raises:
        ValueError: one sample in the global batch, for which there are no negatives.
    """
    first, second = gather(first.float()), gather(second.float())
    number = len(first)
    if number < 2:
        raise ValueError("the contrastive loss has no negatives for one sample: use a batch of two or more")
    codes = F.normalize(torch.cat([first, second]), dim=1)
    with torch.autocast(codes.device.type, enabled=False):
        similarity = codes @ codes.T / temperature
    itself = torch.eye(2 * number, dtype=torch.bool, device=codes.device)
    partner = torch.arange(2 * number, device=codes.device).roll(number)
    return F.cross_entropy(similarity.masked_fill(itself, float("-inf")), partner)


def _text(size: Sequence[int]) -> str:
    return ",".join(map(str, size))
