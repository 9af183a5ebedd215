"""Was this asked before? Answered without torch."""

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.api.registry import Registry
from harness.config.request import Request
from harness.runs.locate import locate
from harness.system.errors import UserError
from harness.system.files import ENGINE, check_name, digest, digest_file, digest_tree, read_json


@dataclass(frozen=True)
class FinishedRun:
    """A finished run; `again` says that it was there already."""

    folder: Path
    record: dict[str, Any]
    again: bool


def finished_before(request: Request) -> FinishedRun | None:
    """The run that answered the same request before, if there is one and nothing that it depends on has changed.

    Raises:
        UserError: as `harness.runs.locate.locate`.
    """
    registry, _, root, corpora = locate(request)
    asked = digest_request(request, registry, [root, *(folder for _, folder in corpora)])
    folder = finished_run(request.runs, asked, request.save_predictions)
    return None if folder is None else FinishedRun(folder, read_record(folder), again=True)


def digest_request(request: Request, registry: Registry, roots: Sequence[Path]) -> str:
    """Recognises a request that was answered before without importing torch: names, sources and data unchanged."""
    asked = asdict(request) | {
        "runs": None,
        "data": [str(root.resolve()) for root in roots],
        "save_predictions": None,
        "how": None,
    }
    paths = [Path(pair.partition("=")[2]) for pair in request.settings]
    asked["files"] = [digest_file(path) for path in paths if path.is_file()]
    engine = digest_tree(ENGINE)
    plugins = registry.digest_sources()
    return digest([asked, engine, plugins, [digest_tree(root) for root in roots], platform.node()])


def finished_run(runs: Path, asked: str, predictions: bool) -> Path | None:
    """The folder of the run that answered the same request before."""
    known = runs / "cache" / "requests" / asked
    try:
        folder = runs / check_name(known.read_text())
    except (OSError, ValueError, UserError):
        return None
    if predictions and not (folder / "predictions").is_dir():
        return None
    return folder if (folder / "record.json").exists() else None


def read_record(folder: Path) -> dict[str, Any]:
    record = read_json(folder / "record.json")
    if not isinstance(record, dict):
        raise UserError(f"{folder / 'record.json'} is damaged: remove the folder {folder} and ask again")
    return record
