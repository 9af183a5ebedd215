"""Optimizers, schedules, and parameter groups: weight decay, and the learning rate of head, decoder and encoder."""

import copy

import pytest
import torch

from harness.api.registry import Registry
from harness.api.settings import build
from harness.compute.processes import SingleProcess
from harness.config.schema import Finetune
from harness.training.optimization import learning_rate_scale, parameter_groups
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


class Quadratic(torch.nn.Module):
    """A loss with a weight and a bias; NaN in the batch makes it NaN."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)
        torch.nn.init.ones_(self.layer.weight)
        torch.nn.init.ones_(self.layer.bias)

    def forward(self, batch):
        return {"loss": self.layer(batch["x"]).square().mean()}


SGD = {"optimizer": "sgd", "momentum": 0.9, "lr_schedule": "poly", "clip_norm": 0.0, "precision": "fp32"}
BATCHES = [[{"x": torch.tensor([[1.0, 2, step]])}] for step in range(4)]


def test_sgd_is_pytorchs_with_decay_of_all_parameters_and_a_polynomial_schedule():
    model, steps = Quadratic(), 4
    trainer = Trainer(model, finetuning(**SGD), steps, 0, SingleProcess(torch.device("cpu")))
    assert trainer.used()["optimizer"] == "fused SGD"
    plain = Quadratic()
    expected = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)
    for number, batches in enumerate(BATCHES, start=1):
        trainer.clock.start()
        trainer.step(number, batches)
        for group in expected.param_groups:
            group["lr"] = 0.1 * (1 - number / (steps + 1)) ** 0.9
        expected.zero_grad()
        plain(batches[0])["loss"].backward()
        expected.step()
    torch.testing.assert_close(model.layer.weight, plain.layer.weight)
    torch.testing.assert_close(model.layer.bias, plain.layer.bias)


def test_a_first_step_of_sgd_that_is_left_out_leaves_no_trace():
    nan = [{"x": torch.full((1, 3), torch.nan)}]
    weights = []
    for skipped in (True, False):
        model = Quadratic()
        trainer = Trainer(model, finetuning(**SGD), 9, 0, SingleProcess(torch.device("cpu")), skip_nonfinite=True)
        trainer.clock.start()
        if skipped:
            trainer.step(1, nan)
            assert (model.layer.weight == 1).all()
        trainer.step(2, BATCHES[1])
        weights.append(model.layer.weight.detach().clone())
    assert torch.equal(*weights)


def test_sgd_goes_on_from_a_state_with_the_same_result():
    models = []
    for stop in (0, 2):
        model = Quadratic()
        trainer = Trainer(model, finetuning(**SGD), 9, 0, SingleProcess(torch.device("cpu")))
        for number, batches in enumerate(BATCHES, start=1):
            if number == stop + 1 and stop:
                state = copy.deepcopy(trainer.state())
                model = Quadratic()
                trainer = Trainer(model, finetuning(**SGD), 9, 0, SingleProcess(torch.device("cpu")))
                trainer.load(state)
            trainer.clock.start()
            trainer.step(number, batches)
        models.append(model)
    assert torch.equal(models[0].layer.weight, models[1].layer.weight)


def test_the_warm_up_of_both_schedules_rises_from_0():
    for schedule in ("cosine", "poly"):
        trainer = Trainer(
            Quadratic(), finetuning(lr_schedule=schedule, warmup_steps=4), 10, 4, SingleProcess(torch.device("cpu"))
        )
        rates = []
        for number in range(1, 11):
            trainer.schedule.step_update(number)
            rates.append(trainer.optimizer.param_groups[0]["lr"])
        assert rates[:3] == pytest.approx([0.025, 0.05, 0.075])
        assert max(rates) == max(rates[2:4])
        assert rates[3:] == sorted(rates[3:], reverse=True)
        assert 0 < rates[-1] < 0.02
