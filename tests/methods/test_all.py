"""What holds for every method that pre-trains."""

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones.unet import UNet
from harness.api.losses import dice_loss
from harness.api.registry import Registry
from harness.conformance.fixture import MethodFixture
from harness.training.segmenter import Segmenter

REGISTRY = Registry()
METHODS = [name for name in REGISTRY.names("method") if REGISTRY.load("method", name).trains]


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, backbone, tmp_path):
    """Fake tensors have no values: whatever reads one on the host (item, a branch, a mask's size) raises."""
    built = MethodFixture(REGISTRY.load("method", name), REGISTRY.load("backbone", backbone), tmp_path).new()
    (batch,) = built.batches(1)
    # What networks keep from step to step is made in the first one.
    built.method(batch)
    built.method.generator = None
    check_without_values(built.method, batch)
    built.method.after_step(1)


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_fine_tuning_step_never_waits_for_the_device(overlapping):
    network = UNet(UNet.Config(features=(4, 4, 8, 8, 8)), in_channels=1)
    network.set_head(3)
    target = torch.ones(2, 3, 32, 32, 32) if overlapping else torch.ones(2, 1, 32, 32, 32, dtype=torch.long)
    check_without_values(Segmenter(network, overlapping), {"image": torch.rand(2, 1, 32, 32, 32), "target": target})


def check_without_values(module, batch):
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        fake = {key: mode.from_tensor(value) for key, value in batch.items()}
        terms = module(fake)
        sum(terms.values()).backward()
    assert all(term.ndim == 0 for term in terms.values())


@pytest.mark.parametrize("overlapping", [False, True])
def test_dice_loss_equals_monais(overlapping):
    torch.manual_seed(0)
    logits = torch.randn(2, 3, 8, 6, 5)
    if overlapping:
        target = torch.randint(0, 2, logits.shape).float()
        found = dice_loss(logits.sigmoid(), target)
        wanted = DiceLoss(sigmoid=True, batch=True)(logits, target)
    else:
        labels = torch.randint(0, 2, (2, 1, 8, 6, 5))  # the last class is nowhere
        found = dice_loss(logits.softmax(dim=1), labels == torch.arange(3).view(1, 3, 1, 1, 1))
        wanted = DiceLoss(softmax=True, to_onehot_y=True, batch=True)(logits, labels)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_states_its_source(name):
    fields = REGISTRY.load("method", name).Config.model_fields
    assert all(field.description for field in fields.values())


@pytest.mark.slow  # without bf16 instructions a step takes many seconds
@pytest.mark.parametrize("name", METHODS)
def test_bf16_autocast_gives_nearly_the_same_losses(name, tmp_path):
    built = MethodFixture(REGISTRY.load("method", name), REGISTRY.load("backbone", "segresnet"), tmp_path).new()
    (batch,) = built.batches(1)
    losses = []
    for low in (False, True):
        built.reseed()
        with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
            losses.append([float(term) for term in built.method(batch).values()])
    assert np.isfinite(losses).all()
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.15, atol=0.05)
