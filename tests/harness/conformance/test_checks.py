"""Each kind of fault is found and named."""

import pytest

from harness.conformance.suite import check_method
from tests.harness.toy_method import FAULTS, write_toy


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(fault, tmp_path):
    old, new, check, says = FAULTS[fault]
    (result,) = check_method("toy", [write_toy(tmp_path, old, new)], ["unet"], checks=[check])
    assert result.status == "FAIL", result
    assert says in result.detail
