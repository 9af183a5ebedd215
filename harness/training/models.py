"""The one place where methods and networks are built: for runs, finished runs, profiles and conformance checks."""

from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file
from torch import nn

from harness.api.backbone import Backbone
from harness.api.method import Method
from harness.api.settings import Settings
from harness.api.task import Task
from harness.compute.devices import new_accelerator
from harness.config.request import FinetuneProtocol
from harness.config.schema import RunConfig
from harness.system.files import seed_from
from harness.training.protocols import with_head


@dataclass(frozen=True)
class Plugins:
    """The classes of method and backbone of a run."""

    method: type[Method]
    backbone: type[Backbone]

    def new_backbone(self, config: RunConfig, channels: int) -> Backbone:
        """A randomly initialised backbone for images of `channels` channels."""
        return self.backbone(config.backbone_settings, channels)

    def new_method(self, config: RunConfig, channels: int) -> Method:
        """A randomly initialised method for images of `channels` channels, frozen but for what it trains."""
        return new_method(self.method, config.method_settings, self.new_backbone(config, channels))


def new_method(method_class: type[Method], settings: Settings, backbone: Backbone) -> Method:
    """A method on a backbone. Parts of the backbone that it does not train get no gradient, and no optimizer state."""
    method = method_class(settings, backbone)
    for key, parameter in method.backbone.named_parameters():
        parameter.requires_grad_(method.backbone.part_of(key) in method.trains)
    return method


def new_network(backbone: Backbone, task: Task, protocol: FinetuneProtocol, weights: Path | None = None) -> nn.Module:
    """A backbone with the head of a task, on the device where it computes.

    Args:
        weights: safetensors of the whole network; None leaves it as it was initialised.

    Raises:
        OSError, SafetensorError, RuntimeError: weights that cannot be read, or are of another network.
    """
    network = with_head(backbone, task.num_outputs, protocol)
    if weights is not None:
        network.load_state_dict(load_file(weights))
    return network.to(new_accelerator().device)


def seed_for(seed: int, purpose: str) -> int:
    """An independent seed for each use of randomness in a run."""
    return seed_from(f"{seed}:{purpose}", size=4) >> 1
