"""A finished run's weights elsewhere: the same outputs, and a card that says what a user must know."""

import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
import torch

from harness.api.registry import Registry
from harness.cli.main import main
from harness.runs.reproduce import compare
from harness.runs.restore import read_run, restore
from tests.harness.commands import SMALL, folder_of, harness, make_run, short_run

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


@pytest.mark.parametrize(
    "backbone", ["unet", *(pytest.param(each, marks=pytest.mark.slow) for each in SMALL if each != "unet")]
)
def test_monai_alone_gives_the_same_output(backbone, hippocampus_phantom, tmp_path):
    folder = make_run(tmp_path / "runs", hippocampus_phantom, "scratch", backbone)
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


def test_onnx_gives_the_same_output(predicted_runs, tmp_path):
    import onnxruntime

    folder = folder_of(predicted_runs, "simmim")
    out = tmp_path / "graph"
    assert (
        main(["export", "--run", folder.name, "--format", "onnx", "--out", str(out), "--runs", str(predicted_runs)])
        == 0
    )
    image = torch.rand(3, 1, 32, 32, 64)
    session = onnxruntime.InferenceSession(out / "network.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"image": image.numpy()})
    network = restore(folder, read_run(folder), Registry()).network.cpu().eval()
    with torch.inference_mode():
        np.testing.assert_allclose(logits, network(image).numpy(), rtol=1e-3, atol=1e-4)


# The script of the export, in a process that cannot import the harness.
BLIND = """
import runpy, sys
sys.modules |= dict.fromkeys(["harness", "backbones", "methods", "tasks", "leaderboards"])
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def turned(path, folder):
    """The same image with its axes in another order and direction, as its affine says."""
    image = nib.load(path)
    nib.save(image.as_reoriented(np.array([[1, -1], [2, 1], [0, -1]])), folder / "turned.nii.gz")
    return folder / "turned.nii.gz"


@pytest.mark.parametrize(
    ("task", "kind", "more"),
    [
        ("msd_hippocampus", "monai", ["task.spacing=1.2,0.9,1.1", "task.normalisation=zscore", "evaluate.mirror=true"]),
        pytest.param("btcv", "onnx", [], marks=pytest.mark.slow),
        pytest.param("btcv", "monai", [], marks=pytest.mark.slow),
        pytest.param("brats", "monai", [], marks=pytest.mark.slow),
        pytest.param("btcv", "monai", ["task.normalisation=zscore"], marks=pytest.mark.slow),
        pytest.param("msd_hippocampus", "onnx", ["task.spacing=1.2,0.9,1.1"], marks=pytest.mark.slow),
    ],
)
def test_the_card_alone_gives_the_same_prediction(task, kind, more, data_folders, tmp_path):
    """Percentiles, a window, z-scores, resampled or not, mirrored, softmax or masks, a turned array, four channels."""
    runs, out = tmp_path / "runs", tmp_path / "export"
    settings = [word for each in ["finetune.lr=0.01", *more] for word in ("--set", each)]
    harness(*short_run("scratch", data_folders / task, task), *settings, "--runs", runs)
    folder = folder_of(runs, "scratch")
    case = Registry().task(task).cases(data_folders / task)[0]
    images = [turned(case.images[0], tmp_path)] if len(case.images) == 1 else case.images
    harness("predict", "--run", folder, *images, tmp_path / "ours.nii.gz")
    harness("export", "--run", folder, "--format", kind, "--out", out)
    words = [sys.executable, "-c", BLIND, out / "predict.py", *images, tmp_path / "theirs.nii.gz"]
    subprocess.run([str(word) for word in words], check=True, cwd=tmp_path)
    ours, theirs = (nib.load(tmp_path / f"{name}.nii.gz") for name in ("ours", "theirs"))
    assert np.allclose(ours.affine, theirs.affine)
    first, second = (np.asarray(image.dataobj) for image in (ours, theirs))
    assert len(np.unique(first)) > 1
    # The last bit of a resampled probability decides between equal ones, in a voxel or two.
    assert np.count_nonzero(first != second) <= 1e-4 * first.size


def test_the_card_has_every_number_of_the_pipeline(data_folders, corpus_runs, tmp_path):
    folder = folder_of(corpus_runs, "scratch")
    harness("export", "--run", folder, "--format", "monai", "--out", tmp_path / "out")
    card, steps = (
        (tmp_path / "out" / "README.md").read_text(),
        json.loads((tmp_path / "out" / "pipeline.json").read_text()),
    )
    record = read_run(folder)
    assert steps["spacing"] == record["config"]["prepared"]["spacing"]
    assert steps["windows"]["overlap"] == record["config"]["evaluate"]["overlap"]
    for number in (*steps["spacing"], *steps["windows"]["extent"], steps["windows"]["overlap"], steps["steps"]):
        assert str(number) in card
    for said in (
        "RAS+",
        "other than 0",
        "percentiles 0.5 and 99.5",
        "anterior = 1, posterior = 2",
        "python predict.py",
    ):
        assert said in card


def test_the_card_says_what_a_user_must_know(predicted_runs, tmp_path):
    folder = folder_of(predicted_runs, "simmim")
    out = tmp_path / "weights"
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(out)]) == 0
    card = (out / "README.md").read_text()
    record = json.loads((folder / "record.json").read_text())
    for said in ("Not a medical device", "CC-BY-SA 4.0", "phantom", "empty-is-worst-v1", "Softmax: background first"):
        assert said in card
    assert f"{record['metrics']['average']['dice']:.4f}" in card
    assert "harness run --method official" in card


def test_export_refuses_in_words(predicted_runs, tmp_path, capsys):
    folder = folder_of(predicted_runs, "scratch")
    assert main(["export", "--run", str(folder), "--format", "monai", "--out", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["export", "--run", str(folder), "--format", "pickle"]) == 2
    assert "unknown value of --format 'pickle'" in capsys.readouterr().err


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
def test_export_believes_no_record(field, predicted_runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(folder_of(predicted_runs, "scratch"), folder)
    record = json.loads((folder / "record.json").read_text())
    FOREIGN[field](record)
    (folder / "record.json").write_text(json.dumps(record))
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert field.rpartition(" ")[2] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_a_record_need_not_state_is_not_needed(predicted_runs, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(folder_of(predicted_runs, "scratch"), folder)
    record = json.loads((folder / "record.json").read_text())
    record["metrics"] = {name: {} for name in record["metrics"] if name != "average"}
    record["data"] |= {"pretrain": None, "corpora": [{"name": "a", "fingerprint": "f"}]}
    (folder / "record.json").write_text(json.dumps(record))
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 0
    assert "| - | - |" in (tmp_path / "out" / "README.md").read_text()
    assert "a (licence unknown)" in (tmp_path / "out" / "README.md").read_text()
    said = compare(record, tmp_path / "none.csv", record, folder / "cases.csv")
    assert said == "average Dice there not stated, here not stated"


def test_a_network_that_monai_lacks_is_not_exported_as_monais(hippocampus_phantom, tmp_path, capsys):
    folder = make_run(tmp_path / "runs", hippocampus_phantom, "scratch", "unet", "--protocol", "linear")
    assert main(["export", "--run", str(folder), "--format", "monai", "--out", str(tmp_path / "out")]) == 2
    assert "MONAI has no network for 'unet' under protocol 'linear'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
