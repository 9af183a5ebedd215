"""What a finished run is good for afterwards: reproduce, export, panels."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch

from harness.cli.main import main

BUDGET = [
    *("--set", "pretrain.steps=2", "--set", "pretrain.warmup_steps=0", "--set", "pretrain.crop=32,32,64"),
    *("--set", "finetune.steps=2", "--set", "finetune.warmup_steps=0", "--set", "finetune.crop=32,32,64"),
]
SMALL = {
    "unet": ["--set", "backbone.features=4,4,8,8,8"],
    "swinunetr": ["--set", "backbone.depths=1,1,1,1"],
    "segresnet": [],
    "unetr": ["--set", "backbone.image_size=32,32,64"],
}
# MONAI, torch and safetensors only: nothing of the harness.
ALONE = """
import json, sys, torch
from pathlib import Path
from monai.networks import nets
from safetensors.torch import load_file

place = Path(sys.argv[1])
described = json.loads((place / "network.json").read_text())
network = getattr(nets, described["class"].rpartition(".")[2])(**described["arguments"])
network.load_state_dict(load_file(place / "weights.safetensors"))
image = torch.load(sys.argv[2], weights_only=True)
with torch.inference_mode():
    torch.save(network.eval()(image), sys.argv[3])
assert not any(name.split(".")[0] in ("harness", "backbones", "methods") for name in sys.modules)
"""


def made(root, data, method="scratch", backbone="unet", *more):
    words = ["run", "--method", method, "--task", "msd_hippocampus", "--data", data, "--backbone", backbone]
    assert main([str(w) for w in [*words, *BUDGET, *SMALL[backbone], *more, "--runs", root]]) == 0
    (folder,) = (path.parent for path in root.glob(f"*-{method}-{backbone}-*/record.json"))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory, hippocampus_phantom):
    """Two runs that kept their predictions."""
    root = tmp_path_factory.mktemp("runs")
    for method in ("scratch", "simmim"):
        made(root, hippocampus_phantom, method, "unet", "--save-predictions")
    return root


def run_of(runs, method):
    return next(path.parent for path in runs.glob(f"*-{method}-*/record.json"))


@pytest.mark.parametrize("backbone", SMALL)
def test_monai_alone_gives_the_same_output(backbone, hippocampus_phantom, tmp_path):
    from harness.api.registry import Registry
    from harness.runs.restore import read_run, restore

    folder = made(tmp_path / "runs", hippocampus_phantom, "scratch", backbone)
    out = tmp_path / "export"
    words = ["export", "--run", folder.name, "--format", "monai", "--out", out, "--runs", tmp_path / "runs"]
    assert main([str(word) for word in words]) == 0
    image = torch.rand(1, 1, 32, 32, 64)
    torch.save(image, tmp_path / "image.pt")
    places = [str(tmp_path / "image.pt"), str(tmp_path / "output.pt")]
    subprocess.run([sys.executable, "-c", ALONE, str(out), *places], check=True, cwd=tmp_path)
    network = restore(folder, read_run(folder), Registry()).network.cpu().eval()
    with torch.inference_mode():
        torch.testing.assert_close(torch.load(places[1], weights_only=True), network(image), rtol=1e-4, atol=1e-5)


def test_onnx_gives_the_same_output(runs, tmp_path):
    import onnxruntime

    from harness.api.registry import Registry
    from harness.runs.restore import read_run, restore

    folder = run_of(runs, "simmim")
    out = tmp_path / "graph"
    assert main(["export", "--run", folder.name, "--format", "onnx", "--out", str(out), "--runs", str(runs)]) == 0
    image = torch.rand(3, 1, 32, 32, 64)
    session = onnxruntime.InferenceSession(out / "network.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": image.numpy()})
    network = restore(folder, read_run(folder), Registry()).network.cpu().eval()
    with torch.inference_mode():
        np.testing.assert_allclose(logits, network(image).numpy(), rtol=1e-3, atol=1e-4)


def test_the_card_says_what_a_user_must_know(runs, tmp_path):
    folder = run_of(runs, "simmim")
    out = tmp_path / "weights"
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    record = json.loads((folder / "record.json").read_text())
    for said in ("Not a medical device", "CC-BY-SA 4.0", "phantom", "empty-is-worst-v1", "softmax, background first"):
        assert said in card
    assert f"{record['metrics']['average']['dice']:.4f}" in card
    assert "harness run --method official" in card


def test_export_refuses_in_words(runs, tmp_path, capsys):
    folder = run_of(runs, "scratch")
    assert main(["export", "--run", str(folder), "--format", "monai", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", "--run", str(folder), "--format", "pickle"]) == 2
    assert "invalid choice: 'pickle'" in capsys.readouterr().err


FOREIGN = {
    "run_id": lambda r: r.update(run_id=None),
    "label_fraction": lambda r: r.pop("label_fraction"),
    "metrics": lambda r: r["metrics"].update(a=5),
    "no metrics": lambda r: r.pop("metrics"),
    "metrics.a.dice": lambda r: r["metrics"].update(a={"dice": "x"}),
    "data.corpora": lambda r: r["data"].update(corpora=[{}]),
    "config.finetune.crop": lambda r: r["config"]["finetune"].update(crop=32),
}


@pytest.mark.parametrize("field", FOREIGN)
def test_export_believes_no_record(field, runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run_of(runs, "scratch"), folder)
    record = json.loads((folder / "record.json").read_text())
    FOREIGN[field](record)
    (folder / "record.json").write_text(json.dumps(record))
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert field.rpartition(" ")[2] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_record_need_not_state_is_not_needed(runs, tmp_path, capsys):
    from harness.runs.reproduce import compare

    folder = tmp_path / "run"
    shutil.copytree(run_of(runs, "scratch"), folder)
    record = json.loads((folder / "record.json").read_text())
    record["metrics"] = {name: {} for name in record["metrics"] if name != "average"}
    record["data"] |= {"pretrain": None, "corpora": [{"name": "a", "fingerprint": "f"}]}
    (folder / "record.json").write_text(json.dumps(record))
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert "| - | - |" in (tmp_path / "out" / "README.md").read_text()
    assert "a (licence unknown)" in (tmp_path / "out" / "README.md").read_text()
    said = compare(record, tmp_path / "none.csv", record, folder / "cases.csv")
    assert said == "average Dice there not stated, here not stated"


def test_a_window_that_the_memory_does_not_hold_is_said(runs, hippocampus_phantom, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes")

    folder = run_of(runs, "scratch")
    monkeypatch.setattr("backbones.unet.UNet.forward", full)
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert "a window of 32 x 32 x 64 voxels, the training crop, does not fit the memory" in capsys.readouterr().err
    image = next((hippocampus_phantom / "imagesTr").iterdir())
    assert main(["predict", "--run", str(folder), str(image), str(tmp_path / "out.nii.gz")]) == 2
    assert "does not fit the memory" in capsys.readouterr().err


def test_a_network_that_monai_lacks_is_not_exported_as_monais(hippocampus_phantom, tmp_path, capsys):
    folder = made(tmp_path / "runs", hippocampus_phantom, "scratch", "unet", "--protocol", "linear")
    assert main(["export", "--run", str(folder), "--format", "monai", "--out", str(tmp_path / "out")]) == 2
    assert "MONAI has no network for 'unet' under protocol 'linear'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_reproduce_prints_the_command_and_what_differs(runs, hippocampus_phantom, tmp_path, capsys):
    folder = run_of(runs, "simmim")
    record = json.loads((folder / "record.json").read_text())
    record["environment"] |= {"torch": "1.0", "gpu": "another one"}
    (tmp_path / "record.json").write_text(json.dumps(record))
    assert main(["reproduce", str(tmp_path / "record.json"), "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "harness run --method simmim --backbone unet --task msd_hippocampus" in said
    assert "--set backbone.features=4,4,8,8,8" in said
    assert f"torch: there 1.0, here {torch.__version__}" in said
    assert "gpu: there another one, here" in said


def test_reproduce_go_makes_the_run_again_elsewhere(runs, tmp_path, capsys):
    """The folder's own run does not answer: it is made again elsewhere, on the phantom that it was made on."""
    folder = run_of(runs, "scratch")
    # The phantom of the test is no phantom of the command's own: its data is named.
    record = json.loads((folder / "record.json").read_text())
    assert record["data"]["source"] == "phantom"
    assert main(["reproduce", folder.name, "--runs", str(runs), "--into", str(tmp_path / "again"), "--go"]) == 0
    said = capsys.readouterr().out
    assert list((tmp_path / "again").glob("*/record.json"))
    # The command's own phantom is not the test's small one, and both are said.
    assert "data fingerprint: there" in said
    assert "average Dice there" in said


