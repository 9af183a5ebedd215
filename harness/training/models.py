"""The only place that builds methods and networks: for runs, finished runs, profiles and conformance checks."""

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
    """The method class and the backbone class of a run."""

    method: type[Method]
    backbone: type[Backbone]

    def new_backbone(self, config: RunConfig, channels: int) -> Backbone:
        """A randomly initialised backbone for images of `channels` channels."""
        return self.backbone(config.backbone_settings, channels)

    def new_method(self, config: RunConfig, channels: int) -> Method:
        """A randomly initialised method for images of `channels` channels; see the function `new_method`."""
        return new_method(self.method, config.method_settings, self.new_backbone(config, channels))


def new_method(method_class: type[Method], settings: Settings, backbone: Backbone) -> Method:
    """A method on a backbone. Parts of the backbone that it does not train get neither gradients nor optimizer state."""
    method = method_class(settings, backbone)
    for key, parameter in method.backbone.named_parameters():
        parameter.requires_grad_(method.backbone.part_of(key) in method.trains)
    return method


def new_network(backbone: Backbone, task: Task, protocol: FinetuneProtocol, weights: Path | None = None) -> nn.Module:
    """A backbone with a head for a task, on the device of this process.

    Args:
        weights: safetensors file of the whole network; with None, the network keeps its initial values.

    Raises:
        OSError, SafetensorError, RuntimeError: the weights cannot be read, or belong to another network.
    """
    network = with_head(backbone, task.num_outputs, protocol)
    if weights is not None:
        network.load_state_dict(load_file(weights))
    return network.to(new_accelerator().device)


def seed_for(seed: int, purpose: str) -> int:
    """The seed for one use of randomness in a run, independent of those for other purposes."""
    return seed_from(f"{seed}:{purpose}", size=4) >> 1
