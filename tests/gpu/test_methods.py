"""Every method on every backbone that it fits: finite in both precisions, as on the CPU, and never waiting."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from harness.system.errors import UserError
from harness.training.trainer import FINITE
from tests.gpu.fitted import BACKBONES, CPU, METHODS, Fitted, fit, same_draws, whole_fp32

pytestmark = pytest.mark.gpu

STEPS = 10
LR = 1e-4  # the paper's
# How far a loss may be from the CPU's, of its size. The first one differs by the order of sums alone; the later ones carry what
# weights differ by, since AdamW's first steps are of size lr however small a gradient is.
FIRST, LATER = 5e-4, 2e-2
# Its loss is made of cosines of two crops under batch norm over two: two memory layouts on one CPU are up to 8e-2 apart.
CHAOTIC = {"voco": 0.25}


def fitted(name: str, backbone: str, folder, device: torch.device, **settings) -> Fitted:
    try:
        return fit(name, backbone, folder, device, **settings)
    except UserError as error:
        pytest.skip(f"does not fit: {error}")


@contextmanager
def never_waiting(device: torch.device) -> Iterator[None]:
    """Within it, whatever makes the host wait for the device raises RuntimeError."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_losses_are_finite_weights_move_and_no_step_waits_for_the_device(name, backbone, precision, device, tmp_path):
    subject = fitted(name, backbone, tmp_path, device, precision=precision)
    batches = [subject.batch(number) for number in (1, 2, 3)]
    before = [p.detach().clone() for p in subject.trainer.trained]
    # What networks keep from step to step is made in the first one.
    found = [subject.step(1, batches[0])]
    with never_waiting(device):
        found += [subject.step(number, batches[number - 1]) for number in (2, 3)]
    assert all(bool(terms.pop(FINITE)) for terms in found)
    assert np.isfinite([float(term) for terms in found for term in terms.values()]).all()
    after = [p.detach() for p in subject.trainer.trained]
    assert all(bool(p.isfinite().all()) for p in after)
    # A gradient reached nearly all of them: some biases before a norm have none but rounding's.
    assert np.mean([not torch.equal(a, b) for a, b in zip(before, after, strict=True)]) > 0.5
    assert subject.trainer.used()["precision"] == precision


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("name", METHODS)
def test_ten_steps_are_those_of_the_cpu(name, backbone, device, tmp_path, said):
    losses = []
    for where in (CPU, device):
        folder = tmp_path / str(len(losses))
        folder.mkdir()
        with same_draws(), whole_fp32():
            losses.append(fitted(name, backbone, folder, where, lr=LR).losses(range(1, STEPS + 1)))
    apart = np.abs(np.subtract(*losses)) / np.abs(losses[0])
    said(f"first step {apart[0]:.1e} apart, worst of {STEPS} {apart.max():.1e}")
    assert apart[0] < FIRST
    assert apart.max() < CHAOTIC.get(name, LATER)
    # Not a constant: a method that ignored its input would pass otherwise.
    assert np.ptp(losses[0]) > 0


def test_a_read_on_the_host_would_be_noticed(gpu):
    with never_waiting(gpu), pytest.raises(RuntimeError, match="synchroniz"):
        torch.ones(1, device=gpu).item()
