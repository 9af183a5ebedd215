"""Budgets, and what they are in steps."""

import pytest

from harness import UserError
from tests.harness.short_stage import training_settings


def test_epochs_become_steps_and_a_long_warm_up_is_refused():
    assert training_settings(steps=None, epochs=3, warmup_epochs=1).schedule(num_cases=9) == (15, 5)
    with pytest.raises(UserError, match="does not fit"):
        training_settings(warmup_epochs=50).schedule(num_cases=9)
