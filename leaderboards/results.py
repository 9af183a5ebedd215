"""Results for Python and notebooks: runs as pandas frames, every table and figure by one call.

import leaderboards as lb

results = lb.load("runs")
results.rows()                      # the leaderboard: one row per method and target
results.only(task="msd_*").cases()  # Dice and HD95 of every case
results.figures("figures")
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from harness.system.errors import UserError, unknown
from leaderboards import board, compare, curves, figures, table, website
from leaderboards.board import Table
from leaderboards.compare import Comparison
from leaderboards.curves import Curves
from leaderboards.records import STATUS, RecordError, Run, load_run, load_runs
from leaderboards.text import counted

FIELDS = ("method", "backbone", "task", "preset", "mode", "protocol", "label_fraction", "seed")
"""The fields of a record by which runs are chosen."""


def load(*folders: str | Path) -> "Results":
    """The finished runs of folders of runs, of published sites, or of single run folders.

    Raises:
        UserError: a folder does not exist, or none has a finished run. Records that cannot be used are in `Results.problems`.
    """
    paths = [Path(folder).expanduser() for folder in folders or ("runs",)]
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path} is not a folder: give the folder that holds the runs")
    paths = [path / "runs" if website.is_site(path) else path for path in paths]
    single = [path for path in paths if (path / "record.json").exists()]
    runs, problems = load_runs(path for path in paths if path not in single)
    for path in single:
        try:
            runs.append(load_run(path))
        except RecordError as error:
            problems.append(str(error))
    if not runs and not problems:
        raise UserError(f"no finished run in {', '.join(map(str, paths))}: `harness run` makes one")
    return Results(tuple(runs), tuple(problems))


def select(runs: Sequence[Run], field: str, patterns: Iterable[Any]) -> list[Run]:
    """The runs whose field fits one of the patterns, in which `*` stands for any text.

    Scratch stays where methods are chosen, since rows are compared with it.

    Raises:
        UserError: an unknown field, or a choice that leaves no run.
    """
    if field not in FIELDS:
        raise unknown("field of runs", field, FIELDS)
    texts = [_text(pattern) for pattern in patterns]
    fits = [any(fnmatchcase(_text(run.record[field]), text) for text in texts) for run in runs]
    if runs and not any(fits):
        present = sorted({_text(run.record[field]) for run in runs})
        raise UserError(f"{field}={','.join(texts)} leaves no run: {field} is one of {', '.join(present[:12])}")
    is_control = [field == "method" and run.control == "matched" for run in runs]
    return [run for run, fit, control in zip(runs, fits, is_control, strict=True) if fit or control]


@dataclass(frozen=True, repr=False)
class Results:
    """Finished runs. `problems`: one line for each record that could not be used."""

    runs: tuple[Run, ...]
    problems: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"<{counted(len(self.runs), 'run')} in {counted(len(self.tables), 'table')}>"

    def __str__(self) -> str:
        return table.render(self.tables)

    def _repr_html_(self) -> str:
        """The averages over targets, for notebooks."""
        rows = self.rows()
        columns = ["task", "preset", "method", "backbone", "n_seeds", "dice", "dice_ci_low", "dice_ci_high"]
        columns += ["delta_dice_vs_scratch", "delta_ci_low", "delta_ci_high", "p_value_holm", "hd95_mm", "note"]
        html: str = rows[rows["target"] == "average"][columns].to_html(index=False, float_format="%.4f", na_rep="")
        return html

    @cached_property
    def tables(self) -> list[Table]:
        """The tables of rows that may be compared."""
        return board.gather(self.runs)

    def only(self, **fields: Any) -> "Results":
        """The runs that fit: `only(method=["voco", "hybridmim"], task="msd_*")`. Raises UserError as `select`."""
        runs = list(self.runs)
        for field, patterns in fields.items():
            runs = select(runs, field, [patterns] if isinstance(patterns, str | int | float) else patterns)
        return Results(tuple(runs), self.problems)

    def rows(self) -> pd.DataFrame:
        """The leaderboard, in the columns of its CSV (docs/leaderboards.md)."""
        return table.build(self.tables)

    def cases(self) -> pd.DataFrame:
        """One row per run, case and target: Dice, HD95 in mm, surface Dice, status. NaN where a case has no value."""
        frames = []
        for run in self.runs:
            number = len(run.targets)
            frame = pd.DataFrame(
                {name: run.record[name] for name in ("task", "method", "backbone", "seed", "run_id")}, [0]
            )
            frame = pd.concat([frame] * (len(run.cases) * number), ignore_index=True)
            frame["case"] = np.repeat(run.cases, number)
            frame["target"] = list(run.targets) * len(run.cases)
            frame["status"] = [STATUS[index] for index in run.status.ravel()]
            frame["dice"], frame["hd95_mm"] = run.dice.ravel(), run.hd95.ravel()
            frame["surface_dice"] = run.surface_dice.ravel()
            frames.append(frame)
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def costs(self) -> pd.DataFrame:
        """One row per run: seconds of each stage, step time in ms, peak memory in GiB, parameters, device."""
        rows = []
        for run in self.runs:
            record, timing = run.record, run.record["timing"]
            memory, used = record.get("memory") or {}, record.get("computed_with") or {}
            rows.append(
                {name: record[name] for name in ("task", "method", "backbone", "preset", "seed", "run_id")}
                | {f"{stage}_seconds": value for stage, value in timing["seconds"].items()}
                | {
                    "pretrain_step_ms": ((timing.get("pretrain_step") or {}).get("step") or {}).get("p50_ms"),
                    "finetune_step_ms": ((timing.get("finetune_step") or {}).get("step") or {}).get("p50_ms"),
                    "gpu_hours": run.gpu_hours,
                    "kwh": run.kwh,
                    "host_peak_gib": (memory.get("run") or {}).get("host_peak_gib"),
                    "device_peak_gib": (memory.get("run") or {}).get("device_peak_gib"),
                    "parameters": record.get("parameters"),
                    "device": (used.get("finetune") or {}).get("device"),
                }
            )
        return pd.DataFrame(rows)

    def compare(self, first: str, second: str) -> list[Comparison]:
        """Two methods, as `rows` names them, in every table that has both, see `leaderboards.compare.compare_methods`.

        Raises:
            UserError: a name that no row or more than one has.
            leaderboards.board.NotComparableError: they share no table; the message says which fields differ.
        """
        return compare.compare_methods(self.tables, first, second)

    def curves(self, over: str = "label_fraction") -> list[Curves]:
        """Dice over labels or steps, for methods with two points or more. Raises UserError for an axis that is none."""
        if over not in curves.AXES:
            raise unknown("axis", over, curves.AXES)
        return curves.find(self.tables, over)

    def figures(self, folder: str | Path) -> dict[Path, str]:
        """Draw all figures of every table. Returns the PNG files (an SVG lies beside each) with a description."""
        drawn = {}
        for number, each in enumerate(self.tables, 1):
            subfolder = Path(folder) / str(number)
            for name, text in figures.table_figures(each, subfolder).items():
                drawn[subfolder / f"{name}.png"] = text
        return drawn

    def publish(
        self, folder: str | Path, title: str = "Leaderboard", note: Path | None = None, pictures: bool = True
    ) -> int:
        """Write the site, as `harness leaderboard publish`. Returns the number of pages.

        Raises:
            leaderboards.website.PublishError: the folder holds something else, or the note is no text.
        """
        return website.publish(self.runs, Path(folder), title=title, note=note, pictures=pictures)


def _text(value: Any) -> str:
    """A value as a user writes it."""
    return f"{value:g}" if isinstance(value, float) else str(value)
