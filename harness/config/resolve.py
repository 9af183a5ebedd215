"""Resolve a request to one validated configuration.

The values of the preset are replaced by those of the task, the backbone, the method and `--set`, in this order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from harness.api.registry import Registry
from harness.api.settings import build
from harness.api.task import Task, Window, ZScore
from harness.config.grid import canonical_grid, parse_grid
from harness.config.presets import lineage, read_preset, settings_of
from harness.config.request import Request, options
from harness.config.schema import Evaluate, Finetune, Pretrain, RunConfig, TaskSettings
from harness.system.errors import UserError, unknown


@dataclass(frozen=True)
class TuningTrial:
    """One setting of a grid, and the configuration of the run with it."""

    settings: dict[str, str]
    config: RunConfig


SECTIONS = ("method", "backbone", "pretrain", "finetune", "evaluate")
SETTABLE = (*SECTIONS, "task")


def parse_overrides(pairs: Sequence[str]) -> dict[str, str]:
    """Parse the values of `--set`: `["method.mask_ratio=0.6"]` -> `{"method.mask_ratio": "0.6"}`.

    Raises:
        UserError: text that is not of the form section.field=value, or an unknown section.
    """
    overrides = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        section, dot, field = key.strip().partition(".")
        if not (sign and dot and field):
            raise UserError(f"--set {pair!r} is not of the form section.field=value, for instance pretrain.steps=200")
        if section not in SETTABLE:
            raise unknown("section of --set", section, SETTABLE)
        overrides[f"{section}.{field}"] = value.strip()
    return overrides


def change_task(task: Task, preset: str, overrides: Mapping[str, str]) -> Task:
    """The task with the changes that the `task.*` settings of a preset and, before them, those in `overrides` make.

    Raises:
        UserError: an unknown preset or field, or a value that is out of range.
    """
    given = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith("task.")}
    values = {
        field: value for name in lineage(preset) for section, field, value in settings_of(name) if section == "task"
    }
    if "window" in given:
        values.pop("normalisation", None)  # one takes the place of the other
    values |= given
    settings = build(TaskSettings, values, "task")
    if settings.spacing is not None:
        task = replace(task, spacing=settings.spacing)
    if settings.normalisation == "zscore":
        return replace(task, normalisation=ZScore(task.hounsfield))
    return replace(task, normalisation=Window(*settings.window)) if settings.window is not None else task


def resolve(request: Request, registry: Registry, task: Task) -> RunConfig:
    """Combine preset, task, backbone, method and `--set`, in this order, and validate the result.

    Args:
        task: the task that `change_task` returns.

    Raises:
        UserError: an unknown name or setting, a value that is out of range, or a plugin whose preset changes a section that
            it may not change.
    """
    overrides = parse_overrides(request.settings)
    method_class, backbone_class = registry.load("method", request.method), registry.load("backbone", request.backbone)
    values = _combine(request, registry, task, overrides)
    if not method_class.trains:
        # One run without pre-training is the control of every pre-training budget, so its identity leaves the budget out.
        build(Pretrain, values["pretrain"], "pretrain")
        overrides = {key: value for key, value in overrides.items() if not key.startswith("pretrain.")}
        values = _combine(request, registry, task, overrides)
    requested = {name: getattr(request, name) for name, _ in options(Request) if name in RunConfig.model_fields}
    run = requested | {
        "task": task.name,
        "mode": request.mode if method_class.trains and not method_class.uses_labels else "task-specific",
        "corpora": (),  # filled in once the corpora are read, because it holds digests of their scans
        "prepared": {
            "spacing": task.spacing,
            "normalisation": type(task.normalisation).__name__,
            **asdict(task.normalisation),
        },
        # The number of loader processes changes no result.
        "overrides": {key: value for key, value in sorted(overrides.items()) if not key.endswith(".workers")},
        "tune": canonical_grid(request.tune),
        "method_settings": build(method_class.Config, values["method"], "method"),
        "backbone_settings": build(backbone_class.Config, values["backbone"], "backbone"),
        "pretrain": build(Pretrain, values["pretrain"], "pretrain"),
        "finetune": build(Finetune, values["finetune"], "finetune"),
        "evaluate": build(Evaluate, values["evaluate"], "evaluate"),
    }
    return build(RunConfig, run, "run")


def shots_of(request: Request) -> int:
    """The number of labelled cases, from `--shots` or the preset; 0 where `--label-fraction` decides."""
    return request.shots or (read_preset(request.preset).get("shots", 0) if request.label_fraction == 1 else 0)


def resolve_trials(request: Request, registry: Registry, task: Task) -> list[TuningTrial]:
    """The trials of `--tune`, each as `resolve` gives it; none without `--tune`.

    Raises:
        UserError: as `resolve`, or a setting is also given by `--set`.
    """
    trials, given, grid = [], parse_overrides(request.settings), canonical_grid(request.tune)
    for settings in parse_grid(request.tune):
        twice = sorted(settings.keys() & given.keys())
        if twice:
            raise UserError(f"{twice[0]} is set by --set and in the grid: give it once")
        if request.protocol == "linear" and "finetune.layer_decay" in settings:
            raise UserError(
                "finetune.layer_decay in the grid, with --protocol linear: one layer has one learning rate: leave it out"
            )
        pairs = (*request.settings, *(f"{key}={value}" for key, value in settings.items()))
        config = resolve(replace(request, settings=pairs, tune=""), registry, task)
        # What was tried says the grid; the overrides are those of the user.
        overrides = {key: value for key, value in config.overrides.items() if key not in settings}
        trials.append(TuningTrial(settings, config.model_copy(update={"overrides": overrides, "tune": grid})))
    return trials


def _combine(
    request: Request, registry: Registry, task: Task, overrides: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """The values of each section, not validated yet. Raises UserError if a plugin's preset sets what it may not."""
    method_class, backbone_class = registry.load("method", request.method), registry.load("backbone", request.backbone)
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    layers: list[tuple[str, Mapping[str, Any], Sequence[str]]] = []
    for preset in lineage(request.preset):
        shipped = {f"{section}.{key}": value for section, key, value in settings_of(preset) if section != "task"}
        layers += [
            (f"preset {preset!r}", shipped, SECTIONS),
            (f"task {task.name!r}", task.presets.get(preset, {}), SECTIONS[2:]),
            (f"backbone {request.backbone!r}", backbone_class.presets.get(preset, {}), ("backbone",)),
            # A method may not change fine-tuning, because its control must be fine-tuned in the same way.
            (f"method {request.method!r}", method_class.presets.get(preset, {}), ("method", "pretrain")),
        ]
    layers.append(("--set", {key: text for key, text in overrides.items() if not key.startswith("task.")}, SECTIONS))
    for origin, layer, allowed in layers:
        for key, value in layer.items():
            section, _, field = key.partition(".")
            if section not in allowed:
                raise UserError(
                    f"{origin} sets {key} in its preset {request.preset!r}; it may set {', '.join(allowed)} only"
                )
            other = {"steps": "epochs", "epochs": "steps"}.get(field)
            if other and section in ("pretrain", "finetune"):
                values[section].pop(other, None)
            values[section][field] = value
    return values
