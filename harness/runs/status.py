"""Which run is meant, and how far an unfinished one is."""

import json
import os
from pathlib import Path

from harness.system.errors import UserError, unknown
from harness.system.files import find_below


def find_run(name: str, runs: Path) -> Path:
    """The folder of a finished run: by path, by id, or by the beginning of one id."""
    if (Path(name) / "record.json").exists():
        return Path(name)
    known = sorted(path.parent for path in runs.glob("*/record.json"))
    found = [folder for folder in known if folder.name.startswith(name)]
    if not found:
        raise unknown(f"run in {runs}", name, [folder.name for folder in known])
    if len(found) > 1:
        raise UserError(f"{name!r} begins {len(found)} run ids: {', '.join(folder.name for folder in found)}")
    return found[0]


def where(folder: Path) -> tuple[str, int]:
    """The stage of a run or pre-training and its last step; once it is fine-tuned, `evaluate` and the cases scored."""
    if (folder / "finetune.json").exists():
        return "evaluate", len(find_below(folder / "evaluation", "*.npz"))
    try:
        with (folder / "history.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 4096))
            whole = file.read().rpartition(b"\n")[0]
        last = json.loads(whole.rpartition(b"\n")[2])
        return str(last["stage"]), int(last["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return "", 0
