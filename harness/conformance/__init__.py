"""Checks of a method against its contract: those of `harness check-method`, and the same for the tests of a plugin.

from harness.conformance import assert_conforms

def test_my_method():
    assert_conforms("my_method")            # an installed plugin, or plugins=["my_method.py"]
"""

from harness.conformance.checks import CHECKS
from harness.conformance.suite import Result, assert_conforms, check_method, report

__all__ = ["CHECKS", "Result", "assert_conforms", "check_method", "report"]
