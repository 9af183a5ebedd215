"""Layers that stand in for torch's: same numbers, on the layouts and extents where torch's own are slow or wrong."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from harness.api.registry import Registry
from harness.compute.layers import Conv3d, InstanceNorm3d, prepare_module

LAST = torch.channels_last_3d
CPU = torch.device("cpu")


def gradients(layer, features, slope):
    features = features.detach().requires_grad_()
    layer.zero_grad()
    out = layer(features)
    out.backward(slope)
    return out.detach(), features.grad, *(parameter.grad.clone() for parameter in layer.parameters())


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(1, 16, 24, 24, 24), (3, 5, 9, 7, 130), (2, 8, 2, 2, 2)])
def test_instance_norm_equals_the_definition(shape, affine):
    torch.manual_seed(0)
    features, slope = torch.randn(shape) * 2 + 5, torch.randn(shape)
    mine = InstanceNorm3d(shape[1], affine=affine)
    exact = nn.InstanceNorm3d(shape[1], affine=affine)
    if affine:
        nn.init.normal_(mine.weight)
        nn.init.normal_(mine.bias)
        exact.load_state_dict(mine.state_dict())
    # Channels-first and in double precision, torch's own is right.
    wanted = gradients(exact.double(), features.double(), slope.double())
    found = gradients(mine, features.to(memory_format=LAST), slope.to(memory_format=LAST))
    for number, (got, due) in enumerate(zip(found, wanted, strict=True)):
        torch.testing.assert_close(got.double(), due, rtol=1e-4, atol=2e-5 * float(due.abs().max()), msg=str(number))
    assert found[0].is_contiguous(memory_format=LAST)
    assert found[1].is_contiguous(memory_format=LAST)


def test_instance_norm_sums_many_voxels_without_losing_digits():
    """Batch norm's own float32 sums of a million voxels far from 0 are not so exact."""
    features = (torch.randn(1, 2, 100, 100, 100, generator=torch.Generator().manual_seed(0)) + 20).to(
        memory_format=LAST
    )
    found = InstanceNorm3d(2)(features).double()
    torch.testing.assert_close(found.mean(dim=(2, 3, 4)), torch.zeros(1, 2, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.var(dim=(2, 3, 4)), torch.ones(1, 2, dtype=torch.float64), rtol=0, atol=1e-4)


def test_instance_norm_in_bf16_stays_in_bf16():
    features = torch.randn(2, 8, 12, 12, 12).to(torch.bfloat16, memory_format=LAST)
    found = InstanceNorm3d(8, affine=True)(features)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), F.instance_norm(features.float()), rtol=0.02, atol=0.02)


def test_placing_keeps_parameters_keys_and_outputs():
    network = nn.Sequential(nn.Conv3d(2, 4, 3, padding=1), nn.InstanceNorm3d(4, affine=True), nn.LeakyReLU(0.1))
    image = torch.randn(2, 2, 8, 8, 8)
    before, state, held = network(image), network.state_dict(), list(network.parameters())
    placed = prepare_module(network, CPU, channels_last=True)
    assert [type(layer) for layer in placed] == [Conv3d, InstanceNorm3d, nn.LeakyReLU]
    assert list(placed.state_dict()) == list(state)
    assert all(a is b for a, b in zip(placed.parameters(), held, strict=True))
    torch.testing.assert_close(placed(image.to(memory_format=LAST)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("extent", [(2, 2, 4), (2, 4, 4), (4, 2, 2), (2, 2, 2), (4, 4, 4)])
def test_bf16_convolutions_have_right_gradients_where_features_are_few(extent):
    """torch 2.14.1 reads memory that was never written here, on CPUs with AVX-512 bf16 and no AMX."""
    torch.manual_seed(0)
    layer = Conv3d(32, 32, 3, padding=1)
    features, slope = torch.randn(2, 32, *extent), torch.randn(2, 32, *extent)
    exact = gradients(layer.double(), features.double(), slope.double())
    layer.float()
    for layout in (LAST, torch.contiguous_format):
        dirt = [torch.full((2**14,), 1e30) for _ in range(20)]
        del dirt
        with torch.autocast("cpu", torch.bfloat16):
            found = gradients(layer, features.to(memory_format=layout), slope.to(memory_format=layout))
        for got, due in zip(found, exact, strict=True):
            assert float((got.double() - due).norm() / due.norm()) < 0.02


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
def test_a_step_in_bf16_has_the_gradients_of_fp32(backbone):
    """Small crops, down to two voxels along an axis: no hardware may make up numbers."""
    registry = Registry()
    cls = registry.load("backbone", backbone)
    settings = {"unet": {"features": (4, 4, 8, 8, 8)}, "swinunetr": {"feature_size": 12, "depths": (1, 1, 1, 1)}}
    torch.manual_seed(0)
    network = cls(cls.Config(**settings[backbone], dropout=0.0), 1)
    network.set_head(2)
    prepare_module(network, CPU, channels_last=True)
    image, wanted = torch.rand(2, 1, 64, 64, 32), torch.rand(2, 2, 64, 64, 32)
    found = {}
    for bf16 in (False, True):
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            out = network(image.to(memory_format=LAST))
        ((out.float() - wanted) ** 2).mean().backward()
        found[bf16] = torch.cat([parameter.grad.flatten() for parameter in network.parameters()])
    assert F.cosine_similarity(found[False], found[True], dim=0) > 0.98
