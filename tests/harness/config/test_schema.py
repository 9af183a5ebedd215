"""Budgets, and what they are in steps."""

import pytest

from harness import UserError
from harness.api.settings import build
from harness.config.schema import Training
from tests.harness.short_stage import training_settings


def test_epochs_become_steps_and_a_long_warm_up_is_refused():
    assert training_settings(steps=None, epochs=3, warmup_epochs=1).schedule(num_cases=9) == (15, 5)
    with pytest.raises(UserError, match="does not fit"):
        training_settings(warmup_epochs=50).schedule(num_cases=9)


def test_a_momentum_that_adamw_would_not_use_is_refused():
    given = {"steps": 2, "crop": 8, "batch_size": 1, "lr": 0.1, "weight_decay": 0.0, "momentum": 0.5}
    assert build(Training, given | {"optimizer": "sgd"}, "finetune").momentum == 0.5
    with pytest.raises(UserError, match="momentum is a setting of the optimizer sgd"):
        build(Training, given, "finetune")
