"""`harness estimate`: near what the run takes, and refused in a line."""

import json

import pytest

from harness.cli import estimate
from harness.cli.main import main
from harness.costs.trial import OUT_OF_MEMORY
from tests.conftest import TINY, TINY_BUDGET

pytestmark = pytest.mark.usefixtures("quick_steps")


@pytest.mark.slow
def test_estimate_says_what_a_run_takes(tmp_path, capsys, hippocampus_phantom):
    """Against the run itself: the same stages, within what two busy cores vary; then it is finished, and costs nothing."""
    runs = tmp_path / "runs"
    settings = [word for pair in (*TINY["unet"], *TINY_BUDGET, "pretrain.steps=30") for word in ("--set", pair)]
    common = ["--method", "hybridmim", "--task", "msd_hippocampus", *settings]
    common += ["--data", str(hippocampus_phantom), "--runs", str(runs)]
    assert main(["estimate", *common, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == {"prepare", "pretrain", "method_prepare", "finetune", "evaluate"}
    assert not list(runs.glob("*/record.json"))
    assert main(["run", *common, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert 0.2 < found["seconds"]["pretrain"] / record["timing"]["seconds"]["pretrain"] < 5
    weights = next(runs.glob("msd_*/weights.safetensors")).stat().st_size
    assert found["disk"] > weights
    assert main(["estimate", *common]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "hybridmim"], "needs --method and --task"),
        (["--sweep", "x.toml", "--method", "m"], "leave out"),
        (["--method", "hybridmimm", "--task", "brats"], "hybridmim"),
        (["--sweep", "none.toml"], "cannot be read"),
    ],
)
def test_estimate_refuses_in_one_line(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *given]) == 2
    assert said in capsys.readouterr().err


def test_estimate_of_what_does_not_fit_says_so_in_json_too(tmp_path, capsys, monkeypatch, hippocampus_phantom):
    monkeypatch.setattr(
        "harness.costs.estimate.measure_in_new_process", lambda each: setattr(each, "problem", OUT_OF_MEMORY)
    )
    settings = [word for pair in (*TINY["unet"], *TINY_BUDGET) for word in ("--set", pair)]
    words = [
        "estimate",
        "--method",
        "simmim",
        "--task",
        "msd_hippocampus",
        "--data",
        str(hippocampus_phantom),
        *settings,
    ]
    words += ["--runs", str(tmp_path)]
    assert main([*words, "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)
    assert found["problem"] == "finetune: out of memory"
    assert main(words) == 2
    assert "out of memory" in capsys.readouterr().out


@pytest.mark.parametrize(("more", "preset"), [([], "paper"), (["--preset", "demo"], "demo")])
def test_a_preset_replaces_those_of_a_sweep(more, preset, tmp_path, monkeypatch):
    path, presets = tmp_path / "s.toml", []
    path.write_text('[[matrix]]\nmethod = "scratch"\ntask = "brats"\npreset = "paper"\n')
    monkeypatch.setattr(
        estimate, "print_estimates", lambda requests, *rest, **named: presets.extend(r.preset for r in requests) or 0
    )
    assert main(["estimate", "--sweep", str(path), *more]) == 0
    assert presets == [preset]
