"""Checkpoints of a training stage: written atomically, with a digest; the last two are kept."""

import io
import time
from pathlib import Path
from typing import Any

import torch

from harness.system.console import say
from harness.system.files import digest_chunks, write_atomic

HEAD = b"harness checkpoint 1 "  # first bytes of a checkpoint; the digest follows
NUM_KEPT = 2  # checkpoints of a stage that stay on disk


class Checkpoints:
    """The checkpoints of one stage in one folder.

    A file holds a line with the digest of the rest, and then the state in torch's own format, which is read without
    unpickling. All random draws of a stage are functions of the seed and the step, so a state holds no generators.

    Args:
        minutes: between two checkpoints.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.seconds, self.last = folder, 60 * minutes, time.monotonic()

    def due(self) -> bool:
        """Whether `minutes` have passed since the last checkpoint."""
        return time.monotonic() - self.last >= self.seconds

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step`, and remove all but the last two. Raises OSError if the disk cannot hold it."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        head = HEAD + digest_chunks([content]).encode() + b"\n"
        write_atomic(self.folder / f"step-{step:09d}.ckpt", head, content)
        for path in self.all()[NUM_KEPT:]:
            path.unlink(missing_ok=True)
        self.last = time.monotonic()

    def all(self) -> list[Path]:
        """Paths of the checkpoints, newest first."""
        return sorted(self.folder.glob("step-*.ckpt"), reverse=True)

    def candidates(self) -> list[dict[str, Any]]:
        """The states of all undamaged checkpoints, newest first. Damaged files are reported to the user."""
        states = []
        for path in self.all():
            state = read(path)
            if state is None:
                say(f"{path} is damaged: it is left out")
            else:
                states.append(state)
        return states

    def clear(self) -> None:
        """Remove all checkpoints of the stage."""
        for path in self.all():
            path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """The state in a file; None if it cannot be read, or its digest or type is wrong. No code in the file is executed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, _, body = content.partition(b"\n")
    if head != HEAD + digest_chunks([body]).encode():
        return None
    state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return state if isinstance(state, dict) else None
