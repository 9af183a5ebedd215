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
    Dropout,
    Method,
    Pyramid,
    Settings,
    Size3,
    Triple,
    UserError,
    crop,
    gather,
    random_patches,
    size_text,
    to_voxels,
    total,
)


class HybridMIM(Method):
    """Two-level masking with partial reconstruction, patch-masking perception and dropout contrast.

    Source: Xing, Zhu, Yu, Xing, Wan, "HybridMIM: A Hybrid Masked Image Modeling Framework for 3D Medical Image
    Segmentation", sections III and IV-C. Equation numbers are those of the paper. Repository: ge-xing/HybridMIM.

    Unless said otherwise, the paper is the default where the released code differs from it. The differences are:
      * Labels. The code groups 8 consecutive patches in raster order, but predicts from features pooled over 2x2x2
        blocks. Here bit k of sub-volume r stands for patch k inside that sub-volume (section III-C).
      * Reconstruction. Equation 1 is the unsquared L2 norm per sub-volume. The code uses the mean squared error over
        all masked voxels. `distance` offers both. The squared error is the default, because the weights of equation 7
        belong to it: the gradient of an unsquared norm has a constant size, which drowns the other terms on a U-Net
        (`docs/methods/hybridmim.md` has the measurements). Both use a sigmoid output and only the masked voxels of the
        region.
      * Region. The paper's region is a set of sub-volumes around the centre, the code's region lies in a corner. Here
        it begins on the grid of sub-volumes, as near the centre as that allows.
      * Consistency. The paper's squared error uses probabilities and trains the location head. The code thresholds
        first, so that half of the term has no gradient. `consistency_on` offers both.
      * Location. Equation 4 sums the binary cross-entropy over the bits of a sub-volume. The code averages it.
      * Contrast. The code detaches the second view. Here both views have gradients. For SwinUNETR the code contrasts
        one token. Here the spatial mean is contrasted, as for UNet.
        On a U-Net, spatial means of instance-normalised features are nearly alike for all samples, in the code as
        here. `contrast_on=before-norm` contrasts the means before that norm, which differ.
      * Dropout. The code draws it inside the networks (`block_dropout` and `drop_path` are closest to that). Here it
        acts after the trunk, so that two encodings cost one pass. It acts in pre-training only.
    The paper leaves these points open:
      * Equation 5 sums over sub-volumes, while equations 2 and 4 average. Here all three average, so that the weights
        do not depend on the crop.
      * Equation 1 sums over whole sub-volumes. A region that is no multiple of them cuts some (region 48 with
        sub-volumes of 32). Each piece then counts as one sub-volume.
      * Equation 3 says that p = 0 is masked. Here 1 is masked, as equation 5 and the code need.
      * Equation 6 leaves the positive out of the denominator, but its text does not. Here it is in the denominator, as
        in the text and the code.
      * Section III-A sets SwinUNETR's token to the patch. Here the token stays 2 voxels, as in the code, so that the
        pre-trained network is the one that is fine-tuned.
    The mask is a tensor of its own. It is never derived by comparing voxels with 0, because the background of
    skull-stripped MR and the padding of small volumes are 0 as well. Labels can therefore not be read off patches that
    lie entirely in such areas.
    """

    name = "hybridmim"
    unit_range = False
    reference = "Xing et al. 2023, HybridMIM; github.com/ge-xing/HybridMIM"
    trains: tuple[str, ...] = ("encoder", "decoder")
    variants = {
        "partial": {},
        "whole": {"method.region": "whole"},
        "with-contrast": {},
        "without-contrast": {"method.contrastive": 0},
    }

    class Config(Settings):
        """Settings of HybridMIM: masking, target region, weight of each loss term, contrast."""

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
        distance: Literal["mse", "norm"] = Field("mse", description="mse: released code; norm: equation 1")
        consistency_on: Literal["probabilities", "bits"] = Field(
            "probabilities", description="what equation 5 sums; probabilities: the paper, bits: released code"
        )
        temperature: float = Field(0.5, gt=0, description="of the contrast; released code")
        contrast_on: Literal["features", "before-norm"] = Field(
            "features",
            description="whose spatial mean is contrasted; features: the deepest ones, as in the released code; before-norm: "
            "the input of the encoder's last instance norm",
        )
        dropout: float = Field(
            0.1,
            ge=0,
            lt=1,
            description="of the contrasted features, in pre-training only; SimCSE's 0.1; 0: the backbone's own",
        )
        projection: int = Field(384, gt=0, description="dimensions of the contrasted code; released code")

    config: Config
    _norm_input: Tensor | None = None

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        deepest = backbone.channels[-1]
        self.num_patches = prod(s // p for s, p in zip(config.sub_volume, config.patch, strict=True))
        if not config.reconstruction:
            # No loss term reaches the decoder. Transferring it would only replace the control's initial values.
            self.trains = ("encoder",)
        # Each head exists only if a loss term uses it. Unused parameters are an error under DDP.
        if config.reconstruction:
            self.reconstruct = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)
        if config.number or config.consistency:
            self.count = nn.Linear(deepest, self.num_patches + 1)
        if config.location or config.consistency:
            self.locate = nn.Linear(deepest, self.num_patches)
        if config.contrastive:
            self.project = nn.Linear(deepest, config.projection)
            if config.dropout:
                # In pre-training only: fine-tuning builds a new network, the same for every method and for scratch.
                backbone.dropout = Dropout(config.dropout)
            norm = last_instance_norm(backbone)
            if config.contrast_on == "before-norm" and norm is not None:
                norm.register_forward_pre_hook(self._remember_input)

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError unless sub-volumes, patches, region, weights, batch size and dropout fit."""
        config, stride = self.config, self.backbone.stride
        for axis, extent in enumerate(crop):
            sub, patch = config.sub_volume[axis], config.patch[axis]
            if extent % sub:
                raise UserError(
                    f"method.sub_volume={size_text(config.sub_volume)} does not divide the crop {size_text(crop)}: "
                    "set pretrain.crop to a multiple of it, or another method.sub_volume"
                )
            if sub % patch or sub == patch:
                raise UserError(
                    f"method.patch={size_text(config.patch)} must divide method.sub_volume={size_text(config.sub_volume)} "
                    "into at least two along every axis"
                )
            if sub % stride[axis]:
                raise UserError(
                    f"method.sub_volume={size_text(config.sub_volume)} is not a multiple of the deepest stride "
                    f"{size_text(stride)} of backbone {self.backbone.name!r}, so it has no features of its own: "
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
                "set method.dropout=0.1, or method.contrastive=0"
            )
        if config.contrastive and config.contrast_on == "before-norm" and last_instance_norm(self.backbone) is None:
            raise UserError(
                f"method.contrast_on=before-norm needs an encoder that ends in an instance norm, as unet does; that of "
                f"backbone {self.backbone.name!r} does not: set method.contrast_on=features"
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
            one, two = (self.project(code) for code in self.codes(first, second))
            terms["contrastive"] = config.contrastive * contrastive_loss(one, two, config.temperature)
        return terms

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The image, the masked image, and the restored whole crop if the reconstruction term is on."""
        image = batch["image"]
        masked = image * ~to_voxels(self.draw_mask(image), self.config.patch)
        if not self.config.reconstruction:
            return {"image": image, "what it sees": masked}
        restored = torch.sigmoid(self.reconstruct(self.backbone.decode(self.backbone.encode(masked))).float())
        return {"image": image, "what it sees": masked, "what it restores": restored}

    def draw_mask(self, image: Tensor) -> Tensor:
        """Mask of patches, (N, patches x, y, z) bool. Every sample masks the same number, drawn independently.

        At ratio 0.4, 216 patches give 129 visible and 87 masked ones, as in the released code.
        """
        return random_patches(image, self.config.patch, self.config.mask_ratio, self.generator)

    def bits(self, mask: Tensor) -> Tensor:
        """Patch mask (N, x, y, z) -> (N, sub-volumes, patches per sub-volume) bool, both in raster order."""
        x, y, z = (s // p for s, p in zip(self.config.sub_volume, self.config.patch, strict=True))
        n, gx, gy, gz = mask.shape
        sub_volumes = mask.view(n, gx // x, x, gy // y, y, gz // z, z).permute(0, 1, 3, 5, 2, 4, 6)
        return sub_volumes.reshape(n, -1, x * y * z)

    def region_features(self, deepest: Tensor) -> Tensor:
        """Deepest features averaged over each sub-volume, (N, sub-volumes, channels) in raster order."""
        footprint = [s // t for s, t in zip(self.config.sub_volume, self.backbone.stride, strict=True)]
        return F.avg_pool3d(deepest, footprint).flatten(2).transpose(1, 2)

    def reconstruction_loss(self, pyramid: list[Tensor], image: Tensor, mask: Tensor) -> Tensor:
        """Equation 1: distance over the masked voxels of the target region. Only this region is decoded."""
        origin, size = self._region(image.shape[2:])
        features = self.backbone.decode(crop(pyramid, self.backbone.strides, origin, size))
        spans = [slice(start, start + length) for start, length in zip(origin, size, strict=True)]
        target = image[(slice(None), slice(None), *spans)]
        hidden = to_voxels(mask, self.config.patch)[(slice(None), slice(None), *spans)]
        restored = torch.sigmoid(self.reconstruct(features).float())
        squared = (restored - target).square() * hidden
        if self.config.distance == "mse":
            return total(squared.sum()) / (total(hidden.sum()) * squared.shape[1]).clamp_min(1)
        sums = self._sum_over_sub_volumes(squared.sum(dim=1), origin)
        # A sub-volume without a masked voxel has distance 0, and the gradient of the root is infinite there.
        return torch.where(sums > 0, sums.clamp_min(1e-12).sqrt(), 0).mean()

    def codes(self, first: Pyramid, second: Pyramid) -> tuple[Tensor, Tensor]:
        """The two codes of each sample before projection, (N, channels) each: spatial means under two draws of dropout."""
        if self.config.contrast_on == "features":
            return first[-1].mean(dim=(2, 3, 4)), second[-1].mean(dim=(2, 3, 4))
        features, self._norm_input = self._norm_input, None
        assert features is not None
        one, two = features.chunk(2) if self.backbone.dropout_inside else (features, features)
        drop = self.backbone.dropout
        return drop(one).mean(dim=(2, 3, 4)), drop(two).mean(dim=(2, 3, 4))

    def _remember_input(self, norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward hook of the encoder's last norm: keep its input until `codes` reads it."""
        self._norm_input = inputs[0]

    def _region_terms(self, deepest: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """The weighted terms of equations 2, 4 and 5 that are switched on."""
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
        """Origin and size of the target region, as near the centre as its grid allows.

        Along an axis on which the region's extent is a multiple of the sub-volume's, the region begins on the grid of
        sub-volumes and cuts none of them. Along the others, it begins on the grid of the deepest stride.

        Raises:
            UserError: the region is off that grid, exceeds the crop, or is a single voxel of the deepest features.
        """
        stride, region = self.backbone.stride, self.config.region
        if region == "whole":
            size = list(extent)
        elif region is None:
            # On an axis of two strides or fewer, the region would be one stride in a corner. So the axis stays whole.
            size = [
                length if length <= 2 * t else length * 3 // 4 // t * t
                for length, t in zip(extent, stride, strict=True)
            ]
        else:
            size = list(region)
        if any(edge % t or edge > length for edge, t, length in zip(size, stride, extent, strict=True)):
            raise UserError(
                f"method.region={size_text(size)} must be a multiple of the deepest stride {size_text(stride)} of backbone "
                f"{self.backbone.name!r} and fit the crop {size_text(extent)}"
            )
        if size == list(stride):
            raise UserError(
                f"method.region={size_text(size)} is a single voxel of the deepest features of backbone "
                f"{self.backbone.name!r}, which cannot be normalised: set it to at least twice the stride along one axis"
            )
        grid = [t if edge % sub else sub for edge, sub, t in zip(size, self.config.sub_volume, stride, strict=True)]
        x, y, z = ((length - edge) // 2 // step * step for length, edge, step in zip(extent, size, grid, strict=True))
        return (x, y, z), (size[0], size[1], size[2])

    def _sum_over_sub_volumes(self, values: Tensor, origin: Triple) -> Tensor:
        """(N, x, y, z) of the region -> (N, sub-volumes that it touches). The region need not lie on their grid."""
        for axis, (start, edge) in enumerate(zip(origin, self.config.sub_volume, strict=True), start=1):
            length = values.shape[axis]
            owner = (torch.arange(length, device=values.device) + start) // edge - start // edge
            touched = (start + length - 1) // edge - start // edge + 1
            shape = [*values.shape[:axis], touched, *values.shape[axis + 1 :]]
            values = values.new_zeros(shape).index_add(axis, owner, values)
        return values.flatten(1)


def last_instance_norm(backbone: Backbone) -> nn.Module | None:
    """The last norm of the encoder if it is an instance norm, otherwise None."""
    children = [getattr(backbone, name) for name in backbone.parts["encoder"]]
    norms = [module for child in children for module in child.modules() if "norm" in type(module).__name__.lower()]
    return norms[-1] if norms and isinstance(norms[-1], nn.InstanceNorm3d) else None


def consistency_loss(count: Tensor, locate: Tensor, on_bits: bool = False) -> Tensor:
    """Equation 5: the predicted number and the predicted locations of masked patches must agree in each sub-volume.

    Args:
        count: logits of the number, (N, R, K + 1) for R sub-volumes of K patches.
        locate: logits of the locations, (N, R, K).
        on_bits: sum thresholded bits instead of probabilities, as the released code does. The location head then has
            no gradient.
    """
    probabilities = locate.sigmoid()
    bits = probabilities > 0.5
    number_follows = F.cross_entropy(count.flatten(0, 1), bits.sum(dim=2).flatten())
    located = bits.to(locate.dtype).sum(dim=2) if on_bits else probabilities.sum(dim=2)
    location_follows = F.mse_loss(located, count.argmax(dim=2).to(located.dtype))
    return (number_follows + location_follows) / 2


def contrastive_loss(first: Tensor, second: Tensor, temperature: float) -> Tensor:
    """Equation 6 over the global batch: the two codes of a sample attract, the other 2N - 2 codes repel.

    Args:
        first, second: codes of the two encodings, (N, D) each, of this part of the batch.

    Raises:
        ValueError: the global batch has one sample, so there are no negatives.
    """
    first, second = gather(first.float()), gather(second.float())
    number = len(first)
    if number < 2:
        raise ValueError("the contrastive loss has no negatives for one sample: use a batch of two or more")
    codes = F.normalize(torch.cat([first, second]), dim=1)
    with torch.autocast(codes.device.type, enabled=False):
        similarity = codes @ codes.T / temperature
    diagonal = torch.eye(2 * number, dtype=torch.bool, device=codes.device)
    partner = torch.arange(2 * number, device=codes.device).roll(number)
    return F.cross_entropy(similarity.masked_fill(diagonal, float("-inf")), partner)
