"""Groups of parameters that AdamW treats differently: weight decay, and the learning rate of the parts of a network."""

from collections import defaultdict
from typing import Any

from timm.optim import param_groups_weight_decay
from torch import nn

from harness.api.backbone import Backbone
from harness.config.schema import Finetune, Training


def parameter_groups(module: nn.Module, settings: Training) -> list[dict[str, Any]]:
    """The parameter groups of a training stage, as torch's optimizers take them.

    Biases and norms have no weight decay. With `finetune.layer_decay` below 1, the learning rate of each part of the network is
    scaled (`learning_rate_scale`); timm's schedules multiply a group's learning rate by its `lr_scale`.
    """
    groups: list[dict[str, Any]] = param_groups_weight_decay(module, settings.weight_decay)
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
