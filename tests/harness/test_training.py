"""The loop, the transfer and the configuration."""

import json

import pytest
import torch
from torch import nn

from backbones.unet import UNet
from harness import UserError
from harness.api.global_batch import gather
from harness.compute.devices import new_accelerator
from harness.config.request import Execution, Request
from harness.config.resolve import resolve
from harness.config.schema import Training
from harness.training.checkpoints import read
from harness.training.loop import StageContext, StagePlan, train
from harness.training.transfer import transfer


class Slope(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        return {"fit": (self.weight - batch["image"].mean()).square().sum()}


def settings(**changed):
    return Training(**{"steps": 20, "crop": 32, "batch_size": 2, "lr": 0.1, "weight_decay": 0.0} | changed)


def plan(of=None):
    """A short pre-training."""
    return StagePlan("pretrain", of or settings(), steps=20, warmup=2)


def test_loop_minimises_and_writes_every_step(tmp_path):
    module, history = Slope(), tmp_path / "history.jsonl"
    data = [{"image": torch.ones(1, 2, 2, 2)}] * 40
    seen = []
    done = train(plan(), module, data, history, new_accelerator(), after_step=seen.append)
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21)) == seen
    assert lines[-1]["loss"] < 0.2 * lines[0]["loss"]
    assert lines[0]["lr"] == pytest.approx(0.05)
    assert max(line["lr"] for line in lines) <= 0.1
    assert 0 < lines[-1]["lr"] < 0.01
    assert done.steps == 20
    assert done.clock["step"]["p50_ms"] > 0


class Crops:
    """Samples from named cases; the ninth is not a number."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        return {"image": torch.full((1, 2, 2, 2), float("nan") if index == 8 else 1.0)}

    def name(self, index):
        return f"case{index}"


def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(tmp_path):
    module = Slope()
    with pytest.raises(
        UserError, match=r"at step 5 \(fit nan; cases case8, case9\); the state before it is kept: lower pre"
    ):
        train(plan(), module, Crops(), tmp_path / "history.jsonl", new_accelerator())
    assert torch.isfinite(module.weight).all()
    (kept,) = (tmp_path / "checkpoints").iterdir()
    assert kept.name == "step-000000004.ckpt"
    state = read(kept)
    assert state["step"] == 4
    assert torch.equal(state["module"]["weight"], module.weight)


def test_a_step_that_is_not_finite_is_skipped_and_counted(tmp_path, capsys):
    module, history = Slope(), tmp_path / "history.jsonl"
    with pytest.raises(UserError, match="go on with --on-nonfinite skip"):
        train(plan(), module, Crops(), history, new_accelerator())
    again, skip = Slope(), StageContext(execution=Execution(on_nonfinite="skip"))
    done = train(plan(), again, Crops(), history, new_accelerator(), skip)
    assert (done.skipped, done.resumed) == ([5], 1)
    assert "left out, 1 so far" in capsys.readouterr().err
    lines = [json.loads(line) for line in history.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert [line["step"] for line in lines if line.get("skipped")] == [5]
    # As if nothing of that step had been: one finite step fewer.
    whole = Slope()
    data = [{"image": torch.ones(1, 2, 2, 2)}] * 40
    train(plan(), whole, data, tmp_path / "whole.jsonl", new_accelerator())
    assert 0 < abs(float((again.weight - whole.weight).detach())) < 0.1


class Hungry(torch.nn.Module):
    """More than 1000 voxels at a time are too many."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        if batch["image"].numel() > 1000:
            raise torch.OutOfMemoryError("out of memory")
        # As contrasts do: a single crop, or one part of a batch alone, has nothing to compare.
        if len(gather(batch["image"].flatten(1))) < 2:
            raise ValueError("no negatives")
        return {"fit": (self.weight - batch["image"].mean()).square().sum()}


