"""`harness run`, end to end on phantoms; what a run leaves, and what is refused before it starts."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import SHARED
from tests.harness.commands import (
    BUDGET,
    FOUR_STEPS,
    HYBRIDMIM,
    SMALL,
    fails,
    folder_of,
    harness,
    last_error,
    record_of,
    short_run,
    status_of,
)
from tests.harness.processes import run_words


def test_a_run_leaves_its_files(finished_runs):
    (folder,) = finished_runs.glob("*-hybridmim-*")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "record.json",
        "cases.csv",
        "finetune.json",
        "history.jsonl",
        "weights.lineage.safetensors",
        "weights.safetensors",
        "figures/restoration.png",
        "figures/segmentation.png",
    }
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [(line["stage"], line["step"]) for line in lines] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("finetune", 1),
        ("finetune", 2),
    ]
    assert set(lines[0]["terms"]) == {"reconstruction", "number", "location", "consistency", "contrastive"}


def test_the_record_says_what_happened(finished_runs):
    record = record_of(finished_runs, "hybridmim")
    assert record["schema"] == 1
    assert record["data"]["source"] == "phantom"
    assert record["metric_policy"] == "empty-is-worst-v1"
    assert record["transfer"]["encoder_fraction"] == 1
    assert record["transfer"]["skipped"] == []
    assert set(record["metrics"]) == {"anterior", "posterior", "average"}
    assert set(record["timing"]["pretrain_step"]) == {"step", "data", "transfer", "forward", "backward", "optimizer"}
    assert {"prepare", "pretrain", "method_prepare", "finetune", "evaluate"} == set(record["timing"]["seconds"])
    assert record["computed_with"]["finetune"]["precision"] in ("fp32", "bf16")
    assert record_of(finished_runs, "scratch")["transfer"]["encoder_fraction"] == 0
    assert record_of(finished_runs, "scratch")["timing"]["pretrain_step"] is None


def test_scratch_is_a_matched_control(finished_runs):
    """Same test cases, same training cases, same budget; only the pre-training differs."""
    a, b = record_of(finished_runs, "scratch"), record_of(finished_runs, "hybridmim")
    for key in ("train", "test", "fingerprint"):
        assert a["data"][key] == b["data"][key]
    assert a["config"]["finetune"] == b["config"]["finetune"]
    assert not set(a["data"]["train"]) & set(a["data"]["test"])


def test_same_seed_same_weights_and_one_pretraining_for_many_fractions(finished_runs, two_phantoms, tmp_path, capsys):
    words = [*short_run("hybridmim", two_phantoms / "msd_hippocampus"), "--runs", tmp_path]
    harness(*words)
    (mine,), (theirs,) = tmp_path.glob("*/weights.safetensors"), finished_runs.glob("*-hybridmim-*/weights.safetensors")
    assert mine.read_bytes() == theirs.read_bytes()
    harness(*words, "--label-fraction", "0.5")
    assert "pre-training found" in capsys.readouterr().err
    harness(*words, "--seed", "1")
    weights = [load_file(path) for path in tmp_path.glob("*/weights.safetensors")]
    assert len(weights) == 3
    assert len(list((tmp_path / "cache" / "pretrain").iterdir())) == 2


@pytest.mark.parametrize("method", ["scratch", "hybridmim"])
@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
def test_brats_on_both_backbones(method, backbone, two_phantoms, tmp_path, capsys):
    settings = SMALL["unet"] if backbone == "unet" else []
    words = ["run", "--method", method, "--backbone", backbone, "--task", "brats", "--data", two_phantoms / "brats"]
    harness(*words, "--runs", tmp_path, "--json", *BUDGET, *settings)
    record = json.loads(capsys.readouterr().out)
    assert set(record["metrics"]) == {"whole_tumor", "tumor_core", "enhancing_tumor", "average"}


PLUGIN = '''
"""Denoising, a method in one file outside the tree."""

import torch
from harness import Method, Settings, randn
from pydantic import Field


class Denoise(Method):
    """Predict the clean image from a noisy one."""

    name = "denoise"
    reference = "this test"

    class Config(Settings):
        noise: float = Field(0.1, gt=0, description="standard deviation")

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.restore = torch.nn.Conv3d(backbone.width, backbone.in_channels, 1)

    def forward(self, batch):
        image = batch["image"]
        noise = randn(image.shape, image.device, self.generator)
        backbone = self.backbone
        clean = self.restore(backbone.decode(backbone.encode(image + self.config.noise * noise)))
        return {"denoise": (clean - image).square().mean()}
'''


def test_a_third_partys_method_in_one_file(two_phantoms, tmp_path, capsys):
    plugin = tmp_path / "denoise.py"
    plugin.write_text(PLUGIN)
    words = [*short_run("denoise", two_phantoms / "msd_hippocampus"), "--set", "method.noise=0.2"]
    harness(*words, "--plugin", plugin, "--runs", tmp_path / "runs")
    assert "denoise{noise=0.2, pretrain.crop=" in capsys.readouterr().out
    finished = set((tmp_path / "runs").glob("*/record.json"))
    edited = tmp_path / "edited" / "denoise.py"
    edited.parent.mkdir()
    edited.write_text(PLUGIN.replace(".mean()}", ".mean() * 2}"))
    harness(*words, "--plugin", edited, "--runs", tmp_path / "runs")
    assert len(set((tmp_path / "runs").glob("*/record.json")) - finished) == 1
    capsys.readouterr()
    harness("list", "methods", "--plugin", plugin, "--json")
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert {"denoise", "hybridmim", "scratch"} <= {row["name"] for row in listed}
    assert listed[0]["description"] == "Predict the clean image from a noisy one."


def test_official_weights_give_what_their_own_run_gave(finished_runs, two_phantoms, tmp_path, capsys):
    """HybridMIM's pre-training, given as a file: the same start, so the same result."""
    (weights,) = finished_runs.glob("cache/pretrain/hybridmim-*/weights.safetensors")
    copied = tmp_path / "given.safetensors"
    shutil.copyfile(weights, copied)
    words = [*short_run("official", two_phantoms / "msd_hippocampus"), "--runs", finished_runs]
    words += ["--set", f"method.weights={copied}"]
    harness(*words)
    assert "official{weights=given.safetensors@" in capsys.readouterr().out
    ours, theirs = record_of(finished_runs, "official"), record_of(finished_runs, "hybridmim")
    assert ours["metrics"] == theirs["metrics"]
    assert ours["transfer"] == theirs["transfer"]
    assert ours["timing"]["pretrain_step"] is None
    harness(*words)
    assert "finished before" in capsys.readouterr().out
    (other,) = finished_runs.glob("*-scratch-*/weights.safetensors")
    shutil.copyfile(other, copied)
    harness(*words)
    # Another content under the same name is another run.
    assert len(list(finished_runs.glob("*-official-*/record.json"))) == 2


