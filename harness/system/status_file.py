"""The status file: how a command ended, as JSON, for the process that started the command and asked for the file.

A sweep reads it instead of searching the log.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from harness.system.console import is_first_process
from harness.system.files import read_json, write_atomic

VARIABLE = "HARNESS_STATUS_FILE"
"""Name of the environment variable that holds the path of the status file."""


@dataclass(frozen=True)
class Ending:
    """How a command ended: its exit status and its last message."""

    status: int
    message: str


def write_ending(status: int, message: str) -> None:
    """Write the status file if one is asked for. Of several processes of a run, only the first one writes it."""
    path = os.environ.get(VARIABLE)
    if path and is_first_process():
        write_atomic(Path(path), json.dumps(asdict(Ending(status, message))))


def read_ending(path: Path) -> Ending | None:
    """How the command ended; None if it wrote no valid status file, because it still runs or was killed."""
    ending = read_json(path)
    try:
        return Ending(int(ending["status"]), str(ending["message"]))
    except (TypeError, KeyError, ValueError):
        return None
