"""Seconds per phase of a training step."""

import time
from itertools import pairwise
from typing import Any

import numpy as np
import torch

PHASES = ("data", "transfer", "forward", "backward", "optimizer")
UPDATE = PHASES[2:]
"""The phases that papers count as a step: forward, backward and update, without reading, preprocessing or copying data."""

WARMUP_STEPS = 5  # left out of the step times, because allocators, caches and autotuning slow the first steps


class StepClock:
    """Seconds per phase of each step.

    Times come from the host clock on a CPU. On a GPU they come from CUDA events, because recording one does not make the
    step wait for the device.

    Attributes:
        marks: per step since the last `read`, pairs (name of a phase, moment of its end).
        seconds: per phase, one value per step.
    """

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.marks: list[list[Any]] = []
        self.seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    def start(self) -> None:
        """Mark the beginning of a step."""
        self.marks.append([("", self._mark())])

    def lap(self, phase: str) -> None:
        """Mark the end of a phase. A phase may occur several times in a step; its seconds are added up."""
        self.marks[-1].append((phase, self._mark()))

    def read(self) -> None:
        """Turn all marks into seconds. On a GPU this waits for the device."""
        if self.cuda:
            torch.cuda.synchronize()
        for marks in self.marks:
            spans = dict.fromkeys(PHASES, 0.0)
            for (_, begin), (phase, end) in pairwise(marks):
                spans[phase] += begin.elapsed_time(end) / 1000 if self.cuda else end - begin
            for phase, span in spans.items():
                self.seconds[phase].append(span)
        self.marks.clear()

    def summary(self, skip: int = WARMUP_STEPS) -> dict[str, Any]:
        """p50 and p95 in ms, of each phase and of the whole step (the phases in `UPDATE`).

        The first `skip` steps are left out if there are more steps than that.
        """
        milliseconds = {phase: np.asarray(values[skip:] or values) * 1000 for phase, values in self.seconds.items()}
        step = sum(milliseconds[phase] for phase in UPDATE)
        return {
            name: {"p50_ms": round(float(np.percentile(v, 50)), 3), "p95_ms": round(float(np.percentile(v, 95)), 3)}
            for name, v in {"step": step, **milliseconds}.items()
        }

    def _mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
