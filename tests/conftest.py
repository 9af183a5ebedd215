"""Shared fixtures: phantoms that are written once, and the real data where it is there."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

# `pytest -n N`: as many threads in all as there are processes. Set before torch is imported.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

from harness import Task
from harness.api.registry import Registry
from harness.data.phantom import write_phantom
from tests.harness.processes import compute_alike
from tests.mutation.engine import pytest_terminal_summary  # noqa: F401  a hook: the table of mutants

compute_alike()

SHARED = Path(os.environ.get("HARNESS_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))

# A network and budgets that take seconds; sizes still fit every backbone.
TINY = {
    "unet": ["backbone.features=4,4,8,8,8"],
    "swinunetr": ["backbone.depths=1,1,1,1", "backbone.num_heads=1,1,1,1"],
}
TINY_BUDGET = [
    *("pretrain.steps=2", "pretrain.warmup_steps=0", "pretrain.crop=32,32,32"),
    *("finetune.steps=2", "finetune.warmup_steps=0", "finetune.crop=32,32,32"),
]


def small(task: Task) -> Task:
    """The task with a phantom small enough for tests."""
    return replace(task, phantom_size=(34, 36, 30), phantom_cases=4)


@pytest.fixture(scope="session")
def registry() -> Registry:
    return Registry()


@pytest.fixture(scope="session", params=["msd_hippocampus", "brats", "msd_spleen"])
def phantom(request, registry, tmp_path_factory) -> tuple[Task, Path]:
    """Each task with a phantom of four cases on disk."""
    task = small(registry.task(request.param))
    root = tmp_path_factory.mktemp("phantom") / request.param
    write_phantom(task, root, task.phantom_cases, seed=0)
    return task, root


@pytest.fixture(scope="session")
def hippocampus_phantom(registry, tmp_path_factory) -> Path:
    task = small(registry.task("msd_hippocampus"))
    root = tmp_path_factory.mktemp("phantom") / task.folder
    write_phantom(task, root, task.phantom_cases, seed=0)
    return root


@pytest.fixture(scope="session")
def sixteen_cases(registry, tmp_path_factory) -> Path:
    """Enough to train on and to test on while something happens."""
    task = small(registry.task("msd_hippocampus"))
    root = tmp_path_factory.mktemp("phantom") / task.folder
    write_phantom(task, root, 16, seed=0)
    return root


@pytest.fixture(scope="session")
def thirty_cases(registry, tmp_path_factory) -> Path:
    """Twenty-four to train on, of which one is held out for validation."""
    task = small(registry.task("msd_hippocampus"))
    root = tmp_path_factory.mktemp("phantom") / task.folder
    write_phantom(task, root, 30, seed=0)
    return root


@pytest.fixture(scope="session")
def real_hippocampus() -> Path:
    root = SHARED / "Task04_Hippocampus"
    if not root.is_dir():
        pytest.skip(f"the real data set {root} is not here; HARNESS_TEST_DATA names another folder")
    return root
