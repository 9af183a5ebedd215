"""Every method on every backbone that it fits: finite in both precisions, as on the CPU, and never waiting."""

import numpy as np
import pytest
import torch

from harness.errors import UserError
from tests.gpu.fitted import BACKBONES, CPU, METHODS, Fitted, fit, same_draws, whole_fp32

pytestmark = pytest.mark.gpu

STEPS = 10
# Of a loss, between the CPU's and the GPU's sums in another order; later steps carry what earlier ones differed by, and
# AdamW's first steps are of size lr however small a gradient is.
FIRST, LATER = 1e-4, 2e-2


def fitted(name: str, backbone: str, folder, device: torch.device, **settings) -> Fitted:
    try:
        return fit(name, backbone, folder, device, **settings)
    except UserError as error:
        pytest.skip(f"does not fit: {error}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_and_a_step_changes_the_weights(name, backbone, precision, device, tmp_path):
    subject = fitted(name, backbone, tmp_path, device, precision=precision)
    before = [p.detach().clone() for p in subject.trainer.trained]
    losses = subject.losses(range(1, 4))
    assert np.isfinite(losses).all()
    after = [p.detach() for p in subject.trainer.trained]
    assert all(bool(p.isfinite().all()) for p in after)
    # A gradient reached nearly all of them: some biases before a norm have none but rounding's.
    moved = np.mean([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert moved > 0.5
    assert subject.trainer.used()["precision"] == precision


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_are_those_of_the_cpu(name, backbone, device, tmp_path, said):
    losses = []
    for where in (CPU, device):
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        with same_draws(), whole_fp32():
            losses.append(fitted(name, backbone, folder, where).losses(range(1, STEPS + 1)))
    apart = np.abs(np.subtract(*losses)) / np.abs(losses[0])
    said(f"first step {apart[0]:.1e} apart, worst of {STEPS} {apart.max():.1e}")
    assert apart[0] < FIRST
    assert apart.max() < LATER
    # Not a constant: a method that ignored its input would pass otherwise.
    assert np.ptp(losses[0]) > 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_a_step_never_waits_for_the_device(name, backbone, precision, gpu, tmp_path):
    subject = fitted(name, backbone, tmp_path, gpu, precision=precision)
    # What networks keep from step to step is made in the first one.
    batches = [subject.batch(number) for number in (1, 2, 3)]
    subject.step(1, batches[0])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for number in (2, 3):
            subject.step(number, batches[number - 1])
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_read_on_the_host_would_be_noticed(gpu):
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.ones(1, device=gpu).item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
