"""A run from Python or a notebook: `harness.run`."""

import os
from collections.abc import Mapping
from typing import Any

from harness.config.request import Execution, Option, Request, options
from harness.runs.execute import run as execute
from harness.runs.finished import FinishedRun
from harness.system.errors import UserError, unknown

SEVERAL = ("corpora", "settings", "plugins", "trackers")
"""Arguments that hold several texts."""
WORDS = {int: "a whole number", float: "a number", str: "a text"}


def run(method: str, task: str, **arguments: Any) -> FinishedRun:
    """Pre-train, fine-tune, evaluate and record, as `harness run`. A finished run is returned at once.

        result = harness.run("hybridmim", "msd_hippocampus", data="data", seed=1, settings={"pretrain.steps": 500})
        result.metrics["average"]["dice"]

    Args:
        arguments: the options of `harness run`, with underscores: backbone, preset, data (a folder or "phantom"), runs, seed,
            label_fraction, shots, settings (a mapping, or KEY=VALUE texts), corpora, plugins, and so on. As on the command line,
            HARNESS_DATA and HARNESS_RUNS are the defaults of data and runs.

    Raises:
        UserError: any problem that the caller can mend: an argument that is none, a value that is not allowed, missing data.
            What was computed is kept.
    """
    of_request = dict(options(Request))
    of_execution = {name: option for name, option in options(Execution) if name != "until"}  # which makes no run
    given = {"method": method, "task": task, **arguments}
    for name in given:
        if name not in of_request and name not in of_execution:
            raise unknown("argument of harness.run", name, [*of_request, *of_execution])
    for name, option in of_request.items():
        if name not in given and os.environ.get(option.environment or ""):
            given[name] = os.environ[option.environment]
    values = {name: _value(name, (of_request | of_execution)[name], value) for name, value in given.items()}
    execution = Execution(**{name: value for name, value in values.items() if name in of_execution})
    return execute(
        Request(**{name: value for name, value in values.items() if name in of_request}, execution=execution)
    )


def _value(name: str, option: Option, value: Any) -> Any:
    """An argument as the request holds it. Raises UserError for a value of another type."""
    if name in SEVERAL:
        items = [f"{key}={_text(item)}" for key, item in value.items()] if isinstance(value, Mapping) else value
        items = [items] if isinstance(items, str | os.PathLike) else items
        return tuple(os.fspath(item) if isinstance(item, os.PathLike) else str(item) for item in items)
    if isinstance(value, str | os.PathLike):
        try:
            return option.parse(os.fspath(value))
        except ValueError as error:
            raise UserError(f"{name}={value!r}: {error}") from None
    fits = option.axis is None or isinstance(value, (int, float) if option.axis is float else option.axis)
    if not fits or (isinstance(value, bool) and option.axis is not None):
        raise UserError(f"{name}={value!r} is not {WORDS[option.axis or str]}: give one")
    return value


def _text(value: Any) -> str:
    """The value of a setting as on the command line."""
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
