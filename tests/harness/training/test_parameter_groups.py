"""Parameter groups: weight decay, and the learning rate of head, decoder and encoder."""

import pytest
import torch

from harness.api.registry import Registry
from harness.api.settings import build
from harness.compute.processes import SingleProcess
from harness.config.schema import Finetune
from harness.training.parameter_groups import learning_rate_scale, parameter_groups
from harness.training.protocols import with_head
from harness.training.segmenter import Segmenter
from harness.training.trainer import Trainer


def small(name):
    backbone = Registry().load("backbone", name)
    preset = backbone.presets.get("check", backbone.presets.get("demo", {}))
    return backbone(
        build(backbone.Config, {key.partition(".")[2]: value for key, value in preset.items()}, "backbone"), 1
    )


@pytest.fixture(params=["unet", "swinunetr", "unetr", "segresnet"])
def segmenter(request):
    return Segmenter(with_head(small(request.param), 3, "finetune"), overlapping=False)


def finetuning(**changes):
    return Finetune(steps=10, crop=(32, 32, 32), batch_size=1, lr=0.1, weight_decay=0.01, **changes)


def test_without_a_decay_the_groups_are_those_of_timm(segmenter):
    groups = parameter_groups(segmenter, finetuning())
    assert [set(group) for group in groups] == [{"params", "weight_decay"}] * 2


def test_each_parameter_is_in_one_group_with_the_scale_of_its_part(segmenter):
    groups = parameter_groups(segmenter, finetuning(layer_decay=0.5))
    expected = {"head": 1.0, "decoder": 0.5, "encoder": 0.25}
    network, seen = segmenter.network, {}
    for group in groups:
        for parameter in group["params"]:
            assert id(parameter) not in seen
            seen[id(parameter)] = group["lr_scale"]
    assert seen == {id(value): expected[network.part_of(name)] for name, value in network.named_parameters()}
    assert groups[0]["lr_scale"] == 1.0
    plain = {
        id(p): group["weight_decay"] for group in parameter_groups(segmenter, finetuning()) for p in group["params"]
    }
    assert {id(p): group["weight_decay"] for group in groups for p in group["params"]} == plain


def test_the_schedule_keeps_the_ratio_of_the_learning_rates(segmenter):
    settings = finetuning(layer_decay=0.5, warmup_steps=2)
    trainer = Trainer(segmenter, settings, 10, 2, SingleProcess(torch.device("cpu")))
    for number in (1, 2, 7):
        trainer.schedule.step_update(number)
        rates = {group["lr_scale"]: group["lr"] for group in trainer.optimizer.param_groups}
        assert rates[1.0] > 0
        assert rates[0.5] == pytest.approx(rates[1.0] / 2)
        assert rates[0.25] == pytest.approx(rates[1.0] / 4)


def test_one_layer_on_a_frozen_encoder_has_no_parts():
    probe = Segmenter(with_head(small("unet"), 3, "linear"), overlapping=False)
    assert learning_rate_scale(probe, "network.probe.weight", 0.5) == 1.0
