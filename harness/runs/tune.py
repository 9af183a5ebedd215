"""Tunes fine-tuning: each setting of a grid is tried, and the best one on the validation cases is kept. No test case is used."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from harness.compute.processes import Processes
from harness.runs.plan import RunPlan
from harness.system.console import say

TRIALS = "trials"
"""Folder of the trials in the folder of a run, until the run is finished."""


@dataclass(frozen=True)
class Tuning:
    """What tuning found.

    Attributes:
        run_plan: the run with the chosen setting.
        record: grid, trials and choice, for the record of the run.
        seconds: that the fine-tuning of the other trials took.
        joules: energy of the same; None where it is not known for all of them.
    """

    run_plan: RunPlan
    record: dict[str, Any]
    seconds: float
    joules: float | None


def tune(
    run_plan: RunPlan, folder: Path, processes: Processes, try_setting: Callable[[RunPlan, Path], dict[str, Any]]
) -> Tuning:
    """Try each setting of the grid, and put the fine-tuning with the chosen one into the folder of the run.

    The highest mean Dice on the validation cases after the last step wins; of equal ones the first in the grid. A trial that is
    finished is not computed again.

    Args:
        try_setting: fine-tunes a run in a folder. Returns its validation curve (step, Dice), its seconds and its joules.
    """
    results: list[dict[str, Any]] = []
    energies: list[float | None] = []
    for number, trial in enumerate(run_plan.trials, 1):
        say(f"trial {number} of {len(run_plan.trials)}: {_words(trial.settings)}")
        result = try_setting(replace(run_plan, config=trial.config, trials=[]), folder / TRIALS / str(number))
        say(f"trial {number} of {len(run_plan.trials)}: validation Dice {result['curve'][-1][1]:.4f}")
        energies.append(result.pop("joules"))
        results.append({"settings": trial.settings, "dice": result["curve"][-1][1], **result})
    chosen = int(np.argmax([result["dice"] for result in results]))
    say(f"chosen on the validation cases: {_words(run_plan.trials[chosen].settings)}")
    processes.decide(lambda: _take_over(folder / TRIALS / str(chosen + 1), folder))
    record = {"grid": run_plan.config.tune, "trials": results, "chosen": chosen}
    seconds = sum(result["seconds"] for index, result in enumerate(results) if index != chosen)
    others = [joules for index, joules in enumerate(energies) if index != chosen]
    joules = None if None in others else sum(filter(None, others))
    return Tuning(replace(run_plan, config=run_plan.trials[chosen].config), record, seconds, joules)


def _words(settings: dict[str, str]) -> str:
    """The settings of a trial in one line."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _take_over(trial: Path, folder: Path) -> None:
    """Copy the files of a finished trial to the run."""
    shutil.copytree(trial, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("checkpoints"))
