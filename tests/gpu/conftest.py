"""Tests of what only a GPU shows. `HARNESS_TEST_DEVICE=cpu` runs those that make sense on a CPU, to debug them."""

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

WANTED = os.environ.get("HARNESS_TEST_DEVICE", "cuda")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the tests compute."""
    if WANTED == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device: torch.cuda.is_available() is false on this machine")
    return torch.device(WANTED)


@pytest.fixture
def gpu(device: torch.device) -> torch.device:
    """For tests that say nothing elsewhere: of events, of the GPU's memory, of the host that waits for it."""
    if device.type != "cuda":
        pytest.skip("of a GPU only")
    return device


@pytest.fixture
def said(request: Any) -> Callable[[str], None]:
    """Takes a line about what was measured; all of them are printed at the end, passed or not."""

    def say(line: str) -> None:
        # With the report, so that lines of the workers of `-n` come along.
        request.node.user_properties.append(("measured", line))

    return say


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    """Memory that one test keeps is not the next one's."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = [
        f"{report.nodeid.rpartition('::')[2]}: {text}"
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, text in report.user_properties
        if name == "measured"
    ]
    if lines:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
        terminalreporter.section(f"measured on {card}, torch {torch.__version__}")
        for line in sorted(lines):
            terminalreporter.write_line(line)
