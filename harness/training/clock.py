"""Time per phase of a training step."""

import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

PHASES = ("data", "transfer", "forward", "backward", "optimizer")
UPDATE = PHASES[2:]
"""What a step is in the papers: forward, backward and update; no reading, preprocessing or copying."""

WARMUP_STEPS = 5  # left out of the step times: allocators, caches and autotuning


class StepClock:
    """Time per phase of each step: host clock on a CPU; on a GPU events, which are read without stopping the step."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[list[Any]] = []
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def start(self) -> None:
        """Begin a step."""
        self.marks.append([("", self._mark())])

    def lap(self, phase: str) -> None:
        """End a phase; a phase may come several times in a step."""
        self.marks[-1].append((phase, self._mark()))

    def read(self) -> None:
        """Turn marks into seconds; on a GPU this waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        for marks in self.marks:
            spans = dict.fromkeys(PHASES, 0.0)
            for (_, a), (phase, b) in pairwise(marks):
                spans[phase] += a.elapsed_time(b) / 1000 if self.cuda else b - a
            for phase, span in spans.items():
                self.seconds[phase].append(span)
        self.marks.clear()

    def summary(self, skip: int = WARMUP_STEPS) -> dict[str, Any]:
        """p50 and p95 in ms per phase and of the step (`UPDATE`), the first `skip` steps left out if there are more."""
        kept = {phase: np.asarray(values[skip:] or values) * 1000 for phase, values in self.seconds.items()}
        step = sum(kept[phase] for phase in UPDATE)
        return {
            name: {"p50_ms": round(float(np.percentile(v, 50)), 3), "p95_ms": round(float(np.percentile(v, 95)), 3)}
            for name, v in {"step": step, **kept}.items()
        }

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
