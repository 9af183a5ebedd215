"""TensorBoard, Weights & Biases and MLflow, through Accelerate.

They get the same values as the history of a stage. An error in a tracker never stops a run.
"""

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
    """Raises UserError if a tracker's package is not installed."""
    for name in names:
        if find_spec(TRACKERS[name]) is None:
            raise UserError(
                f"--tracker {name} needs the package {TRACKERS[name]}: pip install 'ssl-seg-harness[{name}]'"
            )


@contextmanager
def tracked(
    names: Sequence[str], run_id: str, config: Mapping[str, Any], runs: Path, processes: Processes
) -> Iterator[Callable[[Mapping[str, float], int], None] | None]:
    """A function that logs the named values of a step, for the duration of a run; None if no tracker is named."""
    if not names or not processes.main:
        yield None
        return
    trackers = [_Guarded(name, run_id, runs / "trackers", config) for name in names]

    def log(values: Mapping[str, float], step: int) -> None:
        """Pass the values of a step to every tracker."""
        for tracker in trackers:
            tracker.log(values, step)

    try:
        yield log
    finally:
        for tracker in trackers:
            tracker.finish()


class _Guarded:
    """One tracker. Its first error is reported to the user; after that it is not called again."""

    def __init__(self, name: str, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        self.name = name
        self._tracker: Any = None
        self._attempt(lambda: self._start(run_id, folder, config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Log the named values of a step."""
        if self._tracker is None:
            return
        if self.name != "wandb":
            self._attempt(lambda: self._tracker.log(dict(values), step=step))
            return
        # W&B drops values of a step below the last one, and each stage counts from 1: steps are values there.
        steps = {f"{name.partition('/')[0]}/step": step for name in values}
        self._attempt(lambda: self._tracker.log({**values, **steps}, step=None))

    def finish(self) -> None:
        """Close the tracker."""
        if self._tracker is not None:
            self._attempt(self._tracker.finish)

    def _start(self, run_id: str, folder: Path, config: Mapping[str, Any]) -> None:
        """Open the tracker, and log the settings of the run."""
        PartialState()
        folder.mkdir(parents=True, exist_ok=True)
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        if self.name == "tensorboard":
            self._tracker = kind(run_id, logging_dir=folder)
        elif self.name == "wandb":
            self._tracker = kind("ssl-seg-harness", name=run_id, dir=str(folder))
        else:
            # A database beside the runs, if the user has named no server.
            os.environ.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{folder.resolve() / 'mlflow.db'}")
            self._tracker = kind("ssl-seg-harness", logging_dir=str(folder.resolve() / "mlflow"), run_name=run_id)
        if hasattr(self._tracker, "start"):
            self._tracker.start()
        if self.name == "wandb":
            for stage in ("pretrain", "finetune"):
                self._tracker.run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._tracker.store_init_configuration(_flat(config))

    def _attempt(self, do: Callable[[], Any]) -> None:
        """Call `do`. After an error of any kind, report it and drop the tracker."""
        try:
            do()
        # A service or its package may raise any error, and the run must go on.
        except Exception as error:
            say(
                f"tracker {self.name}: {type(error).__name__}: {' '.join(str(error).split())[:300]}; going on without it"
            )
            self._tracker = None


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level with dotted names; values that are neither numbers nor text become text."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value if isinstance(value, int | float | str | bool) else str(value)
    return flat
