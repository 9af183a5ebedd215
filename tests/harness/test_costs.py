"""`harness profile` and `harness estimate`: what they print is what was measured, and wrong input is refused in a line."""

import csv
import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from harness.cli.main import main
from harness.config.request import Request
from harness.costs import profile, trial
from harness.costs.estimate import Estimator, render
from harness.costs.profile import measure, summarise
from harness.costs.trial import FLASH_ON_CPU, OUT_OF_MEMORY, TrialResult, TrialSpec, resolve_trial, sdpa_flops
from leaderboards import profiles
from tests.conftest import TINY, TINY_BUDGET

SMALL = ("backbone.features=4,4,8,8,8", "pretrain.crop=32,32,32", "finetune.crop=32,32,32")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Milliseconds of steps instead of seconds, and no process for the peak of memory."""
    monkeypatch.setattr(profile, "ROUND_SECONDS", 0.02)
    monkeypatch.setattr(profile, "LOOP_SECONDS", 0.1)

    def here(each: TrialResult) -> None:
        answer = trial._two_steps(each.spec.request, each.spec.stage, torch.get_num_threads())
        each.flops, each.parameters, each.memory = answer

    monkeypatch.setattr(profile, "measure_apart", here)
    monkeypatch.setattr("harness.costs.estimate.measure_apart", here)


def request(method="hybridmim", *settings, **changes) -> Request:
    return replace(Request(method=method, task="msd_hippocampus", settings=(*SMALL, *settings)), **changes)


def words(*more):
    settings = [word for pair in SMALL for word in ("--set", pair)]
    return ["profile", "--method", "hybridmim", "--task", "msd_hippocampus", "--rounds", "2", *settings, *more]


def test_profile_writes_table_csv_and_figure(tmp_path, capsys):
    out = tmp_path / "new" / "steps.csv"
    assert main(words("--set", "method.region=32,16,32", "--compare", "partial", "whole", "--out", str(out))) == 0
    printed = capsys.readouterr().out
    assert "hybridmim, partial, unet, 32x32x32 x 2, fp32" in printed
    with out.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == profiles.COLUMNS
    partial, whole = rows
    assert (partial["variant"], whole["variant"]) == ("partial", "whole")
    assert float(partial["gflop"]) < float(whole["gflop"])
    for row in rows:
        step = sum(float(row[f"{phase}_ms_p50"]) for phase in ("forward", "backward", "optimizer"))
        assert float(row["step_ms_p50"]) == pytest.approx(step, rel=0.3)
        assert float(row["step_ms_p95"]) >= float(row["step_ms_p50"])
        assert float(row["samples_per_s"]) == pytest.approx(2000 / float(row["step_ms_p50"]), rel=1e-3)
        assert int(row["rounds"]) == 2
        assert float(row["host_peak_gib"]) > 0
        assert row["device_peak_gib"] == ""
    assert float(partial["first_over_this"]) == 1
    picture = out.with_suffix(".png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert out.with_suffix(".svg").exists()


def test_crops_batches_and_precisions_are_combined(tmp_path, capsys):
    axes = ["--precision", "fp32", "--precision", "bf16", "--batch", "2", "--batch", "3", "--json"]
    assert main(words(*axes, "--out", str(tmp_path / "a.csv"))) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["batch_size"], row["precision"]) for row in rows] == [
        *((2, "fp32"), (2, "bf16"), (3, "fp32"), (3, "bf16"))
    ]
    assert all(row["gemm_tflop_per_s"] > 0 for row in rows)


def test_a_sweep_is_profiled_without_its_controls(tmp_path, capsys):
    file = tmp_path / "two.toml"
    settings = {pair.partition("=")[0]: pair.partition("=")[2] for pair in SMALL}
    listed = ", ".join(f'"{key}" = "{value}"' for key, value in settings.items())
    file.write_text(
        f'[defaults]\ntask = "msd_hippocampus"\nsettings = {{ {listed} }}\n'
        '[[matrix]]\nmethod = "scratch"\n[[matrix]]\nmethod = ["simmim", "volume_fusion"]\n'
    )
    assert main(["profile", "--sweep", str(file), "--rounds", "1", "--runs", str(tmp_path / "runs")]) == 0
    said = capsys.readouterr()
    assert "left out: method 'scratch' pre-trains nothing" in said.err
    with (tmp_path / "runs" / "profiles" / "two.csv").open(newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)] == ["simmim", "volume_fusion"]


def test_fine_tuning_can_be_profiled(tmp_path):
    spec = resolve_trial(request("scratch"), "finetune")
    found, rates = measure([spec], rounds=1)
    (row,) = summarise(found, rates)
    assert row["stage"] == "finetune"
    assert row["step_ms_p50"] > 0


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--compare", "whle"], "'whole'"),
        (["--method", "scratch"], "pre-trains nothing"),
        (["--backbone", "unnet"], "'unet'"),
        (["--precision", "fp8"], "pretrain.precision=fp8"),
        (["--crop", "33"], "pretrain.crop"),
        (["--out", "steps.txt"], ".csv"),
        (["--rounds", "0"], "--rounds"),
        (["--sweep", "none.toml"], "leave out --method"),
    ],
)
def test_wrong_input_is_one_line(more, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*words(), *more]) == 2
    error = capsys.readouterr().err
    assert said.strip("'") in error
    assert len([line for line in error.splitlines() if line.startswith("harness")]) == 1


def test_flops_are_counted_with_attention_on_a_cpu():
    counter = FlopCounterMode(display=False, custom_mapping={FLASH_ON_CPU: sdpa_flops})
    q = torch.rand(2, 3, 64, 16)
    with counter, torch.no_grad():
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    # Two products of 64 x 64 x 16 for each of six heads.
    assert counter.get_total_flops() == 2 * 2 * 6 * 64 * 64 * 16


def test_flops_of_a_step_are_those_of_its_convolutions():
    """The first convolution's backward pass makes no gradient of the image: 2 times its forward, 3 times for the others."""
    spec = resolve_trial(request("scratch"), "finetune")
    flops, parameters, _ = trial._two_steps(spec.request, "finetune", torch.get_num_threads())
    network = spec.plugins.new_backbone(spec.config, 1)
    network.set_head(spec.task.num_outputs)
    assert parameters == sum(parameter.numel() for parameter in network.parameters())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network(torch.rand(2, 1, 32, 32, 32))
    first = 2 * 27 * 4 * 2 * 32**3
    assert flops == pytest.approx(3 * counter.get_total_flops() - first, rel=1e-4)


