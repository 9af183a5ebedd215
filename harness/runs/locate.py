"""Checks the names in a request and finds the data folders, before any data is read or torch is imported."""

import tempfile
from pathlib import Path

from harness.api.registry import Registry
from harness.api.task import Task
from harness.config.presets import read_preset
from harness.config.request import Request
from harness.config.resolve import change_task, parse_overrides
from harness.data.corpus import Corpus
from harness.data.datasets import find_corpora, find_data, read_spec
from harness.data.splits import check_split
from harness.system.errors import UserError


def locate(request: Request) -> tuple[Registry, Task, Path, list[tuple[Corpus, Path]]]:
    """Check the names in a request and find the data folders. A phantom is written if no data is given.

    Returns:
        The registry, the task, the task's folder, and the corpora with their folders.

    Raises:
        UserError: a name is unknown, data does not exist, or the mode does not fit the corpora.
    """
    registry = Registry(request.plugins)
    task = change_task(registry.task(request.task), request.preset, parse_overrides(request.settings))
    # Names are checked before a phantom is written or data is read.
    registry.plugin("method", request.method)
    registry.plugin("backbone", request.backbone)
    read_preset(request.preset)
    check_split(request.split)
    if request.mode == "generic" and not request.corpora:
        raise UserError("--mode generic needs what to pre-train on: give --corpus NAME or --corpus DIR, also several")
    if request.mode != "generic" and request.corpora:
        raise UserError("--corpus is for --mode generic; in task-specific mode the task's own training cases are used")
    for spec in request.corpora:
        read_spec(registry, spec)
    writable_folder(request.runs)
    # A task that is given as a folder has its data in that folder.
    data = registry.task_folder(request.task) or request.data
    root = find_data(task, data, request.runs)
    return registry, task, root, find_corpora(registry, request.corpora, task, request.data or data, request.runs)


def writable_folder(runs: Path) -> Path:
    """The runs folder, which is created if necessary. Raises UserError if it cannot be written."""
    try:
        runs.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=runs):
            pass
    except OSError as error:
        raise UserError(
            f"the runs folder {runs} cannot be written ({error.strerror}): give another with --runs or HARNESS_RUNS"
        ) from None
    return runs
