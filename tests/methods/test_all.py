"""What holds for every method that pre-trains."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from harness.bench import Bench
from harness.registry import Registry

REGISTRY = Registry()
METHODS = [name for name in REGISTRY.names("method") if REGISTRY.load("method", name).trains]


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, backbone, tmp_path):
    """Fake tensors have no values: whatever reads one on the host (item, a branch, a mask's size) raises."""
    built = Bench(REGISTRY.load("method", name), REGISTRY.load("backbone", backbone), tmp_path).new()
    (batch,) = built.batches(1)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    built.method.generator = None
    with mode:
        fake = {key: mode.from_tensor(value) for key, value in batch.items()}
        terms = built.method(fake)
    assert all(term.ndim == 0 for term in terms.values())


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_states_its_source(name):
    fields = REGISTRY.load("method", name).Config.model_fields
    assert all(field.description for field in fields.values())


@pytest.mark.slow  # without bf16 instructions a step takes many seconds
@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_gives_nearly_the_same_losses(name, tmp_path):
    built = Bench(REGISTRY.load("method", name), REGISTRY.load("backbone", "segresnet"), tmp_path).new()
    (batch,) = built.batches(1)
    losses = []
    for low in (False, True):
        built.reseed()
        with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
            losses.append([float(term) for term in built.method(batch).values()])
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.15, atol=0.05)
