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
from harness.system.files import digest_file
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


def with_settings(config, **changed):
    return config.model_copy(update={"finetune": config.finetune.model_copy(update=changed)})


def test_the_share_of_crops_around_a_labelled_voxel_is_the_settings(stage):
    """Crops of 16 of 36 voxels: their middle is labelled if they are centred, unless the border is too near."""
    config, _, task, volumes = stage
    labelled = {}
    for share in (0.0, 0.5, 1.0):
        changed = with_settings(config, crop=(16, 16, 16), foreground=share, flip=0, rotate=0)
        data = finetune_data(changed, task, volumes, 300, seed=3)
        labelled[share] = np.mean([data[index]["target"][0, 8, 8, 8] > 0 for index in range(300)])
    assert labelled[1.0] > 0.9
    assert labelled[0.0] < 0.7 * labelled[1.0]
    assert labelled[0.5] == pytest.approx((labelled[0.0] + labelled[1.0]) / 2, abs=0.1)


def test_crops_are_augmented_as_the_settings_say(stage):
    config, _, task, volumes = stage
    off = {"crop": (16, 16, 16), "flip": 0, "rotate": 0, "scale": 0, "shift": 0}
    plain, flipped, shifted = (
        finetune_data(with_settings(config, **off | more), task, volumes, 6, seed=3)
        for more in ({}, {"flip": 1}, {"shift": 1})
    )
    for index in range(6):
        before, turned, brighter = plain[index], flipped[index], shifted[index]
        for name in ("image", "target"):
            assert np.array_equal(turned[name], np.flip(before[name], (1, 2, 3)))
        assert np.ptp(brighter["image"] - before["image"]) < 1e-6
        assert not np.array_equal(brighter["image"], before["image"])


def test_exactly_the_last_crops_of_each_batch_are_centred_if_the_settings_say_so(stage):
    config, _, task, volumes = stage
    changed = with_settings(
        config, crop=(16, 16, 16), foreground=0.33, exact_foreground=True, batch_size=2, flip=0, rotate=0
    )
    data = finetune_data(changed, task, volumes, 200, seed=3)
    middle = np.array([data[index]["target"][0, 8, 8, 8] > 0 for index in range(200)])
    assert middle[1::2].mean() > 0.9
    assert middle[::2].mean() < 0.7 * middle[1::2].mean()


def test_nnunets_augmentation_warps_crops_and_changes_intensities(stage):
    """Targets that differ from the plain ones were warped; images of the others differ by their intensities alone."""
    config, _, task, volumes = stage
    off = {"crop": (16, 16, 16), "flip": 0, "rotate": 0, "scale": 0, "shift": 0, "foreground": 1.0}
    plain = finetune_data(with_settings(config, **off), task, volumes, 120, seed=3)
    changed = finetune_data(with_settings(config, **off, nnunet_augmentation=1.0), task, volumes, 120, seed=3)
    images, targets = ([changed[index][name] for index in range(120)] for name in ("image", "target"))
    assert all(image.shape == (1, 16, 16, 16) and image.dtype == np.float32 for image in images)
    assert all(target.shape == (1, 16, 16, 16) for target in targets)
    # About one crop of three is warped; where a crop is drawn from does not depend on it, but the draws before it do.
    contrast = [np.ptp(image) for image in images]
    assert np.std(contrast) > 2 * np.std([np.ptp(plain[index]["image"]) for index in range(120)])
    sizes = np.array([np.count_nonzero(target) for target in targets])
    before = np.array([np.count_nonzero(plain[index]["target"]) for index in range(120)])
    assert sizes.min() < 0.7 * before.min()  # objects become smaller, which no flip does


def test_the_result_depends_on_the_seed_and_not_on_what_ran_before(stage, tmp_path, monkeypatch):
    """Otherwise `scratch` would not be a matched control."""
    config, plugins, task, volumes = stage
    finals, crops = [], []

    def keep(*arguments):
        data = finetune_data(*arguments)
        crops.append(data[0]["image"])
        return data

    monkeypatch.setattr("harness.training.finetune.finetune_data", keep)
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(100 + number)
        folder = tmp_path / str(number)
        folder.mkdir()
        seeded = config.model_copy(update={"seed": seed})
        finetune(seeded, plugins, task, volumes, {}, folder, StageContext())
        finals.append(load_file(folder / "weights.safetensors"))
    assert all(torch.equal(finals[0][key], finals[1][key]) for key in finals[0])
    assert not all(torch.equal(finals[0][key], finals[2][key]) for key in finals[0])
    assert np.array_equal(crops[0], crops[1])
    assert not np.array_equal(crops[0], crops[2])


@pytest.mark.parametrize("protocol", ["finetune", "frozen"])
def test_training_changes_what_the_protocol_leaves_to_it(protocol, stage, tmp_path):
    config, plugins, task, volumes = stage
    config = with_settings(config.model_copy(update={"protocol": protocol}), lr=0.01)
    torch.manual_seed(7)
    pretrained = plugins.new_backbone(config, 1).part_weights(("encoder", "decoder"))
    finetune(config, plugins, task, volumes, pretrained, tmp_path, StageContext())
    final = load_file(tmp_path / "weights.safetensors")
    backbone = plugins.new_backbone(config, 1)
    changed = {backbone.part_of(key) for key in pretrained if not torch.equal(final[key], pretrained[key])}
    assert changed == ({"decoder"} if protocol == "frozen" else {"encoder", "decoder"})
    report = json.loads((tmp_path / "finetune.json").read_text())
    frozen = report["transfer"]["frozen"]
    number = sum(backbone.part_of(key) == "encoder" for key in pretrained)
    assert (frozen is None) if protocol == "finetune" else (frozen["tensors"] == number)
    assert report["weights"] == digest_file(tmp_path / "weights.safetensors")
    assert report["trained"]["steps"] == 2


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
