"""The same step on one process and on several."""

import pytest

from harness.api.registry import Registry
from harness.conformance.consistency import check_processes
from harness.conformance.suite import TWO, check_method
from tests.harness.toy_method import write_toy


def test_weights_that_part_between_processes_are_found(tmp_path):
    old = "def forward"
    new = """def after_step(self, step):
        with torch.no_grad():
            next(self.backbone.parameters()).add_(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)

    def forward"""
    (result,) = check_method("toy", [write_toy(tmp_path, old, new)], ["unet"], checks=[TWO])
    assert (result.status, "other weights" in result.detail) == ("FAIL", True)


METHODS = [name for name in Registry().names("method") if Registry().load("method", name).trains]


@pytest.mark.slow
@pytest.mark.parametrize("number", [2, 4])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_on_several_processes(number, method):
    print(method, number, check_processes(number, method, [], "unet", {}))
