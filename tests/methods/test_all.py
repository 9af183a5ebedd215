"""What holds for every method that pre-trains, and for every one that masks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.losses import DiceLoss
from torch._subclasses.fake_tensor import FakeTensorMode

from backbones.unet import UNet
from harness import UserError
from harness.api.losses import dice_loss
from harness.api.registry import Registry
from harness.conformance.fixture import MethodFixture
from harness.training.segmenter import Segmenter
from methods.mae import MAE
from methods.simmim import SimMIM
from methods.unetformer import UNetFormer
from tests.methods.masked import hidden_by, keep, make
from tests.methods.parts import generator, images, swin, unet, unetr

REGISTRY = Registry()
METHODS = [name for name in REGISTRY.names("method") if REGISTRY.load("method", name).trains]
CONTROLS = ("scratch", "supervised", "untrained")
MASKED = [SimMIM, UNetFormer, MAE]
BACKBONES = [unet, swin, unetr]


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, backbone, tmp_path):
    """Fake tensors have no values: whatever reads one on the host (item, a branch, a mask's size) raises."""
    method, network = REGISTRY.load("method", name), REGISTRY.load("backbone", backbone)
    if method.needs - network.abilities:
        pytest.skip(f"{name} cannot use {backbone}")
    built = MethodFixture(method, network, tmp_path).new()
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


@pytest.mark.parametrize("name", [name for name in REGISTRY.names("method") if name not in CONTROLS])
def test_every_method_has_a_page_that_names_each_of_its_settings(name):
    page = (Path(__file__).parents[2] / "docs" / "methods" / f"{name}.md").read_text()
    assert page.startswith("# ")
    assert re.search(r"^\| item \| paper.* \| released code.* \| ours \| why \|", page, flags=re.MULTILINE)
    fields = REGISTRY.load("method", name).Config.model_fields
    assert not {field for field in fields if f"`method.{field}`" not in page}


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


@pytest.mark.parametrize("method", MASKED)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_network_never_sees_what_is_masked(method, backbone, monkeypatch):
    """The prediction is the same whatever lies under the mask: a leak would make the task trivial."""
    made, image = make(method, backbone), images()
    mask = hidden_by(made, image)
    other = torch.where(mask, torch.rand_like(image), image)
    predictions = []
    monkeypatch.setattr(made.predict, "forward", keep(made.predict.forward, predictions))
    for seen in (image, other):
        made.generator = generator()
        made({"image": seen})
    torch.testing.assert_close(predictions[0], predictions[1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", MASKED)
def test_visible_voxels_do_not_count(method, monkeypatch):
    made, image = make(method, unet), images()
    mask = hidden_by(made, image)
    restored = []
    monkeypatch.setattr(made.predict, "forward", keep(made.predict.forward, restored))
    (loss,) = made({"image": image}).values()
    error = (restored[0] - image).abs() if method is not MAE else (restored[0] - image).square()
    assert loss.item() == pytest.approx(error[mask.expand_as(error)].mean().item(), rel=1e-5)
    assert loss.item() != pytest.approx(error.mean().item(), rel=1e-5)


@pytest.mark.parametrize(("method", "ratio", "masked"), [(SimMIM, 0.6, 10), (UNetFormer, 0.4, 7), (MAE, 0.75, 12)])
def test_published_ratios(method, ratio, masked):
    made = make(method, unet)
    assert made.config.mask_ratio == ratio
    mask = hidden_by(made, images(3))
    assert (mask.flatten(1).sum(dim=1) == masked * 16**3).all()


@pytest.mark.parametrize("method", [SimMIM, UNetFormer])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_mask_token_is_learned(method, backbone):
    made = make(method, backbone)
    sum(made({"image": images()}).values()).backward()
    assert made.token.grad.abs().sum() > 0
    assert made.token.shape == (made.backbone.token_width or 1,)


@pytest.mark.parametrize(
    ("method", "backbone", "settings", "says"),
    [
        (SimMIM, unet, {"patch": (12, 16, 16)}, "does not divide the crop"),
        (SimMIM, unet, {"patch": (32, 64, 32)}, "masks 1 of the 1 patches"),
        (MAE, unet, {"mask_ratio": 0.99}, "masks 16 of the 16 patches"),
        (UNetFormer, unetr, {"patch": (8, 8, 8)}, "is not a multiple of the 16 voxels"),
        (MAE, swin, {"densify": True}, "multiple of the deepest stride"),
    ],
)
def test_settings_that_do_not_fit_are_refused(method, backbone, settings, says):
    with pytest.raises(UserError, match=says):
        make(method, backbone, **settings).check((32, 64, 32), 2)
