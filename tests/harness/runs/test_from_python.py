"""`harness.run`: the same run as the command's, and wrong arguments in words."""

import json
from pathlib import Path

import pytest

import harness
import leaderboards
from harness import UserError
from tests.harness.commands import BUDGET, SMALL, folder_of, make_run

SETTINGS = dict(word.split("=") for word in [*BUDGET, *SMALL["unet"]] if word != "--set")


def test_it_is_the_commands_run(hippocampus_phantom, tmp_path):
    folder = make_run(tmp_path, hippocampus_phantom)
    result = harness.run("scratch", "msd_hippocampus", data=hippocampus_phantom, runs=tmp_path, settings=SETTINGS)
    assert result.again
    assert result.folder == folder == folder_of(tmp_path, "scratch")
    assert result.metrics == json.loads((folder / "record.json").read_text())["metrics"]
    cases = leaderboards.load(result.folder).cases()
    assert cases.groupby("target")["dice"].mean().mean() == pytest.approx(result.metrics["average"]["dice"])


def test_settings_may_be_values_and_the_environment_gives_data_and_runs(hippocampus_phantom, tmp_path, monkeypatch):
    monkeypatch.setenv("HARNESS_DATA", str(hippocampus_phantom))
    monkeypatch.setenv("HARNESS_RUNS", str(tmp_path))
    settings = SETTINGS | {"finetune.steps": 2, "finetune.crop": [32, 32, 64], "backbone.features": (4, 4, 8, 8, 8)}
    result = harness.run("scratch", "msd_hippocampus", settings=settings, seed=3, label_fraction=0.5)
    assert not result.again
    assert result.folder.parent == tmp_path
    assert (result.record["seed"], result.record["label_fraction"]) == (3, 0.5)
    assert result.record["overrides"]["finetune.crop"] == "32,32,64"
    assert result.record["config"]["backbone_settings"]["features"] == [4, 4, 8, 8, 8]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sed": 1}, "unknown argument of harness.run 'sed': did you mean 'seed'?"),
        ({"until": "pretrain"}, "unknown argument of harness.run 'until'"),
        ({"seed": 0.5}, "seed=0.5 is not a whole number"),
        ({"seed": "one"}, "is not a whole number"),
        ({"seed": True}, "seed=True is not a whole number"),
        ({"label_fraction": 2}, "is not a share of the labels"),
        ({"protocol": "probe"}, "value of --protocol"),
        ({"data": Path("/nowhere")}, "/nowhere"),
        ({"settings": {"finetune.lrr": 1}}, "did you mean"),
    ],
    ids=str,
)
def test_wrong_arguments_are_answered_in_words(arguments, says, tmp_path):
    with pytest.raises(UserError, match=says.replace("?", r"\?")):
        harness.run("scratch", "msd_hippocampus", **({"data": "phantom", "runs": tmp_path} | arguments))