def test_noise_is_named():
    row = {"noisy": True, "spread": 0.5, "ceiling_spread": 0.1, "problem": "", "precision": "fp32", "machine": "m"}
    row |= {"threads": 2, "torch": "2", "gemm_tflop_per_s": 1.0, "convolution_tflop_per_s": 1.0, "copy_gb_per_s": 1.0}
    row |= {"data_wait_share": 0.2, "workers": 0, "workers_needed": 3, "sample_ms": 30.0, "stage": "pretrain"}
    row |= {"settings": "", "variant": "", "method": "m", "backbone": "b", "crop": "8x8x8", "batch_size": 2}
    remarks = " ".join(profiles.remarks([row]))
    assert "NOISY: from round to round medians differ by up to 50% in 1 of 1 rows" in remarks
    assert "20% of the loop waits for data" in remarks
    assert "set pretrain.workers=4" in remarks


def test_spread_of_rounds():
    assert profile._spread([[1.0, 1.0], [1.1, 1.1], [0.9, 5.0, 0.9]]) == pytest.approx(0.2)


def test_what_does_not_fit_the_memory_is_a_row(monkeypatch, capsys):
    def full(each: TrialResult) -> None:
        each.problem = OUT_OF_MEMORY if each.spec.settings.batch_size == 3 else ""

    monkeypatch.setattr(profile, "measure_apart", full)
    cells = [resolve_trial(request("simmim", f"pretrain.batch_size={size}")) for size in (2, 3)]
    rows = summarise(*measure(cells, rounds=1))
    assert [row["problem"] for row in rows] == ["", "out of memory"]
    assert "out of memory" in profiles.render(rows)


