"""Reproduces a run: `harness reproduce`.

It gives the command of the run, lists the differences between its environment and the present one, and compares the results
of the same run made again.
"""

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.api.registry import Registry
from harness.compute import environment
from harness.config.presets import read_preset
from harness.config.request import PHANTOM, Request, command, recorded_fields
from harness.data.corpus import with_intensities
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.system.errors import UserError
from harness.training.lineage import KEY
from leaderboards.records import RecordError, load_run, num_test_seen
from leaderboards.text import seen_text

ENVIRONMENT = ("python", "platform", "cpu", "threads", "torch", "cuda", "gpu", "harness")
"""Fields of a record's environment that are compared."""


@dataclass(frozen=True)
class Reproduction:
    """The request of a recorded run, and every difference to it, as (name, value in the record, value here)."""

    record: Mapping[str, Any]
    request: Request
    differences: list[tuple[str, str, str]]

    @property
    def command(self) -> str:
        """The exact command of the run. `--data`, `--runs` and `--plugin`, which no record holds, are those given here."""
        # Without it, the command would take the data that HARNESS_DATA names.
        phantom = ["--data", PHANTOM] if self.record["data"]["source"] == PHANTOM else []
        return shlex.join([*command(self.request), *phantom])

    def __str__(self) -> str:
        environment = self.record.get("environment", {})
        git = environment.get("git") or {}
        lines = [f"the command of {self.record['run_id']}:", f"  {self.command}", "made with:"]
        lines += [f"  {name}: {environment[name]}" for name in ENVIRONMENT if environment.get(name) is not None]
        packages = ", ".join(f"{name} {version}" for name, version in (environment.get("packages") or {}).items())
        lines += [f"  packages: {packages}"] if packages else []
        dirty = " with uncommitted changes" if git.get("dirty") else ""
        lines += [f"  revision: {git['revision']}{dirty}"] if git.get("revision") else []
        for each in (self.record.get("lineage") or {}).get("generations", []):
            lines.append(
                f"  starting weights: {each['stage']} {each['method']} on {each['num_scans']} scans of {each['data']}"
            )
        lines += ["what differs here:" if self.differences else "nothing differs here"]
        lines += [f"  {name}: there {there}, here {here}" for name, there, here in self.differences]
        return "\n".join(lines)


def inspect(
    record: Mapping[str, Any], data: Path | None, runs: Path, plugins: Sequence[str], corpora: Sequence[str]
) -> Reproduction:
    """The request of a record, and all differences here. The data is opened if it is given or is a phantom.

    Raises:
        UserError: a plugin or a corpus is missing here, or more or fewer corpora are given than the record names.
    """
    request = _request(record, data, runs, plugins, corpora)
    return Reproduction(record, request, [*_environment(record), *_plugins(request), *_data(record, request)])


def compare(record: Mapping[str, Any], cases: Path, again: Mapping[str, Any], cases_again: Path) -> str:
    """A sentence on the difference between the results of the recorded run and those of the run made again."""
    if cases.exists() and cases.read_bytes() == cases_again.read_bytes():
        return "every case has the same scores, to the last digit"
    here, there = (run["metrics"].get("average", {}).get("dice") for run in (again, record))
    averages = f"average Dice there {_format_dice(there)}, here {_format_dice(here)}"
    if not cases.exists():
        return averages
    try:
        first, second = load_run(cases.parent), load_run(cases_again.parent)
    except RecordError as error:
        return f"{averages}; cases are not compared: {error}"
    if first.cases != second.cases or first.targets != second.targets:
        return f"{averages}; the test cases are others"
    largest = float(np.nanmax(abs(first.dice - second.dice), initial=0.0))
    return f"{averages}; the largest difference of a case is {largest:.6f}"


def _format_dice(value: float | None) -> str:
    """A Dice with six decimals."""
    return "not stated" if value is None else f"{value:.6f}"


