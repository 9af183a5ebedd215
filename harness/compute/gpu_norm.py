"""Instance norm of channels-last features on a GPU, without torch's copies to channels-first and back.

Torch's own `instance_norm` makes such features channels-first, normalises, and leaves the way back to whatever comes next. A
sample alone is a batch for batch norm, whose kernels (those of `torch.nn.SyncBatchNorm`) know the layout.
"""

from typing import Any

import torch
from torch import Tensor


def normalise(features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """(N, C, x, y, z), channels-last, on a GPU -> the same, every channel of every sample at mean 0 and variance 1."""
    normalised: Tensor = _Normalise.apply(features, weight, bias, eps)
    return normalised


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
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
        features, weight, *moments = ctx.saved_tensors
        slope = slope.contiguous(memory_format=torch.channels_last_3d)
        count = torch.full((1,), features[0, 0].numel(), dtype=torch.int32, device=features.device)
        slopes, weights, biases = [], [], []
        for n, (each, sample) in enumerate(zip(slope.split(1), features.split(1), strict=True)):
            mean, scale = moments[2 * n], moments[2 * n + 1]
            affine = weight is not None
            sums = torch.batch_norm_backward_reduce(each, sample, mean, scale, weight, True, affine, affine)
            slopes.append(torch.batch_norm_backward_elemt(each, sample, mean, scale, weight, sums[0], sums[1], count))
            weights.append(sums[2])
            biases.append(sums[3])
        found = slopes[0] if len(slopes) == 1 else torch.cat(slopes)
        if weight is None:
            return found, None, None, None
        return found, torch.stack(weights).sum(dim=0), torch.stack(biases).sum(dim=0), None
