"""Networks are built in one place: frozen but for what is trained, seeded by purpose, and loaded as they were written."""

from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from safetensors.torch import save_file

from backbones.unet import UNet
from harness import Method, Settings
from harness.config.request import Request
from harness.config.resolve import resolve
from harness.training.models import Plugins, new_method, new_network, seed_for


class Encoder(Method):
    """Trains the encoder only."""

    name = "encoder-only"
    trains: ClassVar = ("encoder",)

    def forward(self, batch):
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return {"all": features.square().mean()}


def unet(channels=1):
    return UNet(UNet.Config(features=(4, 4, 8, 8, 8)), in_channels=channels)


def test_what_a_method_does_not_train_gets_no_gradient():
    method = new_method(Encoder, Settings(), unet())
    method({"image": torch.rand(1, 1, 32, 32, 32)})["all"].backward()
    trained = {key.split(".")[0] for key, value in method.backbone.named_parameters() if value.grad is not None}
    assert trained == {"conv_0", "down_1", "down_2", "down_3", "down_4"}


def test_a_configuration_and_its_classes_make_the_network_and_the_method(registry):
    request = Request(method="mae", task="brats", settings=("backbone.features=4,4,8,8,8",))
    config = resolve(request, registry, registry.task("brats"))
    plugins = Plugins(registry.load("method", "mae"), registry.load("backbone", "unet"))
    method = plugins.new_method(config, 4)
    assert type(method).name == "mae"
    assert method.backbone.in_channels == 4
    assert method.backbone.channels == (4, 4, 8, 8, 8)
    assert plugins.new_backbone(config, 2).encode(torch.rand(1, 2, 32, 32, 32))[0].shape == (1, 4, 32, 32, 32)


@pytest.mark.parametrize("protocol", ["finetune", "frozen", "linear"])
def test_written_weights_give_the_network_that_was_written(protocol, registry, tmp_path):
    task, image = registry.task("msd_hippocampus"), torch.rand(1, 1, 32, 32, 32)
    network = new_network(unet(), task, protocol).cpu().eval()
    save_file(network.state_dict(), tmp_path / "weights.safetensors")
    torch.manual_seed(1)
    again = new_network(unet(), task, protocol, tmp_path / "weights.safetensors").cpu().eval()
    other = new_network(unet(), task, protocol).cpu().eval()
    with torch.inference_mode():
        expected = network(image)
        assert expected.shape == (1, 3, 32, 32, 32)
        assert torch.equal(again(image), expected)
        assert not torch.equal(other(image), expected)
    more = replace(task, targets={"a": (1,), "b": (2,), "c": (0,)})
    with pytest.raises(RuntimeError, match="size mismatch"):
        new_network(unet(), more, protocol, tmp_path / "weights.safetensors")


def test_every_use_of_randomness_has_a_seed_of_its_own():
    seeds = {
        (seed, purpose): seed_for(seed, purpose) for seed in range(50) for purpose in ("pretrain", "finetune", "x")
    }
    assert len(set(seeds.values())) == len(seeds)
    assert all(0 <= value < 2**31 for value in seeds.values())
    assert seeds[3, "x"] == seed_for(3, "x")
    # Fixed for ever: another value is another result of every run.
    assert (seed_for(0, "pretrain"), seed_for(1, "finetune")) == (605110069, 1071832594)