def _request(
    record: Mapping[str, Any], data: Path | None, runs: Path, plugins: Sequence[str], corpora: Sequence[str]
) -> Request:
    """The request that a record answers, with the folders and plugins that are given here."""
    if record.get("imported"):
        raise UserError(f"{record['run_id']} was imported from other software: there is nothing to run again")
    named = [str(corpus["name"]) for corpus in record["data"].get("corpora", [])]
    if named and not corpora:
        corpora = named
    if len(corpora) != len(named):
        raise UserError(f"the run was pre-trained on {', '.join(named) or 'no corpus'}: give --corpus for each of them")
    recorded = [str(corpus.get("normalisation", "")) for corpus in record["data"].get("corpora", [])]
    corpora = [with_intensities(spec, text) for spec, text in zip(corpora, recorded, strict=True)]
    fields = recorded_fields(record)
    # A preset with a number of labelled cases would label fewer than a run with all labels.
    if fields.get("label_fraction") == 1 and read_preset(str(record["preset"])).get("shots"):
        fields["shots"] = int(record["data"]["n_train"])
    return Request(
        **fields,
        data=None if record["data"]["source"] == "phantom" else data,
        runs=runs,
        settings=tuple(f"{key}={value}" for key, value in record["overrides"].items()),
        plugins=tuple(plugins),
        corpora=tuple(corpora),
        allow_overlap=bool(record["data"].get("overlap")),
        skip_bad=any(corpus.get("skipped") for corpus in record["data"].get("corpora", [])),
    )


def _environment(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Differences between the environment in a record and the present one, as in `Reproduction.differences`."""
    there: Mapping[str, Any] = record.get("environment", {})
    here = environment.describe_environment(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    pairs = [(name, there.get(name), here[name]) for name in ENVIRONMENT]
    packages = there.get("packages") or {}
    pairs += [(name, version, here["packages"].get(name)) for name, version in packages.items()]
    git = there.get("git") or {}
    pairs.append(("revision", git.get("revision"), here["git"]["revision"]))
    differences = [(name, str(a), str(b)) for name, a, b in pairs if a != b]
    if git.get("dirty") or here["git"]["dirty"]:
        differences.append(("uncommitted changes", str(bool(git.get("dirty"))), str(bool(here["git"]["dirty"]))))
    return differences


def _plugins(request: Request) -> list[tuple[str, str, str]]:
    """The plugins of the run that are not known here, as in `Reproduction.differences`."""
    registry = Registry(request.plugins)
    used = {"method": request.method, "backbone": request.backbone, "task": request.task}
    return [
        (f"{kind} {name!r}", "of a plugin", "unknown: give --plugin FILE, which the command needs, too")
        for kind, name in used.items()
        if name not in registry.names(kind) and not (kind == "task" and registry.task_folder(name))
    ]


def _data(record: Mapping[str, Any], request: Request) -> list[tuple[str, str, str]]:
    """Differences between the data, versions and run id in a record and those here, as in `Reproduction.differences`."""
    there = record["data"]
    if request.data is None and there["source"] == "real":
        return [("data", f"real, fingerprint {there['fingerprint']}", "not given: --data DIR")]
    # The plan is made in a temporary runs folder, so that a comparison leaves no files behind.
    with tempfile.TemporaryDirectory() as runs:
        temporary = replace(request, runs=Path(runs))
        known = request.runs / "cache" / KEY
        if known.is_dir():  # what is known about weights
            shutil.copytree(known, Path(runs) / "cache" / KEY)
        run_plan = plan(temporary, *locate(temporary))
    differences = []
    if run_plan.data.fingerprint != there["fingerprint"]:
        differences.append(("data fingerprint", there["fingerprint"], run_plan.data.fingerprint))
    if run_plan.task.version != record["task_version"]:
        differences.append(("task version", record["task_version"], run_plan.task.version))
    if run_plan.plugins.method.version != record.get("method_version"):
        differences.append(("method version", str(record.get("method_version")), run_plan.plugins.method.version))
    seen = num_test_seen(record), run_plan.num_test_seen
    if seen[0] != seen[1]:
        there_seen, here_seen = (str(seen_text(each)) for each in seen)
        differences.append(("test cases that were trained on", there_seen, here_seen))
    if run_plan.run_id != record["run_id"]:
        differences.append(("run id", record["run_id"], run_plan.run_id))
    return differences
