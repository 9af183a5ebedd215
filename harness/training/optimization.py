"""Optimizers, schedules, and groups of parameters that differ in weight decay or learning rate."""

from collections import defaultdict
from typing import Any

import torch
from timm.optim import param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, PolyLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import nn

from harness.api.backbone import Backbone
from harness.config.schema import Finetune, Training

POWER = 0.9  # of the schedule `poly`; nnU-Net's


def new_optimizer(module: nn.Module, settings: Training, fused: bool) -> torch.optim.Optimizer:
    """The optimizer of a training stage, with `parameter_groups`.

    Args:
        fused: whether to take the implementation that updates all parameters at once and can skip a step on the device.
    """
    groups = parameter_groups(module, settings)
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.lr, fused=fused)
    sgd = torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=settings.momentum > 0, fused=fused
    )
    for group in sgd.param_groups if settings.momentum else ():
        for parameter in group["params"]:
            # PyTorch leaves the first momentum uninitialised if the first step is skipped. From 0 it comes to the same.
            sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def new_schedule(optimizer: torch.optim.Optimizer, settings: Training, steps: int, warmup: int) -> Scheduler:
    """The schedule of the learning rate over `steps`, the first `warmup` of which it rises in."""
    # One more than the number of steps, so that the learning rate reaches 0 after the last step and not in it.
    common: dict[str, Any] = {"t_initial": steps + 1, "warmup_t": warmup, "warmup_lr_init": 0.0, "t_in_epochs": False}
    if settings.lr_schedule == "poly":
        return PolyLRScheduler(optimizer, power=POWER, **common)
    return CosineLRScheduler(optimizer, **common)


def parameter_groups(module: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """The parameter groups of a training stage, as torch's optimizers take them.

    Biases and norms have no weight decay under AdamW; SGD decays all parameters, as nnU-Net does. With
    `finetune.layer_decay` below 1, the learning rate of each part of the network is scaled (`learning_rate_scale`); timm's
    schedules multiply a group's learning rate by its `lr_scale`.
    """
    if settings.optimizer == "adamw":
        groups: list[dict[str, Any]] = param_groups_weight_decay(module, settings.weight_decay)
    else:
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        groups = [{"params": trained, "weight_decay": settings.weight_decay}]
    decay = settings.layer_decay if isinstance(settings, Finetune) else 1.0
    if decay == 1:
        return groups
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    split = []
    for group in groups:
        by_scale: dict[float, list[nn.Parameter]] = defaultdict(list)
        for parameter in group["params"]:
            by_scale[learning_rate_scale(module, names[id(parameter)], decay)].append(parameter)
        split += [group | {"params": members, "lr_scale": scale} for scale, members in by_scale.items()]
    # The first group has the full learning rate, which the history reports.
    return sorted(split, key=lambda group: -float(group["lr_scale"]))


def learning_rate_scale(module: nn.Module, name: str, decay: float) -> float:
    """The factor on the learning rate of a parameter: 1 in the head, `decay` in the decoder, its square in the encoder.

    What lies nearer to the image is more general and needs less change (Howard and Ruder 2018, "Universal language model
    fine-tuning for text classification", section 3.2: discriminative fine-tuning).

    Args:
        module: what a stage trains; its part `network` segments.
        name: of the parameter in `module`.
    """
    network = module.get_submodule("network")
    if not isinstance(network, Backbone):
        return 1.0  # one layer on a frozen encoder
    powers = {"head": 0, "decoder": 1, "encoder": 2}
    return float(decay ** powers[network.part_of(name.removeprefix("network."))])
