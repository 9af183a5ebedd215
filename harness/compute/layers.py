"""Layers that replace those of torch that are slow or wrong. They have the same parameters, state dict keys and outputs."""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.api.global_batch import all_reduce, num_processes
from harness.compute import gpu_norm

ROWS = 8192  # voxels that are summed at a time, because float32 sums over a whole crop would lose digits


class InstanceNorm3d(nn.InstanceNorm3d):
    """`torch.nn.InstanceNorm3d` without its copies of channels-last features.

    Torch's layer converts such features to channels-first and back, in the forward and in the backward pass, which costs
    more than the norm itself. For a batch of one, its gradient is also wrong if the incoming gradient is channels-last
    (torch 2.14.1). On a GPU, channels-last features are normalised by `harness.compute.gpu_norm`. For channels-first
    features, this is torch's layer.
    """

    def forward(self, features: Tensor) -> Tensor:
        """Give every channel of every sample mean 0 and variance 1, then apply the layer's weight and bias.

        Args:
            features: (N, C, x, y, z).

        Returns:
            The normalised features, in the same shape and layout.

        Raises:
            ValueError: as `torch.nn.InstanceNorm3d`, for other shapes or a single voxel.
        """
        channels_last = features.is_contiguous(memory_format=torch.channels_last_3d) and not features.is_contiguous()
        # `torch.compile` replaces instance norm by its own code.
        if features.is_cuda and channels_last and not self.track_running_stats and not torch.compiler.is_compiling():
            return gpu_norm.normalise(features, self.weight, self.bias, self.eps)
        if features.device.type != "cpu" or not channels_last or self.track_running_stats:
            return super().forward(features)
        normalised: Tensor = _Normalise.apply(features, self.weight, self.bias, self.eps)
        return normalised


class Conv3d(nn.Conv3d):
    """`torch.nn.Conv3d` that computes in fp32 the convolutions that torch computes wrongly in bf16 on a CPU.

    With AVX-512 bf16 and no AMX, torch's weight gradient of a kernel of 3 over features of at most two voxels along an axis
    (the deepest features of small crops) reads memory that was never written (torch 2.14.1). These features are so few
    that fp32 costs nothing.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, in_channels, x, y, z) -> (N, out_channels, x', y', z')."""
        if features.device.type == "cpu" and torch.is_autocast_enabled("cpu") and min(features.shape[2:]) <= 2:
            with torch.autocast("cpu", enabled=False):
                return super().forward(features.float())
        return super().forward(features)


class BatchNorm(_BatchNorm):
    """Batch norm with the moments of the global batch, whatever the number of processes that share it, also on a CPU.

    Torch's SyncBatchNorm works on GPUs only. With one process, and in evaluation mode, this is the layer that it replaces.
    """

    def forward(self, features: Tensor) -> Tensor:
        """(N, C, ...) -> the normalised features, in the same shape."""
        if not self.training or num_processes() == 1:
            normalised: Tensor = super().forward(features)
            return normalised
        axes = [0, *range(2, features.ndim)]
        shape = (1, -1, *(1,) * (features.ndim - 2))
        wide = features if features.dtype == torch.float64 else features.float()
        mean = all_reduce(wide.mean(axes)) / num_processes()
        centred = wide - mean.view(shape)
        variance = all_reduce(centred.square().mean(axes)) / num_processes()
        if self.track_running_stats and self.running_mean is not None and self.running_var is not None:
            count = num_processes() * features.numel() / features.shape[1]
            self._update_running(mean.detach(), variance.detach() * count / (count - 1))
        out = centred * (variance + self.eps).rsqrt().view(shape)
        if self.weight is not None:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(features.dtype)

    @torch.no_grad()
    def _update_running(self, mean: Tensor, variance: Tensor) -> None:
        """Update the running moments with the mean and the unbiased variance of a batch, (C,) each."""
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked += 1
        momentum = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean), momentum)
        self.running_var.lerp_(variance.to(self.running_var), momentum)


