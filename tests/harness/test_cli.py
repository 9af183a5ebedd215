"""The command line: end to end on phantoms, and one line with status 2 for everything the user can mend."""

import gzip
import json
import shutil
import subprocess
import sys

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.cli.main import main

BUDGET = [
    *("--set", "pretrain.steps=2", "--set", "pretrain.warmup_steps=0", "--set", "pretrain.crop=32,32,64"),
    *("--set", "finetune.steps=2", "--set", "finetune.warmup_steps=0", "--set", "finetune.crop=32,32,64"),
]
UNET = ["--set", "backbone.features=4,4,8,8,8"]
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


def harness(*words, status=0) -> None:
    assert main([str(word) for word in words]) == status


def fails(capsys, *words) -> str:
    capsys.readouterr()
    harness(*words, status=2)
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert last.startswith("harness: error: ")
    assert "Traceback" not in err
    assert not out.strip()
    return last


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Phantom folders of both tasks, written by the command itself."""
    root = tmp_path_factory.mktemp("data")
    for task in ("msd_hippocampus", "brats"):
        harness("data", "phantom", task, "--out", root / task, "--cases", 4)
    return root


def run_words(method, data):
    task = "msd_hippocampus"
    return ["run", "--method", method, "--task", task, "--data", data / task, *BUDGET, *UNET]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, data):
    """A runs folder with scratch and hybridmim, finished."""
    runs = tmp_path_factory.mktemp("runs")
    for method in ("scratch", "hybridmim"):
        harness(*run_words(method, data), "--runs", runs)
    return runs


def record_of(runs, method):
    (path,) = runs.glob(f"*-{method}-*/record.json")
    return json.loads(path.read_text())


def test_a_run_leaves_its_files(runs):
    (folder,) = runs.glob("*-hybridmim-*")
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert names == {
        "config.json",
        "record.json",
        "cases.csv",
        "finetune.json",
        "history.jsonl",
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


def test_the_record_says_what_happened(runs):
    record = record_of(runs, "hybridmim")
    assert record["schema"] == 1
    assert record["data"]["source"] == "phantom"
    assert record["metric_policy"] == "empty-is-worst-v1"
    assert record["transfer"]["encoder_fraction"] == 1
    assert record["transfer"]["skipped"] == []
    assert set(record["metrics"]) == {"anterior", "posterior", "average"}
    assert set(record["timing"]["pretrain_step"]) == {"step", "data", "transfer", "forward", "backward", "optimizer"}
    assert {"prepare", "pretrain", "method_prepare", "finetune", "evaluate"} == set(record["timing"]["seconds"])
    assert record["computed_with"]["finetune"]["precision"] in ("fp32", "bf16")
    assert record_of(runs, "scratch")["transfer"]["encoder_fraction"] == 0
    assert record_of(runs, "scratch")["timing"]["pretrain_step"] is None


def test_scratch_is_a_matched_control(runs):
    """Same test cases, same training cases, same budget; only the pre-training differs."""
    a, b = record_of(runs, "scratch"), record_of(runs, "hybridmim")
    for key in ("train", "test", "fingerprint"):
        assert a["data"][key] == b["data"][key]
    assert a["config"]["finetune"] == b["config"]["finetune"]
    assert not set(a["data"]["train"]) & set(a["data"]["test"])


def test_leaderboard_has_the_contracts_columns(runs, capsys):
    harness("leaderboard", "build", "--runs", runs)
    assert "PHANTOM DATA" in capsys.readouterr().out
    frame = pd.read_csv(runs / "leaderboard.csv")
    assert ",".join(frame.columns) == (
        "task,data,preset,mode,protocol,label_fraction,method,backbone,n_seeds,target,dice,dice_ci_low,dice_ci_high,"
        "hd95_mm,hd95_ci_low,hd95_ci_high,n_cases,n_missed,delta_dice_vs_scratch,delta_ci_low,delta_ci_high,"
        "p_value_holm,rank,step_ms_p50,pretrain_seconds,source,run_ids,n_test_seen,"
        "surface_dice,surface_dice_ci_low,surface_dice_ci_high,surface_tolerance_mm,metric_policy,note"
    )
    average = frame[frame["target"] == "average"].set_index("method")
    difference = average.loc["hybridmim", "dice"] - average.loc["scratch", "dice"]
    assert average.loc["hybridmim", "delta_dice_vs_scratch"] == pytest.approx(difference, abs=1e-5)
    assert average["p_value_holm"].isna().all()
    assert average["data"].str.startswith("phantom:").all()


def test_a_finished_run_answers_before_torch_is_needed(runs, data, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("the run was resolved again, which imports torch and MONAI")

    monkeypatch.setattr("harness.runs.execute.plan", never)
    harness(*run_words("hybridmim", data), "--runs", runs)
    assert "finished before" in capsys.readouterr().out


def test_the_slow_way_finds_the_finished_run_too(runs, data, capsys):
    """Files that were touched but not changed: recognised by content."""
    next((data / "msd_hippocampus").rglob("*.nii.gz")).touch()
    harness(*run_words("hybridmim", data), "--runs", runs)
    assert "finished before" in capsys.readouterr().out


def test_same_seed_same_weights_and_one_pretraining_for_many_fractions(runs, data, tmp_path, capsys):
    words = [*run_words("hybridmim", data), "--runs", tmp_path]
    harness(*words)
    (mine,), (theirs,) = tmp_path.glob("*/weights.safetensors"), runs.glob("*-hybridmim-*/weights.safetensors")
    assert mine.read_bytes() == theirs.read_bytes()
    harness(*words, "--label-fraction", "0.5")
    assert "pre-training found" in capsys.readouterr().err
    harness(*words, "--seed", "1")
    weights = [load_file(path) for path in tmp_path.glob("*/weights.safetensors")]
    assert len(weights) == 3
    assert len(list((tmp_path / "cache" / "pretrain").iterdir())) == 2


@pytest.mark.parametrize("method", ["scratch", "hybridmim"])
@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
def test_brats_on_both_backbones(method, backbone, data, tmp_path, capsys):
    settings = UNET if backbone == "unet" else []
    harness(
        "run",
        "--method",
        method,
        "--backbone",
        backbone,
        "--task",
        "brats",
        "--data",
        data / "brats",
        "--runs",
        tmp_path,
        "--json",
        *BUDGET,
        *settings,
    )
    record = json.loads(capsys.readouterr().out)
    assert set(record["metrics"]) == {"whole_tumor", "tumor_core", "enhancing_tumor", "average"}


def test_a_third_partys_method_in_one_file(data, tmp_path, capsys):
    plugin = tmp_path / "denoise.py"
    plugin.write_text(PLUGIN)
    harness(*run_words("denoise", data), "--plugin", plugin, "--set", "method.noise=0.2", "--runs", tmp_path / "runs")
    assert "denoise{noise=0.2}" in capsys.readouterr().out
    finished = set((tmp_path / "runs").glob("*/record.json"))
    edited = tmp_path / "edited" / "denoise.py"
    edited.parent.mkdir()
    edited.write_text(PLUGIN.replace(".mean()}", ".mean() * 2}"))
    harness(*run_words("denoise", data), "--plugin", edited, "--set", "method.noise=0.2", "--runs", tmp_path / "runs")
    assert len(set((tmp_path / "runs").glob("*/record.json")) - finished) == 1
    capsys.readouterr()
    harness("list", "methods", "--plugin", plugin, "--json")
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert {"denoise", "hybridmim", "scratch"} <= {row["name"] for row in listed}
    assert listed[0]["description"] == "Predict the clean image from a noisy one."


def test_official_weights_give_what_their_own_run_gave(runs, data, tmp_path, capsys):
    """HybridMIM's pre-training, given as a file: the same start, so the same result."""
    (weights,) = runs.glob("cache/pretrain/hybridmim-*/weights.safetensors")
    copied = tmp_path / "given.safetensors"
    shutil.copyfile(weights, copied)
    words = [*run_words("official", data), "--runs", runs, "--set", f"method.weights={copied}"]
    harness(*words)
    assert "official{weights=given.safetensors@" in capsys.readouterr().out
    ours, theirs = record_of(runs, "official"), record_of(runs, "hybridmim")
    assert ours["metrics"] == theirs["metrics"]
    assert ours["transfer"] == theirs["transfer"]
    assert ours["timing"]["pretrain_step"] is None
    harness(*words)
    assert "finished before" in capsys.readouterr().out
    (other,) = runs.glob("*-scratch-*/weights.safetensors")
    shutil.copyfile(other, copied)
    harness(*words)
    # Another content under the same name is another run.
    assert len(list(runs.glob("*-official-*/record.json"))) == 2


