"""Tiny runs give the bytes that were committed: a change of layout, names or words changes no result.

The bytes of a training belong to a processor and to versions of the libraries. On the machine that wrote `golden.json`
everything must be equal to the last byte; elsewhere the losses must agree within a tolerance, and the record in all that is
not a number computed by the training. After a change that is meant to change results:

    HARNESS_WRITE_GOLDEN=1 pytest tests/test_golden.py
"""

import hashlib
import json
import math
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from harness.data.phantom import write_phantom
from tests.conftest import small
from tests.harness.processes import finish, only_run, run_words, start

FILE = Path(__file__).with_name("golden.json")
WRITE = "HARNESS_WRITE_GOLDEN"
PACKAGES = ("torch", "monai", "timm", "accelerate", "numpy", "scipy", "nibabel")
# What differs between two runs of the same thing, or names the version that computed it.
VOLATILE = (
    "citations",
    "pretrain_folder",
    "timing",
    "memory",
    "energy",
    "environment",
    "finished",
    "run_id",
    "resumed",
)
UNET = ["backbone.features=4,4,8,8,8"]
BUDGET = [
    *("pretrain.steps=12", "pretrain.warmup_steps=2", "pretrain.crop=32,32,32"),
    *("finetune.steps=8", "finetune.warmup_steps=2", "finetune.crop=32,32,32"),
]
RUNS = {
    "scratch": ("scratch", UNET, ()),
    "hybridmim": ("hybridmim", [*UNET, "method.sub_volume=32"], ()),
    "hybridmim-killed": ("hybridmim", [*UNET, "method.sub_volume=32"], ()),
    "transvw-generic": ("transvw", [*UNET, "method.autoencoder_steps=4", "method.hidden=16"], ("--mode", "generic")),
    "simmim-frozen-swinunetr": (
        "simmim",
        ["backbone.depths=1,1,1,1", "backbone.num_heads=1,1,1,1", "pretrain.crop=64,64,64", "finetune.crop=64,64,64"],
        ("--protocol", "frozen", "--backbone", "swinunetr"),
    ),
}


def machine() -> str:
    """What the bytes of a training depend on, beside the code."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = (f"{package} {version(package)}" for package in PACKAGES)
    return ", ".join([name, torch.backends.cpu.get_cpu_capability(), f"Python {platform.python_version()}", *versions])


@pytest.fixture(scope="module")
def folders(registry, tmp_path_factory) -> tuple[Path, Path]:
    """A phantom to train on, and the scans of another one as a corpus."""
    task = small(registry.task("msd_hippocampus"))
    root = tmp_path_factory.mktemp("golden")
    write_phantom(task, root / task.folder, 8, seed=0)
    write_phantom(task, root / "other", 6, seed=1)
    return root / task.folder, root / "other" / "imagesTr"


def carry_out(name: str, folders: tuple[Path, Path], runs: Path) -> Path:
    """One of `RUNS` in a process of its own -> its folder."""
    data, corpus = folders
    method, settings, more = RUNS[name]
    more = (*more, "--corpus", str(corpus)) if "generic" in more else more
    words = [*run_words(method, [*BUDGET, *settings], data, runs, *more), "--checkpoint-minutes", "0.0001"]
    if name.endswith("killed"):
        process = start(words, runs / "log")
        while process.is_alive() and not any(runs.glob("cache/pretrain/*/checkpoints/*.ckpt")):
            time.sleep(0.002)
        process.kill()
        assert finish(process) != 0, "it ended before it could be killed"
    assert finish(start(words, runs / "log")) == 0, (runs / "log").read_text()
    return only_run(runs)


def summary(run: Path) -> dict:
    """What is compared: digests of weights and cases, the losses, and the record without what changes from run to run.

    Weights are compared without their metadata, which name the version.
    """
    record = json.loads((run / "record.json").read_text())
    del record["digests"]["weights.safetensors"]  # of the file with its metadata
    history = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return {
        "weights": hashlib.sha256(save(load_file(run / "weights.safetensors"))).hexdigest(),
        "cases": hashlib.sha256((run / "cases.csv").read_bytes()).hexdigest(),
        "losses": history,
        "record": {name: value for name, value in record.items() if name not in VOLATILE},
    }


def test_kinds_of_runs_are_all_pinned():
    assert set(json.loads(FILE.read_text())["runs"]) == set(RUNS)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * name.endswith("swinunetr")) for name in RUNS]
)
def test_a_run_gives_the_committed_bytes(name, folders, tmp_path):
    made = summary(carry_out(name, folders, tmp_path))
    if os.environ.get(WRITE):
        golden = json.loads(FILE.read_text()) if FILE.exists() else {"runs": {}}
        golden = {"machine": machine(), "runs": golden["runs"] | {name: made}}
        FILE.write_text(json.dumps(golden, indent=1, sort_keys=True) + "\n")
        pytest.skip(f"{FILE} was written")
    golden = json.loads(FILE.read_text())
    due = golden["runs"][name]
    if machine() == golden["machine"]:
        assert made == due
        return
    # Another processor or library: the same steps with nearly the same losses, the same cases and settings.
    assert len(made["losses"]) == len(due["losses"])
    for here, there in zip(made["losses"], due["losses"], strict=True):
        assert_alike(here, there, f"{here['stage']} {here['step']}")
    computed = ("metrics", "digests", "method_prepare", "data", "parameters", "computed_with")
    assert set(made["record"]) == set(due["record"])
    for key in set(due["record"]) - set(computed):
        assert_alike(made["record"][key], due["record"][key], key)
    for key in ("train", "test", "n_train", "n_test", "split_by"):
        assert made["record"]["data"][key] == due["record"]["data"][key], key


def assert_alike(here, there, where: str) -> None:
    """Numbers that a training computed agree within a tolerance, everything else is equal, except digests of weights.

    A term of a loss may be off by half a hundredth, which is little of a loss of about 1. Gradient norms need only be there:
    where the last bit decides the side of a kink, as of a leaky ReLU in a map of 2 x 2 x 2 voxels, a norm differs by a
    quarter between processors, with a loss that agrees to five digits.
    """
    if isinstance(there, dict):
        assert set(here) == set(there), where
        for key, value in there.items():
            assert_alike(here[key], value, f"{where}, {key}")
    elif isinstance(there, list):
        assert len(here) == len(there), where
        for index, (first, second) in enumerate(zip(here, there, strict=True)):
            assert_alike(first, second, f"{where}, {index}")
    elif isinstance(there, float) and "gradient_norm" in where:
        assert math.isfinite(here), where
        assert here > 0, where
    elif isinstance(there, float):
        least = 5e-3 if ", terms, " in where else 1e-3
        assert math.isclose(here, there, rel_tol=0.05, abs_tol=least), (where, here, there)
    elif where == "transfer, frozen, digest":
        assert len(here) == len(there), where
    else:
        assert here == there, where
