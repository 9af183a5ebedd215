"""Builds `record.json`, the record of a run."""

import time
from typing import Any

from torch import nn

from harness.compute import environment, memory
from harness.config.request import Request, options
from harness.config.schema import RunConfig
from harness.evaluation.evaluate import new_scoring
from harness.runs.plan import RunPlan

SCHEMA = 1
"""Version of the record's fields."""

RULES = 2
"""Version of the rules that say which runs share a table, see `leaderboards.records.Run`."""


def make_record(
    run_plan: RunPlan,
    summary: dict[str, Any],
    seconds: dict[str, float],
    tuned: dict[str, Any],
    network: nn.Module,
    stage: dict[str, Any],
) -> dict[str, Any]:
    """The record of a run, without the digests of its files.

    Args:
        summary: means of the scores, per target and over targets.
        seconds: per stage.
        tuned: report of fine-tuning.
        stage: report of pre-training; empty if there was none.
    """
    config, task, trained = run_plan.config, run_plan.task, tuned["trained"]
    device, scoring = next(network.parameters()).device, new_scoring(config.evaluate)
    peaks = [memory.peak_memory(device), tuned["memory"]]
    transfer = {name: value for name, value in tuned["transfer"].items() if name != "text"}
    return {
        "schema": SCHEMA,
        "rules": RULES,
        "run_id": run_plan.run_id,
        **{
            option.record: getattr(config, name)
            for name, option in options(Request)
            if option.record in RunConfig.model_fields
        },
        "uses_labels": run_plan.plugins.method.uses_labels,
        "method_version": run_plan.plugins.method.version,
        "task_version": task.version,
        "overrides": config.overrides,
        "data": _data_record(run_plan),
        "task_description": _task_description(run_plan),
        "config": config.model_dump(mode="json"),
        "metrics": summary,
        "metric_policy": scoring.policy,
        "metric_definitions": {"hd95": scoring.hd95, "surface_dice_tolerance_mm": scoring.tolerance, "unit": "mm"},
        "timing": {
            "pretrain_step": stage.get("clock"),
            "finetune_step": trained["clock"],
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        },
        "computed_with": {"pretrain": stage.get("used"), "finetune": trained["used"]},
        "resumed": {"pretrain": stage.get("resumed", 0), "finetune": trained["resumed"]},
        "skipped_steps": {"pretrain": stage.get("skipped", []), "finetune": trained["skipped"]},
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "memory": {"pretrain": stage.get("memory"), "run": {key: _most(peaks, key) for key in peaks[0]}},
        "energy": {
            "pretrain_kwh": in_kwh(stage.get("joules")),
            "finetune_kwh": in_kwh(trained.get("joules")),
            "counted": trained.get("counted", []),
        },
        "environment": environment.describe_environment(device),
        "transfer": transfer,
        "final_soft_dice": tuned.get("final_soft_dice"),
        "method_prepare": stage.get("prepared", {}),
        "probe": stage.get("probe"),
        "files": run_plan.files,
        "pretrain_folder": stage["folder"].name if "folder" in stage else None,
        "lineage": run_plan.lineage.as_record() if run_plan.files else None,
        "citations": run_plan.citations,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _task_description(run_plan: RunPlan) -> dict[str, Any]:
    """What a reader of the scores must know about the task."""
    task = run_plan.task
    return {
        "channels": list(task.channels),
        "targets": {name: list(values) for name, values in task.targets.items()},
        "labels": list(task.labels),
        "overlapping": task.overlapping,
        "aliases": {name: list(others) for name, others in task.aliases.items()},
        "numbering": _numbering(run_plan),
    }


def _numbering(run_plan: RunPlan) -> list[list[int]]:
    """`Case.numbering` of the label files that the run was trained and tested with; empty if it is the task's, or they differ."""
    numberings = {case.numbering for case in (*run_plan.label_cases, *run_plan.test)}
    return [list(pair) for pair in numberings.pop()] if len(numberings) == 1 else []


def in_kwh(joules: float | None) -> float | None:
    """Joules in kWh; None stays None."""
    return None if joules is None else round(joules / 3.6e6, 9)


def _most(peaks: list[dict[str, Any]], key: str) -> float | None:
    """The largest of the peaks of memory that have a value; None if none has one."""
    values = [peak[key] for peak in peaks if peak.get(key) is not None]
    return max(values, default=None)


def _data_record(run_plan: RunPlan) -> dict[str, Any]:
    """What the record says about the data of a run."""
    config, data, split = run_plan.config, run_plan.data, run_plan.data.split
    scans = [case.id for corpus in run_plan.corpora for case in corpus.cases]
    return {
        "source": "phantom" if run_plan.phantom else "real",
        "fingerprint": data.fingerprint,
        "licence": run_plan.task.licence,
        "n_train": len(run_plan.label_cases),
        "n_test": len(run_plan.test),
        "train": [case.id for case in run_plan.label_cases],
        "pretrain": scans or [case.id for case in run_plan.train],
        "validation": [case.id for case in split.validation],
        "test": [case.id for case in run_plan.test],
        "label_subset": "per seed" if config.label_seed is None else f"by label seed {config.label_seed}",
        "split": config.split,
        "split_by": split.by,
        "left_out": split.left_out,
        "repeated": split.repeated,
        "corpora": [
            {
                "name": corpus_data.corpus.name,
                "fingerprint": corpus_data.label.partition("@")[2],
                "n": len(corpus_data.cases),
                "normalisation": repr(corpus_data.corpus.normalisation),
                "spacing": corpus_data.corpus.spacing,
                "licence": corpus_data.corpus.licence,
                "skipped": corpus_data.inventory.bad,
            }
            for corpus_data in run_plan.corpora
        ],
        "overlap": run_plan.overlap,
        "n_test_seen": run_plan.num_test_seen,
    }
