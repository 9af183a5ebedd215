"""Instance norm of channels-last features on a GPU, without the copies to channels-first and back that torch makes.

Torch's own `instance_norm` converts such features to channels-first and normalises them; the next layer must convert them back.
Instance norm of one sample is batch norm of a batch of one, and the kernels of batch norm (those of `torch.nn.SyncBatchNorm`)
support the channels-last layout.
"""

from typing import Any

import torch
from torch import Tensor


def normalise(features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Instance norm: every channel of every sample gets mean 0 and variance 1, then `weight` and `bias` are applied.

    Args:
        features: (N, C, x, y, z), channels-last, on a GPU.
        weight, bias: (C,), or None for a norm without them.
        eps: is added to the variance.

    Returns:
        The normalised features, in the same shape and layout.
    """
    normalised: Tensor = _Normalise.apply(features, weight, bias, eps)
    return normalised


class _Normalise(torch.autograd.Function):
    """Instance norm by the kernels of batch norm, one sample at a time."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """Normalise, as `normalise` says."""
        out = torch.empty_like(features)
        moments = []
        for sample, normalised in zip(features.split(1), out.split(1), strict=True):
            mean, scale = torch.batch_norm_stats(sample, eps)
            torch.ops.aten.batch_norm_elemt.out(sample, weight, bias, mean, scale, eps, out=normalised)
            moments += [mean, scale]
        ctx.save_for_backward(features, weight, *moments)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """Gradient of the output -> gradients of the features, the weight and the bias."""
        features, weight, *moments = ctx.saved_tensors
        slope = slope.contiguous(memory_format=torch.channels_last_3d)
        count = torch.full((1,), features[0, 0].numel(), dtype=torch.int32, device=features.device)
        slopes, weights, biases = [], [], []
        for n, (sample_slope, sample) in enumerate(zip(slope.split(1), features.split(1), strict=True)):
            mean, scale = moments[2 * n], moments[2 * n + 1]
            affine = weight is not None
            sums = torch.batch_norm_backward_reduce(sample_slope, sample, mean, scale, weight, True, affine, affine)
            slopes.append(
                torch.batch_norm_backward_elemt(sample_slope, sample, mean, scale, weight, sums[0], sums[1], count)
            )
            weights.append(sums[2])
            biases.append(sums[3])
        features_slope = slopes[0] if len(slopes) == 1 else torch.cat(slopes)
        if weight is None:
            return features_slope, None, None, None
        return features_slope, torch.stack(weights).sum(dim=0), torch.stack(biases).sum(dim=0), None
