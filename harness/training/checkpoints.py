"""States of a training stage, from which it goes on: atomic, with a digest, the last two kept."""

import io
import time
from pathlib import Path
from typing import Any

import torch

from harness.system.console import say
from harness.system.files import digest_chunks, write_atomic

HEAD = b"harness checkpoint 1 "
KEPT = 2


class Checkpoints:
    """The states of one stage in one folder.

    A checkpoint is a line with the digest of what follows, and torch's own format, read without unpickling. What the
    stage draws at random is a function of the seed and the step, so a state holds no generators.
    """

    def __init__(self, folder: Path, minutes: float) -> None:
        self.folder, self.seconds, self.last = folder, 60 * minutes, time.monotonic()

    def due(self) -> bool:
        """Whether the interval since the last one is over."""
        return time.monotonic() - self.last >= self.seconds

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Write the state after `step`, and drop all but the last two. Raises OSError where the disk cannot hold it."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        content = buffer.getbuffer()
        head = HEAD + digest_chunks([content]).encode() + b"\n"
        write_atomic(self.folder / f"step-{step:09d}.ckpt", head, content)
        for path in self.all()[KEPT:]:
            path.unlink(missing_ok=True)
        self.last = time.monotonic()

    def all(self) -> list[Path]:
        """The newest first."""
        return sorted(self.folder.glob("step-*.ckpt"), reverse=True)

    def candidates(self) -> list[dict[str, Any]]:
        """States that are whole, the newest first; what is damaged is said."""
        found = []
        for path in self.all():
            state = read(path)
            if state is None:
                say(f"{path} is damaged: it is left out")
            else:
                found.append(state)
        return found

    def clear(self) -> None:
        """Remove all of them."""
        for path in self.all():
            path.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any] | None:
    """The state in a file; None where its digest or its form is not right. Nothing in it is executed."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    head, _, body = content.partition(b"\n")
    if head != HEAD + digest_chunks([body]).encode():
        return None
    state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    return state if isinstance(state, dict) else None