@pytest.mark.parametrize(
    ("edge", "advice"),
    [
        (7, r"tried and found to fit: --micro-batches 2 \(the same result\)"),
        (9, r"tried and found to fit: --micro-batches 4 \(the same result\)"),
        (12, r"tried and found to fit: --set pretrain.crop=6,6,6 --set pretrain.batch_size=4"),
        (30, "nor with a single crop of half the edges: choose a smaller network"),
    ],
)
def test_what_would_fit_the_memory_is_tried(edge, advice, tmp_path):
    data, given = [{"image": torch.ones(1, edge, edge, edge)}] * 80, settings(crop=edge, batch_size=4)
    with pytest.raises(
        UserError, match=f"does not fit the memory of cpu with crops of {edge}x.*, 4 a step, in fp32.*{advice}"
    ):
        train(plan(given), Hungry(), data, tmp_path / "history.jsonl", new_accelerator())


def test_micro_batches_are_no_advice_for_batch_norm(tmp_path):
    module, data = Hungry(), [{"image": torch.ones(1, 7, 7, 7)}] * 80
    module.norm = nn.BatchNorm3d(1, affine=False)
    with pytest.raises(UserError, match=r"found to fit: --set pretrain.batch_size=2"):
        train(plan(settings(crop=7, batch_size=4)), module, data, tmp_path / "history.jsonl", new_accelerator())


def unet(first=4):
    return UNet(UNet.Config(features=(first, 4, 8, 8, 16)), in_channels=1)


def test_transfer_reports_every_tensor():
    source, target = unet(), unet()
    weights = source.part_weights(("encoder", "decoder"))
    report = transfer(target, weights)
    assert (len(report.loaded), report.skipped, report.reinitialised) == (len(weights), [], [])
    assert report.encoder_fraction == 1
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_transfer_of_a_part_and_of_other_shapes_says_so():
    encoder = unet().part_weights(("encoder",))
    report = transfer(unet(), encoder)
    assert report.encoder_fraction == 1
    assert all(key.startswith("upcat") for key in report.reinitialised)
    other = transfer(unet(first=8), encoder | {"foreign.weight": torch.zeros(1)})
    assert "foreign.weight" in other.skipped
    assert "conv_0.conv_0.conv.weight" in other.skipped
    assert 0 < other.encoder_fraction < 1


def test_epochs_become_steps_and_a_long_warm_up_is_refused():
    assert settings(steps=None, epochs=3, warmup_epochs=1).schedule(num_cases=9) == (15, 5)
    with pytest.raises(UserError, match="does not fit"):
        settings(warmup_epochs=50).schedule(num_cases=9)


def resolved(registry, preset="demo", task="brats", **overrides):
    pairs = tuple(f"{key.replace('__', '.')}={value}" for key, value in overrides.items())
    return resolve(Request(method="hybridmim", task=task, preset=preset, settings=pairs), registry, registry.task(task))


def test_presets_are_layered_and_overridden(registry):
    config = resolved(registry, pretrain__crop="64", method__region="none", backbone__features="8,8,8,8,8")
    assert config.pretrain.crop == (64, 64, 64)
    assert config.method_settings.region is None
    assert config.backbone_settings.features == (8,) * 5
    assert resolved(registry, finetune__epochs="2").finetune.steps is None


def test_paper_preset_is_section_4(registry):
    config = resolved(registry, "paper")
    assert (config.pretrain.steps, config.pretrain.crop, config.pretrain.batch_size) == (100_000, (128,) * 3, 2)
    assert (config.pretrain.lr, config.pretrain.weight_decay, config.pretrain.warmup_epochs) == (1e-4, 1e-5, 50)
    assert (config.finetune.epochs, config.finetune.lr) == (300, 1e-4)
    hybrid = config.method_settings
    assert (hybrid.mask_ratio, hybrid.sub_volume, hybrid.patch) == (0.4, (32,) * 3, (16,) * 3)
    weights = (hybrid.reconstruction, hybrid.number, hybrid.location, hybrid.consistency, hybrid.contrastive)
    assert weights == (1, 0.1, 0.1, 0.01, 0.1)
    assert config.backbone_settings.features == (64, 64, 128, 256, 512)


def test_a_method_cannot_change_the_fine_tuning(registry, monkeypatch):
    monkeypatch.setattr(registry.load("method", "hybridmim"), "presets", {"demo": {"finetune.lr": 1.0}})
    with pytest.raises(UserError, match="may set method, pretrain only"):
        resolved(registry)


def test_configuration_is_frozen(registry):
    with pytest.raises(ValueError, match="frozen"):
        resolved(registry).seed = 3
