"""Energy that a machine uses while a stage runs, where it tells: CPU packages by RAPL, NVIDIA GPUs by NVML.

RAPL counts whole packages, whoever uses them, so on a shared machine the others' work is in it. Most systems let only root read
it, and virtual machines have none.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pynvml
import torch

POWERCAP = Path("/sys/class/powercap")
EVERY = 20.0
"""Seconds between two reads of the counters. RAPL's counters start again from 0, so that they must be read in between."""

Counter = Callable[[], float]
"""Returns the joules that were used since the counter was made or last called."""


class EnergyMeter:
    """Adds up the energy that is used while it is asked every now and then.

    Attributes:
        joules: so far; None where no counter can be read.
        sources: what is counted: "rapl", "nvml".
    """

    def __init__(self, device: torch.device, processes: int = 1, powercap: Path | None = None) -> None:
        """Begin to count.

        Args:
            device: of this process.
            processes: that share the work; on a machine with several GPUs they use the first ones.
            powercap: folder of the RAPL counters; None for that of the machine.
        """
        packages = _packages(powercap or POWERCAP)
        gpus = _gpus(min(processes, torch.cuda.device_count())) if device.type == "cuda" else []
        self.sources = ["rapl"] * bool(packages) + ["nvml"] * bool(gpus)
        self._counters = [*packages, *gpus]
        self.joules: float | None = 0.0 if self._counters else None
        self._due = time.monotonic() + EVERY

    def sample(self, now: bool = False) -> None:
        """Add what was used since the last time. It does nothing for `EVERY` seconds after that, unless `now` is true."""
        if self.joules is None or not (now or time.monotonic() >= self._due):
            return
        self._due = time.monotonic() + EVERY
        try:
            self.joules += sum(counter() for counter in self._counters)
        except (OSError, ValueError, pynvml.NVMLError):  # a counter that has gone: what is missing is not known
            self.joules = None

    def go_on(self, joules: float | None) -> None:
        """Go on from an earlier part of the stage, whose energy is not known where `joules` is None."""
        self.joules = None if joules is None or self.joules is None else self.joules + joules


def _packages(powercap: Path) -> list[Counter]:
    """A counter per CPU package that this user may read; none if one of them cannot be read."""
    folders = sorted(powercap.glob("intel-rapl:*")) if powercap.is_dir() else []
    try:
        # `intel-rapl:0` is a package; `intel-rapl:0:1` is a part of it.
        return [_package(folder) for folder in folders if folder.name.count(":") == 1]
    except (OSError, ValueError):
        return []


def _package(folder: Path) -> Counter:
    """The counter of one package. Raises OSError if it cannot be read."""
    span = int((folder / "max_energy_range_uj").read_text())
    return _increments(lambda: int((folder / "energy_uj").read_text()), 1e-6, span)


def _gpus(number: int) -> list[Counter]:
    """A counter per GPU of those that this process sees; none if one of them does not count."""
    counters = []
    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        for index in range(number):
            identity = f"GPU-{torch.cuda.get_device_properties(index).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(identity.encode())
            counters.append(_gpu(handle))
        return counters
    return []


def _gpu(handle: object) -> Counter:
    """The counter of one GPU. Raises NVMLError if it has none, as GPUs before Volta."""
    return _increments(lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle), 1e-3, 2**63)


def _increments(read: Callable[[], int], unit: float, span: int) -> Counter:
    """A counter made of one that only rises, in `unit` joules, and starts again from 0 at `span`."""
    last = read()

    def increment() -> float:
        """Joules since the last call."""
        nonlocal last
        before, last = last, read()
        return ((last - before) % span) * unit

    return increment