def test_official_weights_that_do_not_fit_are_refused_before_data_is_read(
    finished_runs, two_phantoms, tmp_path, capsys
):
    words = [*short_run("official", two_phantoms / "msd_hippocampus"), "--runs", finished_runs, "--set"]
    assert "method.weights" in fails(capsys, *words, f"method.weights={tmp_path / 'missing.pt'}")
    assert "Field required" in fails(
        capsys, *short_run("official", two_phantoms / "msd_hippocampus"), "--runs", finished_runs
    )
    save_file({"foreign.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    message = fails(capsys, *words, f"method.weights={tmp_path / 'foreign.safetensors'}")
    assert "gives 0% of the encoder of backbone 'unet'" in message
    assert "conv_0.conv_0.conv.weight is not there" in message


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("method.mask_ration=0.5", "did you mean 'mask_ratio'"),
        ("methods.mask_ratio=0.5", "did you mean 'method'"),
        ("mask_ratio=0.5", "section.field=value"),
        ("method.mask_ratio=1.5", "less than 1"),
        ("method.mask_ratio=many", "valid number"),
        ("pretrain.steps=0", "greater than 0"),
        ("pretrain.batch_size=1", "no negatives in a batch of 1"),
        ("pretrain.crop=40,64,32", "not a multiple of the deepest stride"),
        ("finetune.crop=16", "single voxel"),
        ("method.sub_volume=24", "does not divide the crop"),
        ("pretrain.warmup_steps=1000", "does not fit"),
        ("finetune.warmup_steps=1000", "does not fit"),
        ("backbone.features=8,8", "at least 5"),
    ],
)
def test_wrong_settings(setting, says, capsys, two_phantoms, tmp_path):
    line = fails(capsys, *HYBRIDMIM, "--data", two_phantoms / "msd_hippocampus", "--runs", tmp_path, "--set", setting)
    assert says in line


