"""Fine-tuning: what its crops are, and what it leaves in a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from harness import Task
from harness.config.request import Request
from harness.config.resolve import resolve
from harness.data.inventory import digest_cases
from harness.data.volumes import preprocess_cases
from harness.training.finetune import finetune, finetune_data
from harness.training.loop import StageContext
from harness.training.models import Plugins
from tests.conftest import TINY, TINY_BUDGET


@pytest.fixture
def stage(registry, hippocampus_phantom, tmp_path):
    """Configuration, plugins, task and preprocessed volumes of a short fine-tuning."""
    task: Task = registry.task("msd_hippocampus")
    cases = task.cases(hippocampus_phantom)
    digests, bad = digest_cases(cases, tmp_path / "cache")
    assert not bad
    volumes = preprocess_cases(task, cases, digests, tmp_path / "cache")
    settings = (*TINY["unet"], *TINY_BUDGET, "finetune.foreground=1")
    config = resolve(Request(method="scratch", task=task.name, settings=settings), registry, task)
    plugins = Plugins(registry.load("method", "scratch"), registry.load("backbone", "unet"))
    return config, plugins, task, volumes


def test_crops_are_labelled_the_same_for_one_seed_and_others_for_another(stage):
    config, _, task, volumes = stage
    first, again, other = (finetune_data(config, task, volumes, 8, seed) for seed in (1, 1, 2))
    assert len(first) == 8
    for index in range(8):
        sample = first[index]
        assert sample["image"].shape == (1, 32, 32, 32)
        # `finetune.foreground=1`: every crop is centred on a labelled voxel.
        assert sample["target"].max() > 0
        assert all(np.array_equal(sample[name], again[index][name]) for name in ("image", "target"))
    assert any(not np.array_equal(first[index]["image"], other[index]["image"]) for index in range(8))


def test_it_leaves_weights_history_and_a_report_and_starts_from_what_it_is_given(stage, tmp_path):
    config, plugins, task, volumes = stage
    torch.manual_seed(7)
    pretrained = plugins.new_backbone(config, 1).part_weights(("encoder",))
    finals = {}
    for name, weights in (("pretrained", pretrained), ("scratch", {})):
        folder: Path = tmp_path / name
        folder.mkdir()
        finetune(config, plugins, task, volumes, weights, folder, StageContext(), pretraining_history='{"step": 0}\n')
        lines = (folder / "history.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in lines] == [0, 1, 2]
        report = json.loads((folder / "finetune.json").read_text())
        assert report["trained"]["steps"] == 2
        finals[name] = load_file(folder / "weights.safetensors")
    reports = [json.loads((tmp_path / name / "finetune.json").read_text())["transfer"] for name in finals]
    assert reports[0]["loaded"] == len(pretrained)
    assert reports[1]["loaded"] == 0
    # Two steps at a small learning rate keep the weights near where they began.
    key = next(key for key, value in pretrained.items() if value.ndim == 5)
    near, far = ((finals[name][key] - pretrained[key]).abs().mean() for name in ("pretrained", "scratch"))
    assert near < 0.1 * far
