"""What plugins return is what the contract says, or is named."""

import pytest
import torch

from harness.api.returned import wrong_images, wrong_terms

IMAGE = torch.zeros(2, 1, 4, 4, 4)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"a": torch.tensor(1.0), "b": torch.zeros((), requires_grad=True)}, ""),
        (torch.tensor(1.0), "it returned Tensor"),
        ({}, "it returned an empty dict"),
        (None, "it returned NoneType"),
        ({1: torch.tensor(1.0)}, "named a term 1: names are text"),
        ({"a": 0.5}, "term 'a' is not a scalar tensor but float"),
        ({"a": torch.zeros(1)}, "term 'a' is not a scalar tensor but of shape (1,)"),
    ],
)
def test_loss_terms_are_named_scalars(value, says):
    wrong = wrong_terms(value)
    assert says in wrong
    assert bool(wrong) == bool(says)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({}, ""),
        ({"masked": IMAGE}, ""),
        ([IMAGE], "it returned list"),
        ({"masked": IMAGE.numpy()}, "ndarray: give tensors by name"),
        ({3: IMAGE}, "show gives 3"),
        ({"masked": IMAGE[0]}, "of shape (1, 4, 4, 4): give (N, C, x, y, z)"),
    ],
)
def test_pictures_are_named_volumes(value, says):
    wrong = wrong_images(value)
    assert says in wrong
    assert bool(wrong) == bool(says)