def test_data_of_another_task_and_an_empty_folder(capsys, two_phantoms, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no dataset.json" in fails(capsys, *HYBRIDMIM, "--data", two_phantoms / "brats", "--runs", tmp_path / "runs")
    assert "no dataset.json" in fails(capsys, *HYBRIDMIM, "--data", tmp_path / "empty", "--runs", tmp_path / "runs")


def test_a_runs_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, *HYBRIDMIM, "--runs", tmp_path / "file" / "runs")


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--checkpoint-minutes", "-1"], "is not a number of minutes"),
        (["--micro-batches", "0"], "is not a whole number of 1 or more"),
        (["--on-nonfinite", "ignore"], "unknown value of --on-nonfinite 'ignore'"),
        (["--tracker", "carrier-pigeon"], "unknown value of --tracker 'carrier-pigeon'"),
        (["--micro-batches", "3"], "cannot be dealt out evenly over 1 processes with 3 micro-batches"),
    ],
)
def test_wrong_ways_to_carry_out_a_run(more, says, sixteen_cases, tmp_path, capsys):
    assert status_of(*run_words("simmim", FOUR_STEPS, sixteen_cases, tmp_path, *more)) == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--mode", "generic"], "--mode generic needs what to pre-train on"),
        (["--corpus", "flare21"], "--corpus is for --mode generic"),
        (["--mode", "generic", "--corpus", "flare22"], "did you mean 'flare21'"),
        (["--mode", "generic", "--corpus", "./nowhere"], "does not exist"),
        (["--mode", "generic", "--corpus", "luna16"], "corpus 'luna16': not found"),
        (["--mode", "generic", "--corpus", "luna16=400,-900"], "give its lower end first"),
        (["--mode", "generic", "--corpus", f"luna16=0,0.{'0' * 44}1"], "is empty or too wide"),
        (["--mode", "generic", "--corpus", "a" * 5000], "unknown corpus"),
        (["--mode", "special"], "unknown value of --mode 'special'"),
        (["--split", "6/5"], "give fixed (80/20), K/N"),
        (["--split", "1/9"], "at most as many folds"),
        (["--set", "task.window=3,1"], "lower end of the window first"),
        (["--set", "task.window=0,1e-40"], "tell them apart"),
        (["--set", "task.window=-1e308,1e308"], "tell them apart"),
        (["--set", "task.window=1e10,10000000001"], "tell them apart"),
        (["--set", "task.spacing=0,1,1"], "more than 0 mm"),
        (["--set", "task.spacing=1e-200,1,1"], "within 0.0001 to 10000 mm"),
        (["--set", "task.spacing=1,1,1e300"], "within 0.0001 to 10000 mm"),
        (["--set", "task.crop=3"], "unknown setting in section 'task'"),
    ],
)
def test_wrong_words(words, says, data_folders, tmp_path, capsys):
    harness(*short_run("simmim", data_folders / "msd_hippocampus"), "--runs", tmp_path, *words, status=2)
    assert says in last_error(capsys)


def test_the_real_btcv_like_case_goes_all_the_way(tmp_path, capsys):
    root = SHARED / "btcv_like"
    if not root.is_dir():
        pytest.skip(f"{root} is not here")
    harness("data", "check", "btcv", "--data", root, "--runs", tmp_path)
    assert "no esophagus" in capsys.readouterr().out
    harness("data", "prepare", "btcv", "--data", root, "--runs", tmp_path)
    words = ["run", "--method", "simmim", "--task", "btcv", "--data", root, "--split", "same", "--runs", tmp_path]
    harness(*words, *BUDGET, *SMALL["unet"], "--set", "task.spacing=5,5,5")
    assert "TEST CASES WERE TRAINED" in capsys.readouterr().out
    record = record_of(tmp_path, "simmim")
    assert record["data"]["n_test_seen"] == 1
    assert record["metrics"]["esophagus"]["n_empty"] + record["metrics"]["esophagus"]["n_spurious"] == 1


def test_the_last_fold_prints_the_pooled_table(tmp_path, hippocampus_phantom, capsys):
    for fold in ("1/2", "2/2"):
        capsys.readouterr()
        harness(*short_run("scratch", hippocampus_phantom), "--runs", tmp_path, "--split", fold)
        assert f"split={'1/2' if fold == '1/2' else '2 folds'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--tune", "finetune.lr=abc"], "finetune.lr"),
        (["--tune", "finetune.warmup_steps=0,1", "--set", "finetune.warmup_steps=1"], "give it once"),
        (["--split", "1/3@/nowhere.json"], "there is no file"),
    ],
)
def test_a_dry_run_without_data_checks_tuning_and_folds(words, says, capsys):
    assert says in fails(capsys, "run", "--method", "scratch", "--task", "msd_spleen", "--dry-run", *words)


def test_the_preset_nnunet_runs_for_scratch_and_for_a_method(hippocampus_phantom, tmp_path):
    """Deep supervision, SGD, warped crops and mirrored prediction together; the same seed gives the same scores."""
    records = []
    for method, runs in (("scratch", "first"), ("scratch", "second"), ("simmim", "first")):
        words = ["run", "--method", method, "--backbone", "resenc", "--task", "msd_hippocampus", "--preset", "nnunet"]
        words += ["--data", hippocampus_phantom, *BUDGET, "--set", "pretrain.workers=0", "--set", "finetune.workers=0"]
        words += ["--set", "backbone.features=4,4,8,8", "--set", "backbone.blocks=1,1,1,1"]
        harness(*words, "--runs", tmp_path / runs)
        folder = folder_of(tmp_path / runs, method)
        records.append(json.loads((folder / "record.json").read_text()))
    first, second, pretrained = records
    assert first["computed_with"]["finetune"]["optimizer"] == "fused SGD"
    assert first["config"]["prepared"]["normalisation"] == "ZScore"
    assert first["config"]["backbone_settings"]["deep_supervision"] is True
    assert first["digests"] == second["digests"]
    assert first["run_id"] == second["run_id"]
    assert pretrained["computed_with"]["pretrain"]["optimizer"] == "fused AdamW"
    assert pretrained["transfer"]["loaded"]
