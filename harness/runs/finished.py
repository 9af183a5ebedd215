"""Finds the finished run that answered the same request before. It does not import torch, so the answer comes at once."""

import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harness.api.registry import Registry
from harness.config.request import Request
from harness.data.corpus import parse_spec
from harness.runs.locate import locate
from harness.system.errors import UserError
from harness.system.files import (
    ENGINE,
    LINEAGE,
    check_name,
    digest,
    digest_file,
    digest_tree,
    expand,
    is_folder,
    read_json,
)


@dataclass(frozen=True)
class FinishedRun:
    """A finished run.

    Attributes:
        again: whether the run was finished before this request, so that nothing was computed.
    """

    folder: Path
    record: dict[str, Any]
    again: bool

    @property
    def metrics(self) -> dict[str, Any]:
        """Means over the test cases, per target and their average ("average"): Dice, HD95 in mm, surface Dice."""
        metrics: dict[str, Any] = self.record["metrics"]
        return metrics


def finished_before(request: Request) -> FinishedRun | None:
    """The finished run that answered the same request before; None if there is none, or something it depends on has changed.

    Raises:
        UserError: as `harness.runs.locate.locate`.
    """
    registry, _, root, corpora = locate(request)
    key = digest_request(request, registry, [root, *(folder for _, folder in corpora)])
    folder = finished_folder(request.runs, key, request.save_predictions)
    return None if folder is None else FinishedRun(folder, read_finished(folder), again=True)


def digest_request(request: Request, registry: Registry, roots: Sequence[Path]) -> str:
    """Digest of a request and of everything that its result depends on: the engine, the plugins, and the data in `roots`.

    Files are identified by name, size and time. Only files that settings name are read.
    """
    # Fields that the result does not depend on are set to None.
    fields = asdict(request) | {
        "runs": None,
        "data": [str(root.resolve()) for root in roots],
        "save_predictions": None,
        "execution": None,
    }
    paths = [Path(pair.partition("=")[2]) for pair in request.settings]
    paths.append(expand(request.split.partition("@")[2]))
    # `Path.is_file` raises for text that is too long for a name.
    fields["files"] = [digest_file(path) for path in paths if os.path.isfile(path)]  # noqa: PTH113
    if fields["files"]:  # weights, of whose past more may be known by now
        lineages = [path.with_suffix(LINEAGE) for path in paths if os.path.isfile(path)]  # noqa: PTH113
        fields["lineages"] = [digest_file(path) for path in lineages if path.is_file()]
        fields["known"] = digest_tree(request.runs / "cache" / "lineage")
    for pair in request.settings:
        if pair.startswith("method.corpus="):
            fields["stated"] = _digest_statement(pair.partition("=")[2], request, registry)
    sources = [digest_tree(ENGINE), registry.digest_sources(), [digest_tree(root) for root in roots]]
    return digest([fields, *sources, platform.node()])


def _digest_statement(spec: str, request: Request, registry: Registry) -> str:
    """Digest of the scans that a value of `method.corpus` names: a folder's, or a corpus' where it is found."""
    name, _ = parse_spec(spec)
    folder = expand(name)
    if not is_folder(folder) and name in registry.names("corpus") and request.data is not None:
        try:
            folder = registry.load("corpus", name).find(request.data)
        except UserError:
            return "not at hand"
    return digest_tree(folder) if is_folder(folder) else "no scans"


def finished_folder(runs: Path, key: str, predictions: bool) -> Path | None:
    """The folder of the run that answered the request with digest `key`; None if there is none.

    Args:
        predictions: whether the folder must hold predictions.
    """
    try:
        folder = runs / check_name((runs / "cache" / "requests" / key).read_text())
    except (OSError, ValueError, UserError):
        return None
    if predictions and not (folder / "predictions").is_dir():
        return None
    return folder if (folder / "record.json").exists() else None


def read_finished(folder: Path) -> dict[str, Any]:
    """The record of a finished run. Raises UserError if it is damaged."""
    record = read_json(folder / "record.json")
    if not isinstance(record, dict):
        raise UserError(f"{folder / 'record.json'} is damaged: remove the folder {folder} and ask again")
    return record
