"""Our weights in the real nnU-Net: it loads them, computes what we compute, and trains.

nnU-Net needs other versions of some packages, so it has an environment of its own:

    python -m venv nnunet && nnunet/bin/pip install nnunetv2==2.8.1
    HARNESS_NNUNET_PYTHON=nnunet/bin/python pytest -m nnunet

Fine-tuning from nnssl's files is on nnU-Net's main branch only. Those tests skip with the released 2.8.1, and run
where a clone of the main branch is installed instead (`nnunet/bin/pip install ./nnUNet`).
"""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from harness.api.registry import Registry
from harness.api.settings import build
from tests.harness.commands import folder_of, harness, short_run
from tests.harness.nnunet import nnunet

PYTHON = "HARNESS_NNUNET_PYTHON"
HAS_FINETUNING = "import importlib.util as u; print(u.find_spec('nnunetv2.experiment_planning.like_nnssl') is not None)"
SIZES = {"resenc": ["features=4,8,8,8", "blocks=1,2,1,1", "kernels=3,3,1;3;3;3"], "plainunet": ["features=4,8,8,8"]}


@pytest.mark.nnunet
@pytest.mark.timeout(900)
@pytest.mark.parametrize("form", ["nnunet", "nnssl"])
@pytest.mark.parametrize("backbone", SIZES)
def test_nnunet_trains_from_our_weights(backbone, form, sixteen_cases, tmp_path):
    python = os.environ.get(PYTHON)
    if not python:
        pytest.skip(f"set {PYTHON} to the Python of an environment with nnunetv2")
    if form == "nnssl" and subprocess.check_output([python, "-c", HAS_FINETUNING], text=True).strip() == "False":
        pytest.skip("this nnunetv2 does not fine-tune from nnssl's files: its main branch does")
    runs, out, work = tmp_path / "runs", tmp_path / "out", tmp_path / "work"
    words = [*short_run("hybridmim", sixteen_cases)[:-2], "--runs", runs, "--set", "task.normalisation=zscore"]
    words[words.index("unet")] = backbone
    for setting in SIZES[backbone]:
        words += ["--set", f"backbone.{setting}"]
    harness(*words)
    harness("export", "--run", folder_of(runs, "hybridmim"), "--format", form, "--out", out)
    names = [case.id for case in Registry().task("msd_hippocampus").cases(sixteen_cases)]
    raw = nnunet(sixteen_cases, tmp_path / "raw", names)
    script = Path(__file__).with_name("two_epochs.py")
    command = [python, str(script), form, str(out / "checkpoint_final.pth"), str(raw), str(work)]
    subprocess.run(command, check=True, cwd=tmp_path, timeout=800)
    losses = json.loads((work / "losses.json").read_text())
    assert len(losses) == 2
    assert all(map(math.isfinite, losses))
    config = json.loads((folder_of(runs, "hybridmim") / "record.json").read_text())["config"]
    cls = Registry().load("backbone", backbone)
    ours = cls(build(cls.Config, config["backbone_settings"], "backbone"), 1)
    (pretrained,) = runs.glob("cache/pretrain/*/weights.safetensors")
    ours.load_state_dict(load_file(pretrained))
    image, theirs = (torch.load(work / f"{name}.pt", weights_only=True) for name in ("image", "features"))
    for level, expected in zip(ours.eval().encode(image.permute(0, 1, 4, 3, 2)), theirs, strict=True):
        torch.testing.assert_close(level.permute(0, 1, 4, 3, 2), expected, rtol=1e-5, atol=1e-5)
