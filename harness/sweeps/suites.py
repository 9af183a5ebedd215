"""A suite: what every method has to run for a verdict over several tasks, and which records answer it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness.config.request import PHANTOM, Request, recorded_fields
from harness.config.resolve import parse_overrides, shots_of
from harness.config.suites import suite_file
from harness.sweeps.cells import SweepCell, read
from harness.system.errors import UserError

CONTROL = "scratch"
OF_THE_METHOD = ("method.", "pretrain.")
"""Sections of the settings that a method may choose for itself; all others are the suite's."""
COMPARED = ("backbone", "task", "preset", "protocol", "transfer", "split", "seed", "label_seed", "tune")
"""Fields of a request that a record must share with the suite."""


@dataclass(frozen=True)
class Suite:
    """A suite. `requests`: what every method has to run, with `CONTROL` as the method."""

    name: str
    requests: tuple[Request, ...]

    @property
    def on_real_data(self) -> bool:
        """Whether some data is not a phantom."""
        return any(request.data is not None for request in self.requests)

    def cells(self, methods: Sequence[str], settings: Sequence[str] = ()) -> list[SweepCell]:
        """The runs of the control and, with their `settings`, of the methods."""
        own = {CONTROL: ()} | {method: tuple(settings) for method in methods if method != CONTROL}
        return [
            SweepCell(replace(request, method=method, settings=(*request.settings, *added)))
            for method, added in own.items()
            for request in self.requests
        ]

    def request_of(self, record: Mapping[str, Any]) -> Request | None:
        """The request of the suite that a record answers; None if it belongs to another comparison."""
        return next((request for request in self.requests if _answers(record, request)), None)


def read_suite(name: str, base: Request) -> Suite:
    """Read a suite by its name or from a file.

    Args:
        base: gives runs folder, plugins, and data; without data, a placeholder stands for it.

    Raises:
        UserError: there is no such suite, or it names methods.
    """
    path = suite_file(name)
    base = replace(base, method=CONTROL, data=base.data or Path())
    requests = tuple(cell.request for cell in read(path, base))
    if any(request.method != CONTROL for request in requests):
        raise UserError(f"{path} names methods: a suite says on what methods are compared; take them out, use --method")
    return Suite(path.stem, requests)


def _answers(record: Mapping[str, Any], request: Request) -> bool:
    """Whether a run did what a request of a suite says, whatever its method and pre-training."""
    recorded = recorded_fields(record)
    fields = {name: recorded.get(name, Request.__dataclass_fields__[name].default) for name in COMPARED}
    data, all_labels = record["data"], recorded.get("label_fraction") == 1
    shots = shots_of(request)
    return (
        all(fields[name] == getattr(request, name) for name in COMPARED if name != "label_seed")
        # Where all cases are labelled, none are drawn.
        and fields["label_seed"] == (None if all_labels else request.label_seed)
        and (data.get("n_train") == shots if shots else recorded.get("label_fraction") == request.label_fraction)
        # A run without pre-training serves every mode.
        and (recorded.get("mode") == request.mode or record["timing"]["pretrain_step"] is None)
        and (data["source"] == PHANTOM) == (request.data is None)
        and _own_settings(record["overrides"]) == _own_settings(parse_overrides(request.settings))
    )


def _own_settings(overrides: Mapping[str, Any]) -> dict[str, str]:
    """The changed settings that are not the method's own. The number of workers changes no result, and no record has it."""
    return {
        key: str(value)
        for key, value in overrides.items()
        if not key.startswith(OF_THE_METHOD) and not key.endswith(".workers")
    }