@cache
def _replacement(layer_class: Any) -> Any:
    """The class that replaces `layer_class`, which may be a plugin's own batch norm; the same class if none does."""
    if issubclass(layer_class, _BatchNorm) and not issubclass(
        layer_class, BatchNorm | nn.InstanceNorm3d | nn.SyncBatchNorm
    ):
        return type(layer_class.__name__, (BatchNorm, layer_class), {})
    return REPLACEMENTS.get(layer_class, layer_class)


REPLACEMENTS: dict[type[nn.Module], type[nn.Module]] = {nn.InstanceNorm3d: InstanceNorm3d, nn.Conv3d: Conv3d}


def prepare_module(module: nn.Module, device: torch.device, channels_last: bool) -> nn.Module:
    """Replace layers of `module` by those of this file, and move it to its device. Returns the same module.

    Args:
        device: the device on which the module computes.
        channels_last: whether its memory layout is channels-last, otherwise contiguous.
    """
    for layer in module.modules():
        # Parameters, buffers and hooks stay, only the forward pass differs: no layer must be built or copied.
        layer_class: Any = type(layer)
        layer.__class__ = _replacement(layer_class)
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    return module.to(device).to(memory_format=layout)


class _Normalise(torch.autograd.Function):
    """Instance norm of channels-last features on a CPU, by the kernels of batch norm.

    The kernels compute one sample at a time, and write into its slice of the output.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """(N, C, x, y, z) channels-last -> the normalised features, in the same shape and layout."""
        out = torch.empty_like(features)
        means, scales = [], []
        for sample, normalised in zip(features.split(1), out.split(1), strict=True):
            mean, variance = _moments(sample)
            empty = mean.new_empty(0)
            torch.ops.aten.native_batch_norm.out(
                sample,
                weight,
                bias,
                mean,
                variance,
                training=False,
                momentum=0.0,
                eps=eps,
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
        """Gradient of the output -> gradients of the features, the weight and the bias."""
        features, weight, *moments = ctx.saved_tensors
        means, scales = moments[: len(features)], moments[len(features) :]
        slope = slope.contiguous(memory_format=torch.channels_last_3d)
        out = torch.empty_like(features)
        like = moments[0] if weight is None else weight
        sums = [like.new_zeros(len(features), features.shape[1]) for _ in range(2)]
        for n, (mean, scale) in enumerate(zip(means, scales, strict=True)):
            sample = slice(n, n + 1)
            torch.ops.aten.native_batch_norm_backward.out(
                slope[sample],
                features[sample],
                weight,
                running_mean=None,
                running_var=None,
                save_mean=mean,
                save_invstd=scale,
                train=True,
                eps=ctx.eps,
                output_mask=[True] * 3,
                out0=out[sample],
                out1=sums[0][n],
                out2=sums[1][n],
            )
        if weight is None:
            return out, None, None, None
        return out, sums[0].sum(dim=0), sums[1].sum(dim=0), None


def _moments(sample: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel of one channels-last sample: (C,) each, in float32.

    They are computed for slabs of about `ROWS` voxels and combined in float64.
    """
    depth, *plane = sample.shape[2:]
    slab = max(1, ROWS // (plane[0] * plane[1]))
    moments = [torch.ops.aten.batch_norm_update_stats(voxels, None, None, 0.0) for voxels in sample.split(slab, dim=2)]
    shares = torch.tensor([min(slab, depth - start) / depth for start in range(0, depth, slab)], dtype=torch.float64)
    means, variances = (torch.stack(each).double() for each in zip(*moments, strict=True))
    mean = shares @ means
    # Chan, Golub, LeVeque 1979: the variance is the mean of the slabs' variances plus the variance of the slabs' means.
    variance = shares @ (variances + (means - mean).square())
    return mean.float(), variance.float()
