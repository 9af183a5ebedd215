"""The loop on a GPU: resumed, out of memory, its peak of memory, and the options that change how a step is computed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.api.settings import build
from harness.cli.main import main
from harness.compute import memory
from harness.compute.processes import SingleProcess
from harness.config.request import Execution
from harness.config.schema import Training
from harness.conformance.fixture import BUDGET
from harness.training.checkpoints import Checkpoints
from harness.training.loop import StageContext, StagePlan, train
from harness.training.trainer import FINITE, compiled
from tests.gpu.fitted import Fitted, fit, same_draws

pytestmark = pytest.mark.gpu

ROOT = Path(__file__).parents[2]
STEPS = 20


class StoppedError(Exception):
    """In the middle of a training, as a crash would."""


def run_stage(name: str, backbone: str, folder: Path, device: torch.device, stop: int = 0, draws: Path | None = None):
    """A stage of the engine's own loop in a folder; `stop`: after that step everything ends without a word."""
    place = draws or folder
    place.mkdir(parents=True, exist_ok=True)
    subject = fit(name, backbone, place, device, STEPS)
    built = subject.built
    settings = {**BUDGET, "precision": "bf16", "crop": built.crop, "batch_size": built.batch, "steps": STEPS}

    def after_step(step: int) -> None:
        built.method.after_step(step)
        if step == stop:
            raise StoppedError

    context = StageContext(execution=Execution(checkpoint_minutes=0.0))
    data = built.data(STEPS * built.batch)
    plan = StagePlan("pretrain", build(Training, settings, "pretrain"), STEPS, warmup=3)
    accelerator, history = SingleProcess(device), folder / "history.jsonl"
    done = train(plan, built.method, data, history, accelerator, context, after_step)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    return built.method, lines, done


@pytest.fixture
def deterministic():
    """cuDNN may pick kernels that add in another order each time."""
    torch.backends.cudnn.deterministic = True
    yield
    torch.backends.cudnn.deterministic = False


# Their gradients are the same each time; HybridMIM's and those of max pooling (unet) are not.
@pytest.mark.parametrize(("name", "backbone"), [("simmim", "swinunetr"), ("voco", "segresnet")])
def test_a_resumed_training_equals_an_uninterrupted_one(name, backbone, device, tmp_path, deterministic, said):
    whole, lines, _ = run_stage(name, backbone, tmp_path / "a", device)
    again, _, _ = run_stage(name, backbone, tmp_path / "b", device)
    with pytest.raises(StoppedError):
        run_stage(name, backbone, tmp_path / "c", device, stop=17)
    resumed, resumed_lines, done = run_stage(name, backbone, tmp_path / "c", device)
    assert done.resumed == 1
    assert [line["step"] for line in resumed_lines] == list(range(1, STEPS + 1))
    spread, apart = (distance(whole, other) for other in (again, resumed))
    said(f"two uninterrupted trainings are {spread:.1e} apart, the resumed one {apart:.1e}")
    # Equal to the last bit where the device is.
    assert apart <= 10 * spread
    losses = np.array([[line["loss"] for line in each] for each in (lines, resumed_lines)])
    assert np.abs(losses[0] - losses[1]).max() <= (0 if spread == 0 else 0.1 * np.abs(losses[0]).max())


@pytest.mark.parametrize(("name", "backbone"), [("hybridmim", "unet"), ("hybridmim", "swinunetr"), ("transvw", "unet")])
def test_the_first_step_after_a_checkpoint_is_the_one_that_would_have_come(name, backbone, device, tmp_path):
    """Where gradients differ from run to run, two runs cannot be compared; from one state, one step can."""
    subjects = []
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        subjects.append(fit(name, backbone, tmp_path / place, device, precision="bf16"))
    first, second = subjects
    for number in range(1, 6):
        first.step(number)
    kept = Checkpoints(tmp_path / "kept", minutes=0)
    kept.save(5, first.trainer.state())
    (state,) = kept.candidates()
    second.trainer.load(state)
    assert distance(first.built.method, second.built.method) == 0
    terms = [{key: float(value) for key, value in subject.step(6).items()} for subject in subjects]
    # The forward pass with its masks and dropout to the last bit, the step after it as far as its gradient's rounding goes.
    assert terms[0] == terms[1]
    assert distance(first.built.method, second.built.method) <= 2.1 * BUDGET["lr"]
    moments = [subject.trainer.optimizer.state_dict()["state"].values() for subject in subjects]
    pairs = [(a["exp_avg"], b["exp_avg"]) for a, b in zip(*moments, strict=True)]
    assert np.median([float((a - b).norm() / (a.norm() + 1e-12)) for a, b in pairs]) < 1e-2


def distance(one: torch.nn.Module, other: torch.nn.Module) -> float:
    """The largest difference of two weights or buffers."""
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return max(float((a.double() - b.double()).abs().max()) for a, b in pairs if a.numel())


@pytest.fixture
def little_memory(gpu):
    """Takes how many GiB the process may have; all of it afterwards."""

    def allow(gib: float) -> None:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(gib * 2**30 / torch.cuda.get_device_properties(gpu).total_memory)

    yield allow
    torch.cuda.set_per_process_memory_fraction(1.0)


WIDE = ("--set", "backbone.features=32,32,64,128,256")
STAGE = ("steps=2", "warmup_steps=0", "crop=96,96,96", "batch_size=4")


