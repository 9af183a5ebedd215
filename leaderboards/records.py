"""Finished runs as the leaderboard sees them: the record, and Dice and HD95 per case."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

SCHEMA = 1
NEEDED = (
    *("run_id", "method", "backbone", "task", "task_version", "mode", "protocol", "preset", "overrides"),
    *("label_fraction", "seed", "data", "metrics", "metric_policy", "timing"),
)


class RecordError(Exception):
    """A record that cannot be used; the message names the file and says why."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        targets: in the task's order.
        dice, hd95: (cases, targets); NaN where a case is empty for a target.
        missed: (cases, targets), the reference is there and the prediction is not.
    """

    folder: Path
    record: dict[str, Any]
    cases: tuple[str, ...]
    targets: tuple[str, ...]
    dice: NDArray[np.float64]
    hd95: NDArray[np.float64]
    missed: NDArray[np.bool_]

    @property
    def table(self) -> tuple[Any, ...]:
        """What must be equal for two runs to share a table."""
        record = self.record
        data = record["data"]
        return (
            record["task"] if record["task_version"] == "1" else f"{record['task']}@{record['task_version']}",
            f"{data['source']}:{data['fingerprint'][:8]}",
            _label(record["preset"], self._overrides, ("split", "task", "pretrain", "finetune", "evaluate")),
            record["mode"],
            record["protocol"],
            float(record["label_fraction"]),
            record["metric_policy"],
            self.cases,
        )

    @property
    def num_test_seen(self) -> int:
        """Test cases that were trained or pre-trained on: 0 in an honest run."""
        return int(self.record["data"].get("n_test_seen", 0))

    @property
    def _overrides(self) -> dict[str, str]:
        split = self.record["data"].get("split", "fixed")
        return dict(self.record["overrides"]) | ({"split": split} if split != "fixed" else {})

    @property
    def method(self) -> str:
        """Its name, with corpora and the settings that were changed; files by name and digest, not by path."""
        overrides = dict(self.record["overrides"])
        if corpora := self.record["data"].get("corpora"):
            overrides["method.corpus"] = "+".join(f"{each['name']}@{each['fingerprint']}" for each in corpora)
        for field, digest in self.record.get("files", {}).items():
            overrides[f"method.{field}"] = f"{PurePath(overrides.get(f'method.{field}', field)).name}@{digest[:8]}"
        return _label(self.record["method"], overrides, ("method",))

    @property
    def backbone(self) -> str:
        """Its name, with the settings that were changed from the preset."""
        return _label(self.record["backbone"], self.record["overrides"], ("backbone",))


def load_runs(folders: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """All finished runs directly below `folders`, and one line for each record that cannot be used."""
    runs: dict[str, Run] = {}
    problems = []
    for path in sorted(path for folder in folders for path in folder.glob("*/record.json")):
        try:
            run = load_run(path.parent)
        except RecordError as error:
            problems.append(str(error))
            continue
        other = runs.setdefault(run.record["run_id"], run)
        if other.record != run.record:
            problems.append(f"{path}: run {run.record['run_id']} is also in {other.folder}, with other content")
    return list(runs.values()), problems


def load_run(folder: Path) -> Run:
    """One run folder. Raises RecordError where the record or the cases are missing, foreign or incomplete."""
    path = folder / "record.json"
    try:
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.get("schema") != SCHEMA:
            raise RecordError(f"{path}: not a run record of schema {SCHEMA}")
        lacking = [name for name in NEEDED if name not in record]
        if lacking:
            raise RecordError(f"{path}: lacks {', '.join(lacking)}")
        targets = tuple(name for name in record["metrics"] if name != "average")
        # A case may be called "NA" or "null".
        empty = {"dice": [""], "hd95_mm": [""]}
        text = {"case": str, "target": str, "status": str}
        rows = pd.read_csv(folder / "cases.csv", dtype=text, keep_default_na=False, na_values=empty)
        values = {
            name: rows.pivot(index="case", columns="target", values=name)[list(targets)] for name in ("dice", "hd95_mm")
        }
        status = rows.pivot(index="case", columns="target", values="status")[list(targets)]
        run = Run(
            folder=folder,
            record=record,
            cases=tuple(status.index),
            targets=targets,
            dice=values["dice"].to_numpy(dtype=float),
            hd95=values["hd95_mm"].to_numpy(dtype=float),
            missed=(status == "missed").to_numpy(),
        )
        _ = run.table
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordError(f"{path}: cannot be read as a run ({type(error).__name__}: {error})") from error
    return run


def _label(name: str, overrides: dict[str, str], sections: tuple[str, ...]) -> str:
    changed = [
        f"{key.partition('.')[2] if len(sections) == 1 else key}={value}"
        for key, value in overrides.items()
        if key.partition(".")[0] in sections
    ]
    return f"{name}{{{', '.join(changed)}}}" if changed else name
