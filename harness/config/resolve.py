"""From a request to one configuration: preset, then task, backbone, method, and `--set` last."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from harness.api.registry import Registry
from harness.api.settings import build
from harness.api.task import Task, Window
from harness.config.presets import read_preset
from harness.config.request import Request, options
from harness.config.schema import Evaluate, Finetune, RunConfig, TaskSettings, Training
from harness.system.errors import UserError, unknown

SECTIONS = ("method", "backbone", "pretrain", "finetune", "evaluate")
SETTABLE = (*SECTIONS, "task")


def parse_overrides(pairs: Sequence[str]) -> dict[str, str]:
    """`["method.mask_ratio=0.6"]` -> `{"method.mask_ratio": "0.6"}`. Raises UserError for anything else."""
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


def change_task(task: Task, overrides: Mapping[str, str]) -> Task:
    """The task under the `task.*` settings among `overrides`. Raises UserError for an unknown field or a wrong value."""
    values = {key.partition(".")[2]: value for key, value in overrides.items() if key.startswith("task.")}
    settings = build(TaskSettings, values, "task")
    if settings.spacing is not None:
        task = replace(task, spacing=settings.spacing)
    return replace(task, normalisation=Window(*settings.window)) if settings.window is not None else task


def resolve(request: Request, registry: Registry, task: Task) -> RunConfig:
    """Lay task, backbone, method and `--set` over the preset, in this order, and validate the whole.

    `task` is as `change_task` gives it.

    Raises:
        UserError: an unknown name or setting, or a value that is out of range.
    """
    overrides, preset = parse_overrides(request.settings), request.preset
    method_class, backbone_class = registry.load("method", request.method), registry.load("backbone", request.backbone)
    written = read_preset(preset)
    values: dict[str, dict[str, Any]] = {section: dict(written.get(section, {})) for section in SECTIONS}
    layers = [
        (f"task {task.name!r}", task.presets, SECTIONS[2:]),
        (f"backbone {request.backbone!r}", backbone_class.presets, ("backbone",)),
        # A method that could change the fine-tuning would no longer be compared with a matched control.
        (f"method {request.method!r}", method_class.presets, ("method", "pretrain")),
        ("--set", {preset: {k: v for k, v in overrides.items() if not k.startswith("task.")}}, SECTIONS),
    ]
    for origin, layer, allowed in layers:
        for key, value in layer.get(preset, {}).items():
            section, _, field = key.partition(".")
            if section not in allowed:
                raise UserError(f"{origin} sets {key} in its preset {preset!r}; it may set {', '.join(allowed)} only")
            other = {"steps": "epochs", "epochs": "steps"}.get(field)
            if other and section in ("pretrain", "finetune"):
                values[section].pop(other, None)
            values[section][field] = value
    asked = {name: getattr(request, name) for name, _ in options(Request) if name in RunConfig.model_fields}
    run = asked | {
        "task": task.name,
        "mode": request.mode if method_class.trains else "task-specific",
        "corpora": (),  # with digests of their scans, once these are read
        "prepared": {
            "spacing": task.spacing,
            "normalisation": type(task.normalisation).__name__,
            **asdict(task.normalisation),
        },
        "overrides": dict(sorted(overrides.items())),
        "method_settings": build(method_class.Config, values["method"], "method"),
        "backbone_settings": build(backbone_class.Config, values["backbone"], "backbone"),
        "pretrain": build(Training, values["pretrain"], "pretrain"),
        "finetune": build(Finetune, values["finetune"], "finetune"),
        "evaluate": build(Evaluate, values["evaluate"], "evaluate"),
    }
    return build(RunConfig, run, "run")
