"""The shipped presets are whole, fit every task and method, and are not changed by whoever reads them."""

import tomllib

import pytest

from harness import UserError
from harness.config.presets import preset_names, read_preset
from harness.config.request import Request
from harness.config.resolve import resolve
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
        }


@pytest.mark.parametrize("preset", ["demo", "fewshot", "small", "paper"])
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
