"""Instance norm on a GPU against torch's in double precision. Its kernels exist on a GPU only: `pytest -m gpu`."""

import pytest
import torch
import torch.nn.functional as F

from harness.compute.gpu_norm import normalise

pytestmark = pytest.mark.gpu


@pytest.fixture
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false on this machine")
    return torch.device("cuda")


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("number", [1, 3])
def test_values_and_gradients_are_those_of_torch(number, affine, gpu):
    torch.manual_seed(0)
    given = (torch.randn(number, 6, 7, 5, 4, device=gpu) + 3).to(memory_format=torch.channels_last_3d)
    inputs = [given, *(torch.randn(6, device=gpu) for _ in range(2 * affine))]
    exact = [value.double().contiguous().requires_grad_() for value in inputs]
    inputs = [value.requires_grad_() for value in inputs]
    features, weight, bias = inputs if affine else (given, None, None)
    found = normalise(features, weight, bias, 1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last_3d)
    expected = F.instance_norm(
        exact[0], weight=exact[1] if affine else None, bias=exact[2] if affine else None, eps=1e-5
    )
    torch.testing.assert_close(found.double(), expected, atol=1e-4, rtol=1e-4)
    # A slope of another layout, as an einsum or a transpose hands it back.
    slope = torch.randn(number, 6, 7, 5, 4, device=gpu)
    slopes = torch.autograd.grad(found, inputs, slope)
    for mine, theirs in zip(slopes, torch.autograd.grad(expected, exact, slope.double()), strict=True):
        torch.testing.assert_close(mine.double(), theirs, atol=1e-3, rtol=1e-3)


def test_every_channel_of_every_sample_has_mean_0_and_variance_1(gpu):
    given = torch.rand(2, 5, 6, 6, 6, device=gpu) * torch.tensor([1.0, 10, 100, 1000, 1], device=gpu).view(
        1, 5, 1, 1, 1
    )
    found = normalise(given.to(memory_format=torch.channels_last_3d), None, None, 0.0).double()
    torch.testing.assert_close(found.mean(dim=(2, 3, 4)), torch.zeros(2, 5, device=gpu).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        found.var(dim=(2, 3, 4), correction=0), torch.ones(2, 5, device=gpu).double(), atol=1e-3, rtol=0
    )
