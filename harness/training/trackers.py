"""TensorBoard, Weights & Biases and MLflow through Accelerate, beside the history; none of them can stop a run."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.state import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from harness.compute.processes import Processes
from harness.config.request import TRACKERS
from harness.system.console import say
from harness.system.errors import UserError


def check_trackers(names: Sequence[str]) -> None:
    """Raises UserError where a tracker's package is not installed."""
    for name in names:
        if find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"--tracker {name} needs the package {TRACKERS[name]}: pip install 'ssl-seg-harness[{name}]'"
            )


@contextmanager
def tracked(
    names: Sequence[str], run_id: str, config: Mapping[str, Any], runs: Path, processes: Processes
) -> Iterator[Callable[[Mapping[str, float], int], None] | None]:
    """What takes the values of every step, while the run goes on; None where no tracker is asked for."""
    if not names or not processes.main:
        yield None
        return
    each = [_Guarded(name, run_id, runs / "trackers", config) for name in names]

    def log(values: Mapping[str, float], step: int) -> None:
        for tracker in each:
            tracker.log(values, step)

    try:
        yield log
    finally:
        for tracker in each:
            tracker.finish()


class _Guarded:
    """One tracker; the first thing that goes wrong with it is said, and it is left alone from then on."""

    def __init__(self, name: str, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.name = name
        self.found: Any = None
        self._attempt(lambda: self._start(run_id, folder, config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.found is not None:
            self._attempt(lambda: self.found.log(dict(values), step=step))

    def finish(self) -> None:
        if self.found is not None:
            self._attempt(self.found.finish)

    def _start(self, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        PartialState()
        folder.mkdir(parents=True, exist_ok=True)
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "tensorboard":
            self.found = kind(run_id, logging_dir=folder)
        elif self.name == "wandb":
            self.found = kind("ssl-seg-harness", name=run_id, dir=str(folder))
        else:
            # Beside the runs, where nobody named a server.
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}")
            self.found = kind("ssl-seg-harness", logging_dir=str(folder.resolve() / "mlflow"), run_name=run_id)
        if hasattr(self.found, "start"):
            self.found.start()
        self.found.store_init_configuration(_flat(config))

    def _attempt(self, do: Callable[[], Any]) -> None:
        try:
            do()
        # Whatever a service or its package comes up with: the run is worth more.
        except Exception as error:
            say(
                f"tracker {self.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; going on without it"
            )
            self.found = None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted names; what is neither number nor text as text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
