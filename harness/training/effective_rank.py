"""Effective rank of a backbone's features: how many independent directions each level of the pyramid uses."""

from collections.abc import Sequence

import torch
from torch import Tensor

from harness.api.backbone import Backbone

MOST_VOXELS = 4096  # of each crop and level; more change the rank little and cost much


def effective_rank(features: Tensor) -> float:
    """Roy and Vetterli 2007: the exponential of the entropy of the normalised singular values.

    Args:
        features: (samples, channels). The mean of each channel is subtracted first, as in a principal component analysis.

    Returns:
        1 for features that vary along one direction, the number of channels for features that vary equally along all, and 0
        for constant ones and for ones that are not finite.
    """
    if not torch.isfinite(features).all():
        return 0.0
    centred = features.double() - features.double().mean(dim=0)
    spread = torch.linalg.eigvalsh(centred.T @ centred).clamp_min(0).sqrt()
    if float(spread.sum()) <= 1e-12 * max(1.0, float(features.abs().max())):
        return 0.0
    shares = spread / spread.sum()
    return float(torch.exp(torch.special.entr(shares).sum()))


@torch.inference_mode()
def effective_ranks(backbone: Backbone, images: Sequence[Tensor]) -> list[float]:
    """The effective rank of each level of the pyramid, from fine to coarse, over the voxels of all images.

    The backbone computes in evaluation mode and is left in the mode that it was in.

    Args:
        images: crops (C, x, y, z), encoded one at a time.
    """
    was_training, device = backbone.training, next(backbone.parameters()).device
    pyramids = [backbone.eval().encode(image[None].to(device)) for image in images]
    backbone.train(was_training)
    ranks = []
    for level in zip(*pyramids, strict=True):
        voxels = [features[0].flatten(1).T.float() for features in level]
        ranks.append(effective_rank(torch.cat([rows[:: -(-len(rows) // MOST_VOXELS)] for rows in voxels])))
    return ranks
