"""A finished stage is believed only as long as its files are as they were written."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from harness import UserError
from harness.data.inventory import digest_cases
from harness.data.volumes import preprocess_cases
from harness.system.files import digest_file
from harness.training.checkpoints import Checkpoints
from harness.training.stage_files import PROBE, assert_unchanged, final_soft_dice, read_stage, write_weights


@pytest.fixture
def stage(tmp_path):
    weights = tmp_path / "weights.safetensors"
    write_weights({"a.weight": torch.arange(6.0).view(2, 3), "n": torch.tensor(4)}, weights)
    path = tmp_path / "stage.json"
    path.write_text(json.dumps({"weights": digest_file(weights), "seconds": 1.5}))
    return path


def test_weights_come_back_as_they_were_laid_out_however_they_lay(tmp_path):
    wide = torch.randn(2, 3, 4, 4, 4, requires_grad=True)
    given = {"last": wide.to(memory_format=torch.channels_last_3d), "view": wide[:, 1:2].mT, "half": wide.bfloat16()}
    write_weights(given, tmp_path / "new" / "w.safetensors")
    found = load_file(tmp_path / "new" / "w.safetensors")
    assert all(torch.equal(found[name], value) for name, value in given.items())
    assert set(found) == set(given)
    assert found["half"].dtype == torch.bfloat16


def test_a_whole_stage_says_what_it_said(stage):
    assert read_stage(stage)["seconds"] == 1.5


@pytest.mark.parametrize(
    "damage",
    [
        lambda stage: stage.unlink(),
        lambda stage: stage.write_text("{"),
        lambda stage: stage.write_text("[1]"),
        lambda stage: stage.write_text('{"seconds": 1.5}'),
        lambda stage: stage.with_name("weights.safetensors").unlink(),
        lambda stage: stage.with_name("weights.safetensors").write_bytes(b""),
        lambda stage: write_weights({"a": torch.zeros(1)}, stage.with_name("weights.safetensors")),
    ],
)
def test_a_damaged_stage_is_none(stage, damage):
    damage(stage)
    assert read_stage(stage) is None


def test_what_was_trained_on_volumes_that_changed_is_dropped(registry, hippocampus_phantom, tmp_path):
    task = registry.task("msd_hippocampus")
    cases = replace(task, test_ids=None).cases(hippocampus_phantom)
    volumes = preprocess_cases(task, cases, digest_cases(cases, tmp_path)[0], tmp_path / "cache")
    kept = Checkpoints(tmp_path / "run" / "checkpoints", 0)
    kept.save(1, {"step": 1})
    (tmp_path / "run" / PROBE).write_text("{}")
    assert_unchanged(volumes, tmp_path / "run")
    assert len(kept.all()) == 1
    path = next(volumes[1].stem.parent.glob(f"{volumes[1].stem.name}.image.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="1 prepared volumes were changed or removed") as error:
        assert_unchanged(volumes, tmp_path / "run")
    assert volumes[1].stem.name in str(error.value)
    assert kept.all() == []
    assert not (tmp_path / "run" / PROBE).exists()


def history_of(path, losses):
    """Steps of fine-tuning with these Dice losses; None is a step that was left out, as the loop writes it."""
    lines = [{"stage": "pretrain", "step": 1, "terms": {"restoration": 9.0}}]
    for step, loss in enumerate(losses, 1):
        terms = {} if loss is None else {"dice": loss, "cross_entropy": 1.0}
        lines.append({"stage": "finetune", "step": step, "terms": terms} | ({"skipped": True} if loss is None else {}))
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return path


@pytest.mark.parametrize(
    ("losses", "soft"),
    [([0.5] * 18 + [0.2, 0.4], 0.7), ([0.3], 0.7), ([0.5] * 18 + [None, 0.4], 0.6), ([None, None], None), ([], None)],
)
def test_soft_dice_is_that_of_the_last_tenth_without_steps_that_were_left_out(tmp_path, losses, soft):
    assert final_soft_dice(history_of(tmp_path / "history.jsonl", losses)) == (soft and pytest.approx(soft))
