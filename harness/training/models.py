"""The one place where methods and networks of a run are built."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from harness.api.backbone import Backbone
from harness.api.method import Method
from harness.api.task import Task
from harness.compute.devices import new_accelerator
from harness.config.schema import RunConfig
from harness.training import protocols


@dataclass(frozen=True)
class Plugins:
    """The classes of a run, resolved."""

    method: type[Method]
    backbone: type[Backbone]

    def new_backbone(self, config: RunConfig, channels: int) -> Backbone:
        """A randomly initialised backbone for images of so many channels."""
        return self.backbone(config.backbone_settings, channels)


def seed_for(seed: int, purpose: str) -> int:
    """An independent seed for each use of randomness in a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=4).digest(), "big") >> 1


def freeze(method: Method) -> None:
    """Backbone parts that the method does not train get no gradient, and no optimizer state."""
    for key, parameter in method.backbone.named_parameters():
        parameter.requires_grad_(method.backbone.part_of(key) in method.trains)


def load_network(config: RunConfig, plugins: Plugins, task: Task, folder: Path) -> nn.Module:
    """The fine-tuned network of a run's folder, where it is computed."""
    backbone = plugins.new_backbone(config, len(task.channels))
    network = protocols.with_head(backbone, task.num_outputs, config.protocol)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network.to(new_accelerator().device)
