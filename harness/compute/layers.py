"""Layers that stand in for torch's where those are slow or wrong on a CPU; same parameters, keys and outputs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.api.global_batch import all_reduce, processes
from harness.compute import gpu_norm

ROWS = 8192  # voxels summed in one go: float32 sums of a whole crop would lose digits


class InstanceNorm3d(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` without its copies of channels-last features.

    Torch's own turns such features into channels-first ones and back, forward and backward, which costs more than the
    norm itself; and for a batch of one its gradient is wrong where what comes back is channels-last (torch 2.14.1).
    On a GPU see `harness.compute.gpu_norm`; elsewhere (channels-first) this is torch's own.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, x, y, z) -> the same shape and layout, every channel of every sample at mean 0 and variance 1.

        Raises:
            ValueError: as `torch.nn.InstanceNorm3d`, for other shapes or a single voxel.
        """
        in_rows = features.is_contiguous(memory_format=torch.channels_last_3d) and not features.is_contiguous()
        # A compiler has an instance norm of its own.
        if features.is_cuda and in_rows and not self.track_running_stats and not torch.compiler.is_compiling():
            return gpu_norm.normalise(features, self.weight, self.bias, self.eps)
        if features.device.type != "cpu" or not in_rows or self.track_running_stats:
            return super().forward(features)
        normalised: Tensor = _Normalise.apply(features, self.weight, self.bias, self.eps)
        return normalised


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` that computes in fp32 what torch gets wrong in bf16 on a CPU.

    With AVX-512 bf16 and no AMX, the weight gradient of a kernel of 3 over features of at most two voxels along an axis,
    the deepest ones of small crops, reads memory that was never written (torch 2.14.1). Those features are so few that
    fp32 costs nothing.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> (N, out_channels, x', y', z')."""
        if features.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(features.shape[2:]) <= 2:
            with torch.autocast("cpu", enabled=False):
                return super().forward(features.float())
        return super().forward(features)


class BatchNorm(_BatchNorm):
    """Batch norm whose moments are those of the whole batch, however many processes share it, on a CPU too.

    Torch's SyncBatchNorm is for GPUs only. With one process, and in evaluation, this is the layer that it stands in for.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, ...) -> the same shape."""
        if not self.training or processes() == 1:
            found: Tensor = super().forward(features)
            return found
        axes = [0, *range(2, features.ndim)]
        shape = (1, -1, *(1,) * (features.ndim - 2))
        wide = features if features.dtype == torch.float64 else features.float()
        mean = all_reduce(wide.mean(axes)) / processes()
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().mean(axes)) / processes()
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            number = processes() * features.numel() / features.shape[1]
            self._follow(mean.detach(), variance.detach() * number / (number - 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(features.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


@cache
def _stand_in(kind: Any) -> Any:
    """The class that takes the place of `kind`, which may be a plugin's own kind of batch norm."""
    if issubclass(kind, _BatchNorm) and not issubclass(kind, BatchNorm | nn.InstanceNorm3d | nn.SyncBatchNorm):
        return type(kind.__name__, (BatchNorm, kind), {})
    return STAND_INS.get(kind, kind)


STAND_INS: dict[type[nn.Module], type[nn.Module]] = {nn.InstanceNorm3d: InstanceNorm3d, nn.Conv3d: Conv3d}


def prepare_module(module: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Move `module` to where it is computed, in the memory layout asked for, its layers replaced by those above."""
    for layer in module.modules():
        # The same parameters, buffers and hooks under another forward pass: nothing to build or to copy.
        kind: Any = type(layer)
        layer.__class__ = _stand_in(kind)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return module.to(device).to(memory_format=layout)


class _Normalise(torch.autograd.Function):
    """Instance norm of channels-last features: batch norm's kernels, sample by sample, written in place."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        out = torch.empty_like(features)
        means, scales = [], []
        for sample, normalised in zip(features.split(1), out.split(1), strict=True):
            mean, variance = _moments(sample)
            empty = mean.new_empty(0)
            torch.ops.aten.native_batch_norm.out(
                *(sample, weight, bias, mean, variance, False, 0.0, eps),
                out=normalised,
                save_mean=empty,
                save_invstd=empty.clone(),
            )
            means.append(mean)
            scales.append((variance + eps).rsqrt())
        ctx.save_for_backward(features, weight, *means, *scales)
        ctx.eps = eps
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        features, weight, *moments = ctx.saved_tensors
        means, scales = moments[: len(features)], moments[len(features) :]
        slope = slope.contiguous(memory_format=torch.channels_last_3d)
        out = torch.empty_like(features)
        kind = moments[0] if weight is None else weight
        sums = [kind.new_zeros(len(features), features.shape[1]) for _ in range(2)]
        for n, (mean, scale) in enumerate(zip(means, scales, strict=True)):
            place = slice(n, n + 1)
            torch.ops.aten.native_batch_norm_backward.out(
                *(slope[place], features[place], weight, None, None, mean, scale, True, ctx.eps, [True] * 3),
                out0=out[place],
                out1=sums[0][n],
                out2=sums[1][n],
            )
        if weight is None:
            return out, None, None, None
        return out, sums[0].sum(dim=0), sums[1].sum(dim=0), None


def _moments(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of one channels-last sample, (C,) each in float32."""
    depth, *plane = sample.shape[2:]
    slab = max(1, ROWS // (plane[0] * plane[1]))
    found = [torch.ops.aten.batch_norm_update_stats(part, None, None, 0.0) for part in sample.split(slab, dim=2)]
    shares = torch.tensor([min(slab, depth - start) / depth for start in range(0, depth, slab)], dtype=torch.float64)
    means, variances = (torch.stack(each).double() for each in zip(*found, strict=True))
    mean = shares @ means
    # Chan, Golub, LeVeque 1979: variances of parts, and of their means around the mean of all.
    variance = shares @ (variances + (means - mean).square())
    return mean.float(), variance.float()
