"""`harness list`: every plugin and preset, in words and as JSON."""

import json
from typing import get_args

import pytest

from harness.api.registry import PLURAL, Registry
from harness.cli.main import main
from harness.config.presets import preset_names
from harness.config.request import FinetuneProtocol
from harness.config.schema import Evaluate, Finetune, Pretrain, TaskSettings
from tests.harness.commands import fails, harness


def listed(capsys, *words):
    assert main(["list", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_everything_that_can_be_named_is_listed(capsys):
    rows, registry = listed(capsys), Registry()
    assert {kind: [row["name"] for row in rows[kind]] for kind in PLURAL.values()} == {
        many: registry.names(one) for one, many in PLURAL.items()
    }
    assert [row["name"] for row in rows["presets"]] == preset_names()


@pytest.mark.parametrize("kind", ["methods", "tasks", "presets"])
def test_one_kind_is_what_all_kinds_say_of_it(kind, capsys):
    assert listed(capsys, kind) == {kind: listed(capsys)[kind]}


def test_what_a_method_trains_is_said_even_where_it_is_nothing(capsys):
    assert main(["list", "methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    after = lines[next(n for n, line in enumerate(lines) if line.startswith("  scratch:")) :]
    assert "      trains: nothing" in after[:6]


def test_a_plugin_in_a_file_is_listed(tmp_path, capsys):
    path = tmp_path / "mine.py"
    path.write_text(
        'from harness import Method\n\n\nclass Mine(Method):\n    """A method of mine."""\n\n    name = \'mine\'\n'
    )
    (row,) = [row for row in listed(capsys, "methods", "--plugin", str(path))["methods"] if row["name"] == "mine"]
    assert (row["description"], row["origin"]) == ("A method of mine.", f"--plugin {path}")


def test_a_named_method_has_every_setting_with_its_source(capsys):
    (row,) = listed(capsys, "methods", "hybridmim")["methods"]
    rows = {each["setting"]: each for each in row["every_setting"]}
    assert rows["method.mask_ratio"] == {
        "setting": "method.mask_ratio",
        "default": "0.4",
        "allowed": "number (> 0, < 1)",
        "description": "share of patches masked; section IV-C",
    }
    assert rows["method.region"]["allowed"].endswith("or whole or none")
    assert main(["list", "methods", "hybridmim"]) == 0
    assert "method.mask_ratio = 0.4    [number (> 0, < 1)]" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["methods", "backbones", "tasks", "presets", "settings"])
def test_every_setting_that_is_listed_is_one_that_can_be_given(kind, capsys):
    registry = Registry()
    for name in {"methods": registry.names("method"), "backbones": registry.names("backbone")}.get(
        kind, [row["name"] for row in listed(capsys, kind)[kind]]
    ):
        (row,) = listed(capsys, kind, name)[kind]
        for each in row["every_setting"]:
            assert each["description"], each
            assert each["allowed"], each
            section, _, field = each["setting"].partition(".")
            classes = {"pretrain": Pretrain, "finetune": Finetune, "evaluate": Evaluate, "task": TaskSettings}
            owner = classes.get(section) or registry.load(section, name).Config
            assert field in owner.model_fields


def test_a_presets_values_stand_for_the_defaults(capsys):
    (row,) = listed(capsys, "presets", "demo")["presets"]
    rows = {each["setting"]: each["default"] for each in row["every_setting"]}
    assert rows["finetune.crop"] == "64,64,64"
    assert rows["finetune.lr"] == "0.003"
    (section,) = listed(capsys, "settings", "finetune")["settings"]
    assert {each["setting"]: each["default"] for each in section["every_setting"]}["finetune.crop"] == "by the preset"


def test_a_name_that_is_none_is_refused_with_near_ones(capsys):
    assert "unknown method 'hybridmm': did you mean 'hybridmim'" in fails(capsys, "list", "methods", "hybridmm")
    assert "unknown corpus 'flare'" in fails(capsys, "list", "corpora", "flare")
    assert "known: evaluate, finetune, pretrain, task" in fails(capsys, "list", "settings", "x")


def test_protocols_and_weights_are_listed_by_name(capsys):
    assert [row["name"] for row in listed(capsys, "protocols")["protocols"]] == list(get_args(FinetuneProtocol))
    assert listed(capsys, "protocols", "linear")["protocols"][0]["description"].startswith("one 1x1x1 convolution")
    weights = listed(capsys, "weights")["weights"][0]
    assert listed(capsys, "weights", weights["name"])["weights"] == [weights | {"every_setting": []}]


def test_one_of_a_kind_means_the_kind(capsys):
    harness("list", "suite")
    singular = capsys.readouterr().out
    harness("list", "suites")
    assert capsys.readouterr().out == singular
    assert "phantoms-v1" in singular
    harness("list", "method", "hybridmim")
    assert "method.mask_ratio" in capsys.readouterr().out