def test_reproduce_go_on_real_data_is_equal_to_the_last_digit(real_hippocampus, tmp_path, capsys):
    words = ["run", "--method", "scratch", "--task", "msd_hippocampus", "--data", str(real_hippocampus), *BUDGET]
    assert main([*words, *SMALL["unet"], "--label-fraction", "0.1", "--runs", str(tmp_path)]) == 0
    folder = run_of(tmp_path, "scratch")
    capsys.readouterr()
    words = ["reproduce", folder.name, "--runs", str(tmp_path), "--data", str(real_hippocampus), "--go"]
    assert main([*words, "--into", str(tmp_path / "again")]) == 0
    said = capsys.readouterr().out
    assert "every case has the same scores, to the last digit" in said
    assert "--label-fraction 0.1" in said


def test_reproduce_names_a_record_that_is_none(tmp_path, capsys):
    (tmp_path / "record.json").write_text("{}")
    assert main(["reproduce", str(tmp_path / "record.json")]) == 2
    assert "not a run record of schema 1" in capsys.readouterr().err


def test_panels_show_the_runs_side_by_side(runs, hippocampus_phantom, tmp_path, capsys):
    out = tmp_path / "panels.png"
    names = [run_of(runs, method).name for method in ("scratch", "simmim")]
    words = ["leaderboard", "panels", *names, "--runs", str(runs), "--data", str(hippocampus_phantom)]
    assert main([*words, "--out", str(out)]) == 0
    assert out.read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert said.count("hippocampus_") >= 1
    assert main([*words, "--out", str(out), "--case", "nobody"]) == 2
    assert "'nobody' is no test case" in capsys.readouterr().err
    assert main([*words, "--out", str(tmp_path / "panels.txt")]) == 2
    assert "written as .png or .svg" in capsys.readouterr().err


def test_panels_need_predictions(hippocampus_phantom, tmp_path, capsys):
    folder = made(tmp_path, hippocampus_phantom)
    words = ["leaderboard", "panels", folder.name, "--runs", str(tmp_path), "--data", str(hippocampus_phantom)]
    assert main([*words, "--out", str(tmp_path / "p.png")]) == 2
    assert "--save-predictions" in capsys.readouterr().err


def test_a_run_has_a_picture_of_what_its_method_sees(runs):
    assert (run_of(runs, "simmim") / "figures" / "restoration.png").read_bytes().startswith(b"\x89PNG")
    assert not (run_of(runs, "scratch") / "figures" / "restoration.png").exists()
