"""The shell blocks of README and docs, run as they are written, on phantoms and with budgets of seconds."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harness import write_image
from harness.api.registry import Registry
from harness.data.phantom import write_phantom
from tests.conftest import small
from tests.test_readme import BLOCK, PAGES, ROOT, example, patients

LEFT_OUT = {
    r"python3 -m venv": "the set-up is what `.ci/run` does",
    r"^export PATH": "this test says what runs",
    r"harness data fetch|fetch-weights": "needs the internet",
    r"suite report": "needs runs of the suite; `tests/harness/cli/test_suite.py`",
    r"suite run": "minutes; `tests/harness/cli/test_suite.py`",
    r"leaderboard import": "needs results of other software; `tests/harness/runs/test_imported.py`",
    r"nnUNet_results|^ +--task msd_hippocampus --method \"nnU-Net": "the same",
    r"--backbone resenc|--preset nnunet|nnunet_hippocampus": "an hour; `tests/harness/cli/test_run.py`",
    r"--format nnssl|--format nnunet": "of a run of a network of nnU-Net; `tests/nnunet`",
    r"accelerate launch|torchrun|--launcher slurm|srun|SBATCH|scontrol|bin/bash": "needs a cluster; `pytest -m slurm`",
    r"pip install": "the set-up, too",
    r"--slurm |docker |apptainer |ssl-seg-harness run": "needs a container; `tests/test_containers.py`",
    r"sweep .*--(jobs|retry)": "hours, or nothing to do; `tests/harness/cli/test_sweep.py`",
    r"sweep mine.toml": "a file of the reader's",
    r"method\.weights|genesis_unet3d|inflate_stem": "needs weights from the internet; `tests/methods/test_official.py`",
    r"--task btcv|data (check|prepare) btcv|Dataset123_Mine": "needs data that nobody may pass on; `tests/tasks`",
    r"reproduce RUN_ID": "asks for the same revision; `tests/harness/cli/test_reproduce.py`",
}
"""Lines that are not run here, and why."""
STANDS_FOR = {
    "/path/to/MICCAI_BraTS2020_TrainingData": "data/brats",
    "/path/to/BraTS": "data/brats",
    "/path/to/Task09_Spleen": "data/Task09_Spleen",
    "--run brats-hybridmim": "--run brats-hybridmim-swinunetr",
    "/path/to/data": "data",
    "/path/to/patients": "patients",
    "lab_a/runs": "runs",
    "lab_b/runs": "runs",
    "RUN_ID": "msd_hippocampus-hybridmim-unet-demo-s1",
}
SHIM = f"""#!{sys.executable}
import sys
from harness.cli.main import main
from harness.config import resolve
combine = resolve._combine
def tiny(*arguments):
    values = combine(*arguments)
    for stage in ("pretrain", "finetune"):
        for field in ("epochs", "warmup_epochs"):
            values[stage].pop(field, None)
        values[stage] |= dict(steps=2, warmup_steps=0, crop=(32, 32, 64), workers=0)
    return values
resolve._combine = tiny
if __name__ == "__main__":  # children of a profile import this
    sys.exit(main())
"""
"""The command with budgets of two steps, whatever preset or setting is asked for."""


def lines(page):
    """The lines of a page's shell blocks that are run, with what stands for something of the reader's replaced."""
    for block in BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            if not any(re.search(pattern, line) for pattern in LEFT_OUT):
                for words, own in STANDS_FOR.items():
                    line = line.replace(words, own)
                yield line


SHOWN = [page for page in PAGES if any("harness " in line for line in lines(page))]


@pytest.fixture(scope="module")
def desk(tmp_path_factory) -> Path:
    """A folder with data, scans, plugins and runs, and a command `harness` with small budgets."""
    desk, registry = tmp_path_factory.mktemp("desk"), Registry()
    for name, cases in (("msd_hippocampus", 30), ("brats", 8), ("msd_spleen", 8)):
        task = replace(small(registry.task(name)), phantom_cases=cases)
        write_phantom(task, desk / "data" / ("brats" if name == "brats" else task.folder), cases, seed=0)
    rng = np.random.default_rng(0)
    for name in (
        "scan",
        "flair",
        "t1",
        "t1ce",
        "t2",
        *(f"folder_of_scans/p{n}_{c:04}" for n in (1, 2) for c in range(4)),
    ):
        (desk / name).parent.mkdir(exist_ok=True)
        write_image(desk / f"{name}.nii.gz", rng.normal(100, 20, (34, 36, 30)).astype(np.float32), np.eye(4))
    patients(desk / "patients", rng)
    for page, name in (("a_method", "denoise"), ("a_backbone", "segresnet_ds"), ("a_task", "lesions")):
        (desk / f"{name}.py").write_text(example(f"write_{page}.md", f"{name}.py"))
    (desk / "text.txt").write_text("What may be concluded: nothing.\n")
    (desk / "sweeps").symlink_to(ROOT / "sweeps")
    (desk / "bin").mkdir()
    (desk / "bin" / "harness").write_text(SHIM)
    (desk / "bin" / "harness").chmod(0o755)
    runs = [
        "for s in 0 1; do for m in scratch hybridmim; do harness run --method $m --task msd_hippocampus --seed $s; done; done"
    ]
    runs += ["harness run --method scratch --task msd_hippocampus --label-fraction 0.5"]
    execute(desk, runs)
    return desk


def execute(desk, commands):
    """Run the lines in bash, in the folder; the first that fails ends it."""
    environment = os.environ | {"PATH": f"{desk / 'bin'}:{os.environ['PATH']}", "HARNESS_DATA": str(desk / "data")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = "set -euxo pipefail\n" + "\n".join(commands)
    done = subprocess.run(
        ["bash", "-c", script], cwd=desk, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", SHOWN, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_of_a_page_run(page, desk):
    execute(desk, list(lines(page)))


def test_what_is_left_out_is_there_and_most_is_run():
    text = "\n".join(block.replace("\\\n", " ") for page in PAGES for block in BLOCK.findall(page.read_text()))
    for pattern in LEFT_OUT:
        assert re.search(pattern, text, re.MULTILINE), f"no page has a line with {pattern!r} any more"
    for reason in LEFT_OUT.values():
        assert all((ROOT / name).exists() for name in re.findall(r"`(tests/[^`]+)`", reason)), reason
    assert len(SHOWN) >= 9
    assert sum(line.count("harness ") for page in SHOWN for line in lines(page)) >= 40
