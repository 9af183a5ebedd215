"""Finds a run by its name, and the stage and step of an unfinished one."""

import json
import os
from pathlib import Path

from harness.system.errors import UserError, unknown
from harness.system.files import find_below


def find_run(name: str, runs: Path) -> Path:
    """The folder of a finished run, by path, by id, or by the beginning of its id.

    Raises:
        UserError: no run, or more than one, has this name.
    """
    if (Path(name) / "record.json").exists():
        return Path(name)
    folders = sorted(path.parent for path in runs.glob("*/record.json"))
    matches = [folder for folder in folders if folder.name.startswith(name)]
    matches = [folder for folder in matches if folder.name == name] or matches
    if not matches:
        raise unknown(f"run in {runs}", name, [folder.name for folder in folders])
    if len(matches) > 1:
        raise UserError(f"{name!r} begins {len(matches)} run ids: {', '.join(folder.name for folder in matches)}")
    return matches[0]


def stage_and_step(folder: Path) -> tuple[str, int]:
    """The stage of a run or pre-training and its last step. After fine-tuning: `evaluate` and the number of scored cases."""
    if (folder / "finetune.json").exists():
        return "evaluate", len(find_below(folder / "evaluation", "*.npz"))
    # While settings are tuned, the newest trial says where the run is.
    histories = [folder / "history.jsonl", *folder.glob("trials/*/history.jsonl")]
    newest = max(
        (path for path in histories if path.exists()), key=lambda path: path.stat().st_mtime, default=histories[0]
    )
    try:
        with newest.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole_lines = file.read().rpartition(b"\n")[0]
        last = json.loads(whole_lines.rpartition(b"\n")[2])
        return str(last["stage"]), int(last["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0
