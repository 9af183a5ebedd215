"""From a request to one configuration."""

import pytest

from harness import UserError
from harness.config.request import Request
from harness.config.resolve import resolve


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