def test_a_torch_allocation_that_fails_is_out_of_memory():
    each = TrialResult(resolve_trial(request()))
    with trial.out_of_memory(each):
        torch.empty(2**60, dtype=torch.uint8)
    assert each.problem == OUT_OF_MEMORY
    with pytest.raises(RuntimeError, match="other"), trial.out_of_memory(each):
        raise RuntimeError("other")


def test_text_of_settings_is_no_formula(tmp_path):
    profiles.write([{"method": "=cmd()", "settings": "@x", "problem": ""}], tmp_path / "p.csv")
    text = (tmp_path / "p.csv").read_text()
    assert "'=cmd()" in text
    assert "'@x" in text


def test_estimate_says_what_a_run_takes(tmp_path, capsys, hippocampus_phantom):
    """Against the run itself: the same stages, within what two busy cores vary; then it is finished, and costs nothing."""
    runs = tmp_path / "runs"
    settings = [word for pair in (*TINY["unet"], *TINY_BUDGET, "pretrain.steps=30") for word in ("--set", pair)]
    common = ["--method", "hybridmim", "--task", "msd_hippocampus", *settings]
    common += ["--data", str(hippocampus_phantom), "--runs", str(runs)]
    assert main(["estimate", *common, "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert set(found["seconds"]) == {"prepare", "pretrain", "method_prepare", "finetune", "evaluate"}
    assert not list(runs.glob("*/record.json"))
    assert main(["run", *common, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert 0.2 < found["seconds"]["pretrain"] / record["timing"]["seconds"]["pretrain"] < 5
    weights = next(runs.glob("msd_*/weights.safetensors")).stat().st_size
    assert found["disk"] > weights
    assert main(["estimate", *common]) == 0
    assert "finished" in capsys.readouterr().out


def test_estimate_counts_a_shared_pre_training_once(tmp_path, hippocampus_phantom):
    settings = (*TINY["unet"], *TINY_BUDGET)
    base = request("simmim", runs=tmp_path, data=hippocampus_phantom, settings=settings)
    estimator = Estimator()
    first, second = (estimator.estimate(replace(base, label_fraction=share)) for share in (1.0, 0.5))
    assert "pretrain" in first.seconds
    assert second.shared
    assert "pretrain" not in second.seconds
    assert second.seconds["prepare"] == 0
    assert "shared" in render([first, second])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--method", "hybridmim"], "needs --method and --task"),
        (["--sweep", "x.toml", "--method", "m"], "leave out"),
        (["--method", "hybridmimm", "--task", "brats"], "hybridmim"),
        (["--sweep", "none.toml"], "cannot be read"),
    ],
)
def test_estimate_refuses_in_one_line(given, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["estimate", *given]) == 2
    assert said in capsys.readouterr().err


def test_variants_are_settings_of_the_method(registry):
    """What `--compare` offers must be accepted by every method that states it."""
    for name in registry.names("method"):
        for variant in registry.load("method", name).variants:
            assert isinstance(resolve_trial(request(name, "pretrain.batch_size=2"), variant=variant), TrialSpec)


MEASURE = """
from harness.compute.memory import peak_memory
import torch
print(peak_memory(torch.device("cpu"))["host_peak_gib"])
"""


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="elsewhere a process does not inherit its parent's peak"
)
def test_peak_memory_is_the_process_own():
    """What was large is whoever started it, as after an earlier cell of a profile."""
    big = torch.ones(2**28)  # 1 GiB
    assert big.sum() > 0
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.9


def test_estimate_of_what_does_not_fit_says_so_in_json_too(tmp_path, capsys, monkeypatch, hippocampus_phantom):
    monkeypatch.setattr("harness.costs.estimate.measure_apart", lambda each: setattr(each, "problem", OUT_OF_MEMORY))
    settings = [word for pair in (*TINY["unet"], *TINY_BUDGET) for word in ("--set", pair)]
    words = [
        "estimate",
        "--method",
        "simmim",
        "--task",
        "msd_hippocampus",
        "--data",
        str(hippocampus_phantom),
        *settings,
    ]
    words += ["--runs", str(tmp_path)]
    assert main([*words, "--json"]) == 2
    (found,) = json.loads(capsys.readouterr().out)
    assert found["problem"] == "finetune: out of memory"
    assert main(words) == 2
    assert "out of memory" in capsys.readouterr().out