def test_official_weights_that_do_not_fit_are_refused_before_data_is_read(runs, data, tmp_path, capsys):
    words = [*run_words("official", data), "--runs", runs, "--set"]
    assert "method.weights" in fails(capsys, *words, f"method.weights={tmp_path / 'missing.pt'}")
    assert "Field required" in fails(capsys, *run_words("official", data), "--runs", runs)
    save_file({"foreign.weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    message = fails(capsys, *words, f"method.weights={tmp_path / 'foreign.safetensors'}")
    assert "gives 0% of the encoder of backbone 'unet'" in message
    assert "conv_0.conv_0.conv.weight is not there" in message


def test_transvw_reports_its_discovery(data, tmp_path, capsys):
    harness(*run_words("transvw", data), "--runs", tmp_path, "--set", "method.autoencoder_steps=2")
    assert "words of 44 sought" in capsys.readouterr().err
    record = record_of(tmp_path, "transvw")
    assert record["method_prepare"]["words"] >= 2
    assert record["timing"]["seconds"]["method_prepare"] > 0
    # Longer pre-training needs no new discovery, and reports what the first one took.
    harness(
        *run_words("transvw", data),
        "--runs",
        tmp_path,
        "--set",
        "method.autoencoder_steps=2",
        "--set",
        "pretrain.steps=3",
    )
    assert "words found in" in capsys.readouterr().err


def test_show_and_dry_run(runs, data, capsys):
    run_id = record_of(runs, "scratch")["run_id"]
    harness("show", run_id[:-4], "--runs", runs)
    assert run_id in capsys.readouterr().out
    harness(
        "run",
        "--method",
        "hybridmim",
        "--task",
        "brats",
        "--data",
        data / "brats",
        "--runs",
        runs,
        "--dry-run",
        "--json",
    )
    found = json.loads(capsys.readouterr().out)
    assert found["config"]["method_settings"]["mask_ratio"] == 0.4
    assert not found["finished"]


@pytest.mark.parametrize("words", [["--help"], ["list"], ["list", "--json"]])
def test_help_and_list_import_no_torch(words):
    code = f"import sys; from harness.cli.main import main; main({words!r}); "
    if words == ["--help"]:
        code = "import sys, contextlib; from harness.cli.main import main\n"
        code += "with contextlib.suppress(SystemExit): main(['--help'])\n"
    code += "\nassert not {'torch', 'monai', 'pandas', 'scipy', 'nibabel'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "hybridmim" in done.stdout or words == ["--help"]


RUN = ("run", "--method", "hybridmim", "--task", "msd_hippocampus")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("run", "--method", "hybridmin", "--task", "brats"), "did you mean 'hybridmim'"),
        (("run", "--method", "scratch", "--task", "brast"), "did you mean 'brats'"),
        (("run", "--method", "scratch", "--task", "brats", "--backbone", "unets"), "did you mean 'unet'"),
        ((*RUN, "--preset", "papr"), "did you mean 'paper'"),
        ((*RUN, "--task", "./nowhere"), "does not exist"),
        (("run", "--task", "brats"), "--method"),
        (("runn",), "invalid choice"),
        (("list", "method"), "did you mean 'methods'"),
        ((*RUN, "--seed", "-1"), "not a whole number"),
        (("data", "phantom", "brats", "--out", "x", "--seed", "-1"), "not a whole number"),
        (("data", "phantom", "brats", "--out", "x", "--cases", "1"), "at least 2 cases"),
        (("data", "phantom", "brats", "--out", "/dev/null/x"), "/dev/null is no folder"),
        ((*RUN, "--label-fraction", "0"), "not in 0..1"),
        ((*RUN, "--plugin", "nowhere.py"), "no such file"),
        ((*RUN, "--data", "nowhere"), "not a folder"),
        (("data", "check", "brats", "--data", "nowhere"), "not a folder"),
        (("show", "nothing"), "unknown run"),
        (("run", "--method", "scratch", "--task", "a" * 5000), "unknown task"),
        (("run", "--method", "scratch", "--task", "/" + "a" * 5000), "does not exist"),
        ((*RUN, "--data", "a" * 5000), "is not a folder"),
        ((*RUN, "--dry-run", "--seed", str(2**63)), "less than or equal to 9223372036854775807"),
    ],
)
def test_wrong_words(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HARNESS_DATA", raising=False)
    assert says in fails(capsys, *words)


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
def test_wrong_settings(setting, says, capsys, data, tmp_path):
    line = fails(capsys, *RUN, "--data", data / "msd_hippocampus", "--runs", tmp_path, "--set", setting)
    assert says in line


def test_data_of_another_task_and_an_empty_folder(capsys, data, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "no dataset.json" in fails(capsys, *RUN, "--data", data / "brats", "--runs", tmp_path / "runs")
    assert "no dataset.json" in fails(capsys, *RUN, "--data", tmp_path / "empty", "--runs", tmp_path / "runs")


def test_a_runs_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in fails(capsys, *RUN, "--runs", tmp_path / "file" / "runs")


def truncate(case):
    whole = case.images[0].read_bytes()
    case.images[0].write_bytes(whole[: len(whole) // 2])


def rewrite(path, change, affine=None):
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine), path)


def flatten(case):
    """An affine without its first row: nibabel refuses to write one, other programs do not."""
    header = bytearray(gzip.decompress(case.images[0].read_bytes()))
    header[252:256] = b"\0\0\1\0"  # no qform, an sform
    header[280:296] = bytes(16)
    case.images[0].write_bytes(gzip.compress(bytes(header)))


def poke(value):
    def change(voxels):
        voxels[5, 5, 5] = value
        return voxels

    return change


BAD = {
    "truncated": (truncate, "cannot be read"),
    "no gzip": (lambda case: case.images[0].write_bytes(b"not an image"), "cannot be read"),
    "other gzip": (lambda case: case.images[0].write_bytes(gzip.compress(b"x" * 1000)), "cannot be read"),
    "zero bytes": (lambda case: case.images[0].write_bytes(b""), "cannot be read"),
    "NaN": (lambda case: rewrite(case.images[0], poke(np.nan)), "1 voxels are NaN"),
    "Inf": (lambda case: rewrite(case.images[0], poke(np.inf)), "1 voxels are NaN or infinite"),
    "label 3": (lambda case: rewrite(case.label, poke(3)), "label values 3 are unknown"),
    "label 0.5": (lambda case: rewrite(case.label, lambda v: poke(0.5)(v.astype(np.float32))), "label values 0.5"),
    "shape": (lambda case: rewrite(case.label, lambda v: v[:-1]), "same grid"),
    "affine": (lambda case: rewrite(case.label, lambda v: v, np.diag([1.0, 1, 1, 1])), "different affines"),
    "constant": (lambda case: rewrite(case.images[0], lambda v: v * 0 + 7), "same value 7 nearly everywhere"),
    "singular": (flatten, "cannot be inverted"),
}


@pytest.mark.parametrize("kind", BAD)
@pytest.mark.parametrize("task_name", ["msd_hippocampus", "brats"])
def test_bad_files_are_named_and_nothing_prepared_is_lost(kind, task_name, capsys, data, tmp_path, registry):
    root = tmp_path / "data"
    shutil.copytree(data / task_name, root)
    task = registry.task(task_name)
    case = task.cases(root)[-1]
    spoil, says = BAD[kind]
    spoil(case)
    words = ("data", "prepare", task_name, "--data", root, "--runs", tmp_path / "runs")
    line = fails(capsys, *words)
    assert says in line
    assert case.id in line
    assert list((tmp_path / "runs" / "cache" / "prepared").rglob("*.json"))
    if kind != "constant":
        harness("data", "check", task_name, "--data", root, status=2)
        assert says in capsys.readouterr().out


def test_a_brats_case_with_a_3_says_so(capsys, data, tmp_path, registry):
    shutil.copytree(data / "brats", tmp_path / "brats")
    case = registry.task("brats").cases(tmp_path / "brats")[0]
    rewrite(case.label, poke(3))
    line = fails(
        capsys,
        "run",
        "--method",
        "scratch",
        "--task",
        "brats",
        "--data",
        tmp_path / "brats",
        "--runs",
        tmp_path / "runs",
    )
    assert "label values 3 are unknown to task 'brats', which has 0, 1, 2, 4" in line


def test_good_data_passes_the_check(data, capsys):
    harness("data", "check", "brats", "--data", data / "brats")
    assert "4 cases" in capsys.readouterr().out


def test_real_hippocampus_passes_the_check(real_hippocampus, capsys):
    harness("data", "check", "msd_hippocampus", "--data", real_hippocampus.parent)
    assert "220 cases, 176 for training and 44 for testing; 0 with a problem" in capsys.readouterr().out
