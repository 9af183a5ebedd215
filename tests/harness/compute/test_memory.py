"""What torch refuses is recognised, weights are counted before they are made, and peaks are those of this process."""

import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from torch import nn

from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from harness import UserError
from harness.compute import memory
from harness.compute.memory import is_out_of_memory, is_too_large, peak_memory, weights_bytes

CPU = torch.device("cpu")


def raised(work) -> Exception:
    with pytest.raises(Exception) as error:  # noqa: PT011 - torch's own, of any kind
        work()
    return error.value


def test_too_little_memory_is_told_from_other_errors():
    assert is_out_of_memory(raised(lambda: torch.empty(2**50)))
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(raised(lambda: torch.ones(2) @ torch.ones(3)))


@pytest.mark.parametrize(
    "work",
    [
        lambda: torch.empty(2**50),
        lambda: torch.empty(2**62, 2**62),
        lambda: nn.Conv3d(10**9, 10**9, 3),
        lambda: torch.empty(10**50),
        lambda: np.empty(2**55),
    ],
)
def test_a_size_that_nothing_holds_is_too_large(work):
    assert is_too_large(raised(work))


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes differ"), TypeError("no number"), ValueError("overflow"), KeyError("x")]
)
def test_other_errors_are_not_about_sizes(error):
    assert not is_too_large(error)


@pytest.mark.parametrize(
    "build",
    [
        lambda: UNet(UNet.Config(features=(4, 4, 8, 8, 8)), 1),
        lambda: SwinUNETR(SwinUNETR.Config(depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1)), 2),
        lambda: nn.Sequential(nn.Linear(3, 4, dtype=torch.float64), nn.BatchNorm1d(4)),
    ],
)
def test_weights_are_counted_before_they_are_made(build):
    state = build().state_dict()
    assert weights_bytes(build) == sum(value.nbytes for value in state.values())


def test_a_network_larger_than_any_memory_is_counted_and_not_made():
    assert weights_bytes(lambda: nn.Linear(2**20, 2**20, bias=False)) == 4 * 2**40


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Linear(2, 2).weight.detach().max().item()


def test_a_module_that_needs_values_says_nothing_and_a_size_that_cannot_be_raises():
    assert weights_bytes(Reads) == 0
    with pytest.raises((RuntimeError, TypeError, OverflowError)):
        weights_bytes(lambda: nn.Linear(2**62, 2**62))


def test_the_peak_of_the_host_grows_with_what_is_allocated():
    before, resident = peak_memory(CPU), psutil.Process().memory_info().rss / 2**30
    assert before["device_peak_gib"] is None
    assert before["host_peak_gib"] >= resident - 0.01
    wanted = before["host_peak_gib"] - resident + 0.125
    block = np.ones(int(wanted * 2**30), np.uint8)
    after = peak_memory(CPU)["host_peak_gib"]
    assert 0.05 < after - before["host_peak_gib"] < 0.25
    del block
    # Linux counts pages per core and adds the counts up later, so that the peak may shrink by a few of them per core.
    assert peak_memory(CPU)["host_peak_gib"] >= after - 0.005


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


@pytest.mark.parametrize(
    ("free_mib", "wanted", "fitting"), [(10_000, 4, 4), (64, 4, 2), (10, 4, 0), (64, 1, 1), (64, 0, 0)]
)
def test_no_more_loader_processes_than_the_shared_memory_holds(free_mib, wanted, fitting, monkeypatch, capsys):
    """A batch of 8 MiB, of which each process keeps two in advance and makes one."""
    memory.say_once.cache_clear()
    usage = SimpleNamespace(free=free_mib << 20)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
    sample = {"image": np.zeros((1, 1 << 20), np.float32)}
    assert memory.workers_that_fit(sample, 2, wanted) == fitting
    said = capsys.readouterr().err
    assert bool(said) is (fitting < wanted)
    assert not said or f"{free_mib} MiB free: {fitting} instead of {wanted} loader processes" in said


def test_a_folder_for_temporary_files_that_is_too_deep_for_sockets_is_refused(monkeypatch):
    """A loader process that cannot make its socket says nothing: the run waited for it without end."""
    monkeypatch.setattr(memory.tempfile, "gettempdir", lambda: "/tmp/" + "x" * 90)
    sample = {"image": np.zeros(8, np.float32)}
    with pytest.raises(UserError, match=r"TMPDIR=/tmp/xxx.* has 95 bytes, 75 is the most .*workers=0"):
        memory.workers_that_fit(sample, 1, 2)
    assert memory.workers_that_fit(sample, 1, 0) == 0
    monkeypatch.setattr(memory.tempfile, "gettempdir", lambda: "/tmp/" + "x" * 70)
    assert memory.workers_that_fit(sample, 1, 2) == 2