def words(root: Path, runs: Path, *more: str) -> list[str]:
    """A run on a phantom whose steps take some GiB."""
    settings = [word for stage in ("pretrain", "finetune") for pair in STAGE for word in ("--set", f"{stage}.{pair}")]
    request = ["--method", "hybridmim", "--task", "msd_hippocampus", "--data", str(root), "--runs", str(runs)]
    return [*request, *WIDE, *settings, *more]


def test_out_of_memory_ends_with_advice_that_holds(little_memory, hippocampus_phantom, tmp_path, capsys):
    given = words(hippocampus_phantom, tmp_path, "--set", "pretrain.precision=fp32", "--set", "finetune.precision=fp32")
    little_memory(3.0)
    assert main(["run", *given]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("harness: error:")]
    assert len(lines) == 1
    assert "pretrain does not fit the memory of cuda with crops of 96x96x96, 4 a step, in fp32" in lines[0]
    told = lines[0].partition("tried and found to fit: ")[2].partition(" (the same result)")[0]
    assert told, lines[0]
    # What it advises is tried.
    assert main(["run", *given, *told.split(), "--until", "pretrain"]) == 0


def test_the_memory_of_a_run_is_what_was_estimated(gpu, hippocampus_phantom, tmp_path, said):
    given = words(hippocampus_phantom, tmp_path, "--json")
    found = []
    for command in ("estimate", "run"):
        done = subprocess.run(
            [sys.executable, "-m", "harness", command, *given],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])},
        )
        assert done.returncode == 0, done.stderr
        found.append(json.loads(done.stdout))
    estimated, used = found[0][0]["device_gib"], found[1]["memory"]["run"]["device_peak_gib"]
    said(f"device peak estimated {estimated:.2f} GiB, used {used:.2f} GiB")
    assert used > 0.5
    assert estimated == pytest.approx(used, rel=0.1)


def seconds(subject: Fitted, number: int = 20) -> float:
    """Median of a step, by the engine's own clock."""
    batch, clock = subject.batch(1), subject.trainer.clock
    for step in range(1, number + 6):
        subject.step(step, batch)
    clock.read()
    phases = [clock.seconds[phase][5:] for phase in ("forward", "backward", "optimizer")]
    return float(np.median(np.sum(phases, axis=0)))


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
@pytest.mark.parametrize("option", ["channels_last", "compile"])
def test_an_option_changes_no_loss(option, backbone, device, tmp_path, said):
    losses, times = [], []
    for wanted in (False, True):
        folder = tmp_path / str(wanted)
        folder.mkdir()
        subject = fit("hybridmim", backbone, folder, device, **{option: wanted})
        with same_draws(), compiled(subject.trainer.module, option == "compile" and wanted):
            losses.append(subject.losses(range(1, 6)))
            times.append(seconds(subject))
    apart = np.abs(np.subtract(*losses)) / np.abs(losses[0])
    said(
        f"losses {apart.max():.1e} apart; a small step takes {times[0] * 1e3:.1f} ms without, {times[1] * 1e3:.1f} ms with"
    )
    assert apart[0] < 1e-3
    assert apart.max() < 2e-2


def test_fused_adamw_is_adamw(device, tmp_path):
    """A step's update, against the same gradients and torch's plain AdamW on the CPU in double precision."""
    subject = fit("simmim", "unet", tmp_path, device)
    trainer = subject.trainer
    assert trainer.used()["optimizer"] == "fused AdamW"
    groups = trainer.optimizer.param_groups
    copies = [[p.detach().cpu().double().requires_grad_() for p in group["params"]] for group in groups]
    plain = torch.optim.AdamW(
        [{"params": own, "weight_decay": group["weight_decay"]} for own, group in zip(copies, groups, strict=True)],
        fused=False,
        foreach=False,
    )
    for number in (1, 2, 3):
        subject.step(number)
        for own, group, mine in zip(copies, groups, plain.param_groups, strict=True):
            mine["lr"] = group["lr"]
            for p, given in zip(own, group["params"], strict=True):
                p.grad = None if given.grad is None else given.grad.detach().cpu().double()
        plain.step()
    pairs = [
        (p, q) for own, group in zip(copies, groups, strict=True) for p, q in zip(own, group["params"], strict=True)
    ]
    assert max(float((p.detach() - q.detach().cpu().double()).abs().max()) for p, q in pairs) < 1e-6


def test_a_step_that_is_not_finite_changes_nothing_before_the_host_reads_of_it(device, tmp_path):
    """The host reads every tenth step; until then the device itself leaves the weights as they were."""
    subject = fit("simmim", "unet", tmp_path, device)
    for step in (1, 2):
        subject.step(step)
    before = [value.detach().clone() for value in subject.trainer.trained]
    bad = {name: torch.full_like(value, torch.nan) for name, value in subject.batch(3).items()}
    found = [subject.step(3, bad), subject.step(4), subject.step(5)]
    assert [bool(terms[FINITE]) for terms in found] == [False, True, True]
    assert all(torch.equal(a, b) for a, b in zip(before, subject.trainer.trained, strict=True))


def test_peak_memory_is_the_devices(gpu):
    torch.cuda.reset_peak_memory_stats(gpu)
    kept = torch.empty(2**28, dtype=torch.uint8, device=gpu)
    assert memory.peak_memory(gpu)["device_peak_gib"] >= 0.25
    del kept
