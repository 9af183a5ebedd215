"""How a command ended, in a file that whoever started it asked for: a sweep reads it instead of words in a log."""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.system.files import read_json, write_atomic

VARIABLE = "HARNESS_STATUS_FILE"
"""Environment variable that names the file."""


@dataclass(frozen=True)
class Ending:
    """Exit status of a command, and what it said at its end."""

    status: int
    message: str


def write_ending(status: int, message: str) -> None:
    """Write the file, where one is asked for; of several processes of a run the first one writes it."""
    path = os.environ.get(VARIABLE)
    if path and int(os.environ.get("RANK") or 0) == 0:
        write_atomic(Path(path), json.dumps(asdict(Ending(status, message))))


def read_ending(path: Path) -> Ending | None:
    """How the command ended; None where it wrote nothing, because it runs or was killed."""
    ending = read_json(path)
    try:
        return Ending(int(ending["status"]), str(ending["message"]))
    except (TypeError, KeyError, ValueError):
        return None
