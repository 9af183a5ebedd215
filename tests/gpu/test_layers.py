"""Layers that stand in for torch's on a GPU, against torch's in double precision."""

import copy

import pytest
import torch
from torch import nn

from harness.compute.layers import InstanceNorm3d

pytestmark = pytest.mark.gpu


def apart(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative, in the Euclidean norm."""
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 6, 5, 4), (2, 64, 32, 32, 32), (3, 48, 9, 7, 10), (2, 256, 2, 2, 2)])
def test_instance_norm_of_channels_last_features(shape, affine, dtype, gpu):
    torch.manual_seed(0)
    layer = InstanceNorm3d(shape[1], affine=affine).to(gpu)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    plain = nn.InstanceNorm3d(shape[1], affine=affine).to(gpu).double()
    plain.load_state_dict(copy.deepcopy(layer.state_dict()))
    # Far from 0, where sums of squares lose digits.
    given = (torch.randn(shape, device=gpu) + 3).to(dtype).to(memory_format=torch.channels_last_3d).requires_grad_()
    slope = torch.randn(shape, device=gpu).to(dtype)
    exact = given.detach().double().contiguous().requires_grad_()
    found, wanted = layer(given), plain(exact)
    found.backward(slope)
    wanted.backward(slope.double())
    most = 1e-5 if dtype == torch.float32 else 1e-2
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    assert apart(found.detach(), wanted.detach()) < most
    assert apart(given.grad, exact.grad) < (1e-4 if dtype == torch.float32 else 2e-2)
    if affine:
        assert apart(layer.weight.grad, plain.weight.grad) < most
        assert apart(layer.bias.grad, plain.bias.grad) < most


def test_instance_norm_copies_nothing(gpu):
    """Forward and backward take no more kernels than batch norm's own, and none of torch's copies."""
    layer = InstanceNorm3d(32, affine=True).to(gpu)
    given = torch.randn(2, 32, 16, 16, 16, device=gpu).to(memory_format=torch.channels_last_3d).requires_grad_()
    slope = torch.randn_like(given)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as seen:
        layer(given).backward(slope)
        torch.cuda.synchronize()
    names = [event.name for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert any("batch_norm" in name for name in names)
    assert not [name for name in names if "direct_copy" in name]
