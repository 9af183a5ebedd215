"""What the launcher's environment means."""

import pytest
import torch

from harness.compute import devices
from harness.system.errors import UserError


def test_the_launchers_precision_is_followed_unless_the_run_says_otherwise(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert devices.precision("auto", cpu) == "bf16"
    assert devices.precision("fp32", cpu) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(UserError, match="launch with bf16 or no"):
        devices.precision("auto", cpu)


@pytest.mark.parametrize(("has_amx", "expected"), [(True, "bf16"), (False, "fp32")])
def test_a_processor_computes_in_bf16_by_default_only_with_amx(has_amx, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    assert devices.precision("auto", torch.device("cpu")) == expected
    assert devices.precision("fp32", torch.device("cpu")) == "fp32"
