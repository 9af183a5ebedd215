"""Data and finished runs that tests of several rooms share; what a test changes it copies first."""

import shutil
from pathlib import Path

import pytest
import SimpleITK as sitk  # noqa: N813
import torch

from harness.api.registry import Registry
from harness.costs import profile, trial
from harness.costs.trial import TrialResult
from harness.data.phantom import write_phantom
from tests.conftest import small
from tests.harness import interrupted
from tests.harness.commands import FOUR_STEPS, harness, make_run, short_run
from tests.harness.processes import finish, only_run, run_words, start


@pytest.fixture(scope="session")
def two_phantoms(tmp_path_factory) -> Path:
    """Phantom folders of msd_hippocampus and brats, of four cases each, written by the command itself."""
    root = tmp_path_factory.mktemp("data")
    for task in ("msd_hippocampus", "brats"):
        harness("data", "phantom", task, "--out", root / task, "--cases", 4)
    return root


@pytest.fixture(scope="session")
def finished_runs(tmp_path_factory, two_phantoms) -> Path:
    """A runs folder with scratch and hybridmim, finished."""
    runs = tmp_path_factory.mktemp("runs")
    for method in ("scratch", "hybridmim"):
        harness(*short_run(method, two_phantoms / "msd_hippocampus"), "--runs", runs)
    return runs


@pytest.fixture(scope="session")
def data_folders(tmp_path_factory) -> Path:
    """Small phantoms of three tasks and a folder of unlabelled scans in three formats."""
    root = tmp_path_factory.mktemp("data")
    for name in ("msd_hippocampus", "brats", "btcv"):
        write_phantom(small(Registry().task(name)), root / name, 5, seed=0)
    write_phantom(small(Registry().task("msd_hippocampus")), root / "more", 6, seed=7)
    scans = root / "scans"
    (scans / "deep").mkdir(parents=True)
    for number, path in enumerate(sorted((root / "more" / "imagesTr").iterdir())):
        name = ["a.nrrd", "deep/b.mhd", "c.nii.gz"][number % 3]
        sitk.ProcessObject.SetGlobalWarningDisplay(False)
        sitk.WriteImage(sitk.ReadImage(str(path)), str(scans / name.replace(".", f"{number}.", 1)))
    return root


@pytest.fixture(scope="session")
def corpus_runs(data_folders, tmp_path_factory) -> Path:
    """A runs folder with scratch, whose predictions are kept, and simmim in generic mode."""
    runs = tmp_path_factory.mktemp("runs")
    hippocampus = data_folders / "msd_hippocampus"
    harness(*short_run("scratch", hippocampus), "--runs", runs, "--save-predictions")
    generic = ["--mode", "generic", "--corpus", data_folders / "scans"]
    harness(*short_run("simmim", hippocampus), *generic, "--runs", runs)
    return runs


@pytest.fixture(scope="session")
def predicted_runs(tmp_path_factory, hippocampus_phantom) -> Path:
    """A runs folder with scratch and simmim, whose predictions are kept."""
    runs = tmp_path_factory.mktemp("runs")
    for method in ("scratch", "simmim"):
        make_run(runs, hippocampus_phantom, method, "unet", "--save-predictions")
    return runs


@pytest.fixture(scope="session")
def finished_simmim(hippocampus_phantom, tmp_path_factory) -> Path:
    """A runs folder with simmim alone."""
    runs = tmp_path_factory.mktemp("finished")
    harness(*short_run("simmim", hippocampus_phantom), "--runs", runs)
    return runs


@pytest.fixture(scope="session")
def whole_run(sixteen_cases, tmp_path_factory) -> Path:
    """The run of `interrupted.words` that nothing disturbs."""
    runs = tmp_path_factory.mktemp("whole")
    words = interrupted.words(sixteen_cases, runs)
    assert finish(start(words, runs / "log")) == 0, (runs / "log").read_text()
    return only_run(runs)


@pytest.fixture
def one_thread():
    """As in the processes that the others are compared with: sums depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def checkpointed_run(sixteen_cases, tmp_path_factory) -> Path:
    """A runs folder with simmim alone, after four steps of each stage with a checkpoint after each."""
    runs = tmp_path_factory.mktemp("finished")
    words = run_words("simmim", FOUR_STEPS, sixteen_cases, runs, "--checkpoint-minutes", 0)
    assert finish(start(words, runs / "log")) == 0, (runs / "log").read_text()
    return runs


@pytest.fixture
def checkpointed_runs(checkpointed_run, tmp_path) -> Path:
    """A copy of that folder, to be changed."""
    shutil.copytree(checkpointed_run, tmp_path / "runs")
    return tmp_path / "runs"


@pytest.fixture
def quick_steps(monkeypatch):
    """Milliseconds of steps instead of seconds, and no process for the peak of memory."""
    monkeypatch.setattr(profile, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(profile, "LOOP_SECONDS", 0.1)

    def here(each: TrialResult) -> None:
        answer = trial._two_steps(each.spec.request, each.spec.stage, torch.get_num_threads())
        each.flops, each.parameters, each.memory = answer

    monkeypatch.setattr(profile, "measure_in_new_process", here)
    monkeypatch.setattr("harness.costs.estimate.measure_in_new_process", here)
