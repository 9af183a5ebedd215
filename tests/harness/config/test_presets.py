"""The shipped presets are whole, fit every task and method, and are not changed by whoever reads them."""

import tomllib

import pytest

from harness import UserError
from harness.config.presets import preset_names, read_preset
from harness.config.request import Request
from harness.config.resolve import change_task, resolve
from harness.system.files import ENGINE

TASKS = ("msd_hippocampus", "brats", "msd_spleen")


def test_every_file_is_a_preset_and_every_preset_a_file():
    files = {path.stem: tomllib.loads(path.read_text()) for path in (ENGINE / "config" / "presets").glob("*.toml")}
    assert preset_names() == sorted(files)
    assert {"demo", "small", "paper"} <= set(files)
    for name, content in files.items():
        assert read_preset(name) == content
        assert isinstance(content["description"], str)
        assert set(content) - {"description", "extends", "shots"} <= {
            "method",
            "backbone",
            "pretrain",
            "finetune",
            "evaluate",
            "task",
        }


@pytest.mark.parametrize("preset", ["demo", "fewshot", "small", "paper", "nnunet"])
def test_a_preset_and_what_plugins_lay_over_it_is_a_whole_configuration(preset, registry, tmp_path):
    (tmp_path / "weights.safetensors").touch()
    for task in TASKS:
        for method in registry.names("method"):
            settings = (f"method.weights={tmp_path}/weights.safetensors",) if method == "official" else ()
            request = Request(method=method, task=task, preset=preset, settings=settings)
            config = resolve(request, registry, registry.task(task))
            for stage in (config.pretrain, config.finetune):
                steps, warmup = stage.schedule(num_cases=100)
                assert steps > warmup >= 0


@pytest.mark.parametrize("task", ["msd_hippocampus", "msd_spleen"])
def test_a_preset_that_extends_another_has_its_values_where_it_has_none(task, registry):
    """The spleen sets few steps in `demo`; four labelled cases are fine-tuned until they converge all the same."""
    demo, few = (
        resolve(Request(method="simclr", task=task, preset=preset), registry, registry.task(task))
        for preset in ("demo", "fewshot")
    )
    assert (few.finetune.steps, few.finetune.lr, few.finetune.warmup_steps) == (1000, 1e-3, 50)
    assert few.pretrain == demo.pretrain
    assert few.pretrain.batch_size == 4  # simclr's own, in `demo`
    assert few.backbone_settings == demo.backbone_settings
    assert few.finetune.crop == demo.finetune.crop


def test_who_asks_for_other_settings_changes_no_preset(registry):
    before = resolve(Request(method="mae", task="brats"), registry, registry.task("brats"))
    changed = Request(method="mae", task="brats", settings=("pretrain.steps=1", "pretrain.warmup_steps=0"))
    assert resolve(changed, registry, registry.task("brats")).pretrain.steps == 1
    assert resolve(Request(method="mae", task="brats"), registry, registry.task("brats")) == before


@pytest.mark.parametrize(
    ("name", "says"),
    [("papper", "did you mean 'paper'"), ("../presets/demo", "did you mean|known: demo"), ("", "known: demo")],
)
def test_an_unknown_preset_is_refused_with_near_matches(name, says):
    with pytest.raises(UserError, match=says):
        read_preset(name)


def test_nnunet_sets_zscores_unless_the_user_says_otherwise(registry):
    """The task's normalisation is one of the values of a preset, and a window of the user's takes its place."""
    task = registry.task("msd_spleen")
    kinds = [
        type(change_task(task, preset, overrides).normalisation).__name__
        for preset, overrides in (
            ("demo", {}),
            ("nnunet", {}),
            ("nnunet", {"task.normalisation": "none"}),
            ("nnunet", {"task.window": "-100,200"}),
        )
    ]
    assert kinds == ["Window", "ZScore", "Window", "Window"]


def test_nnunet_supervises_all_levels_of_the_networks_that_can(registry):
    supervised = {
        name: getattr(
            resolve(
                Request(method="scratch", backbone=name, task="msd_spleen", preset="nnunet"),
                registry,
                registry.task("msd_spleen"),
            ).backbone_settings,
            "deep_supervision",
            None,
        )
        for name in ("resenc", "plainunet", "unet")
    }
    assert supervised == {"resenc": True, "plainunet": True, "unet": None}


def test_nnunet_is_nnunets_recipe(registry):
    """The numbers of nnUNetTrainer 2.8.1."""
    config = resolve(
        Request(method="scratch", backbone="resenc", task="msd_spleen", preset="nnunet"),
        registry,
        registry.task("brats"),
    )
    tuned = config.finetune
    assert (tuned.optimizer, tuned.momentum, tuned.lr, tuned.weight_decay) == ("sgd", 0.99, 1e-2, 3e-5)
    assert (tuned.lr_schedule, tuned.steps, tuned.warmup_steps, tuned.clip_norm) == ("poly", 1000 * 250, 0, 12)
    assert (tuned.foreground, tuned.exact_foreground, tuned.flip, tuned.nnunet_augmentation) == (0.33, True, 0.5, 1)
    assert (tuned.rotate, tuned.scale, tuned.shift) == (0, 0, 0)  # the paper's, which nnU-Net does not have
    assert (tuned.dice_per_sample, tuned.dice_background) == (True, False)
    assert (config.evaluate.overlap, config.evaluate.mirror) == (0.5, True)
