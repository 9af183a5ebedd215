"""The loss of fine-tuning against MONAI's and torch's."""

import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceLoss
from torch import nn

from harness.training.segmenter import Segmenter


class Fixed(nn.Module):
    """Logits, whatever the image."""

    def __init__(self, shape):
        super().__init__()
        torch.manual_seed(0)
        self.logits = nn.Parameter(torch.randn(shape, dtype=torch.float64))
        self.norm = nn.BatchNorm3d(2)

    def forward(self, image):
        return self.logits.to(torch.float32)


def terms(overlapping, target, shape=(2, 3, 4, 5, 6)):
    network = Fixed(shape)
    found = Segmenter(network, overlapping)({"image": torch.zeros(2, 1, 4, 5, 6), "target": target})
    sum(found.values()).backward()
    return found, network.logits, network.logits.grad


def test_targets_that_exclude_each_other_have_monais_dice_and_a_softmax_cross_entropy():
    target = torch.randint(0, 3, (2, 1, 4, 5, 6), generator=torch.Generator().manual_seed(1))
    found, logits, slope = terms(False, target)
    again = logits.detach().clone().requires_grad_()
    monai = DiceLoss(to_onehot_y=True, softmax=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)
    dice, entropy = monai(again, target), F.cross_entropy(again, target[:, 0])
    torch.testing.assert_close(found["dice"].double(), dice, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["cross_entropy"].double(), entropy, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(slope, torch.autograd.grad(dice + entropy, again)[0], atol=1e-6, rtol=1e-4)
    assert set(found) == {"dice", "cross_entropy"}


def test_targets_that_overlap_have_a_binary_cross_entropy_each():
    target = (torch.rand(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(1)) > 0.5).float()
    found, logits, slope = terms(True, target)
    again = logits.detach().clone().requires_grad_()
    likely = again.sigmoid()
    entropy = -(target * likely.log() + (1 - target) * (1 - likely).log()).mean()
    dice = DiceLoss(sigmoid=True, batch=True, smooth_nr=1e-5, smooth_dr=1e-5)(again, target.double())
    torch.testing.assert_close(found["dice"].double(), dice, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(found["cross_entropy"].double(), entropy, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(slope, torch.autograd.grad(dice + entropy, again)[0], atol=1e-6, rtol=1e-4)


def test_logits_in_bf16_have_a_loss_in_float32():
    network = nn.Conv3d(1, 3, 1, dtype=torch.bfloat16)
    batch = {"image": torch.rand(1, 1, 4, 4, 4).bfloat16(), "target": torch.zeros(1, 1, 4, 4, 4, dtype=torch.int64)}
    assert {term.dtype for term in Segmenter(network, False)(batch).values()} == {torch.float32}


@pytest.mark.parametrize("mode", [True, False])
def test_what_is_fixed_stays_in_evaluation_mode(mode):
    network = Fixed((2, 3, 4, 5, 6))
    segmenter = Segmenter(network, False, fixed=(network.norm,))
    assert segmenter.train(mode) is segmenter
    assert not network.norm.training
    assert network.training == segmenter.training == mode
