"""What runs will take."""

from dataclasses import replace

import pytest

from harness.costs.estimate import Estimator, render
from tests.conftest import TINY, TINY_BUDGET
from tests.harness.small_requests import small_request

pytestmark = pytest.mark.usefixtures("quick_steps")


def test_estimate_counts_a_shared_pre_training_once(tmp_path, hippocampus_phantom):
    settings = (*TINY["unet"], *TINY_BUDGET)
    base = small_request("simmim", runs=tmp_path, data=hippocampus_phantom, settings=settings)
    estimator = Estimator()
    first, second = (estimator.estimate(replace(base, label_fraction=share)) for share in (1.0, 0.5))
    assert "pretrain" in first.seconds
    assert second.shared
    assert "pretrain" not in second.seconds
    assert second.seconds["prepare"] == 0
    assert "shared" in render([first, second])
