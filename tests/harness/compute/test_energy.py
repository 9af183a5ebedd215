"""Energy from counters that a test turns: packages, wrap-around, what is missing, and what a stage records."""

import json

import pytest
import torch

from harness.compute import energy
from harness.compute.energy import EnergyMeter
from tests.harness.commands import make_run

CPU = torch.device("cpu")


def write_package(folder, number, microjoules, span=1_000_000):
    package = folder / f"intel-rapl:{number}"
    package.mkdir(parents=True, exist_ok=True)
    (package / "max_energy_range_uj").write_text(f"{span}\n")
    (package / "energy_uj").write_text(f"{microjoules}\n")
    return package


def test_packages_are_added_up_and_their_parts_are_not(tmp_path):
    for number, value in (("0", 100), ("1", 500), ("0:0", 7)):
        write_package(tmp_path, number, value)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    assert (meter.joules, meter.sources) == (0, ["rapl"])
    for number, value in (("0", 300_100), ("1", 400_500), ("0:0", 900_000)):
        write_package(tmp_path, number, value)
    meter.sample(now=True)
    assert meter.joules == pytest.approx(0.7)
    meter.sample(now=True)
    assert meter.joules == pytest.approx(0.7)


def test_a_counter_that_starts_again_loses_nothing(tmp_path):
    write_package(tmp_path, "0", 900_000)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    write_package(tmp_path, "0", 100_000)
    meter.sample(now=True)
    assert meter.joules == pytest.approx(0.2)


def test_counters_are_not_read_at_every_step(tmp_path, monkeypatch):
    moment = [0.0]
    monkeypatch.setattr(energy.time, "monotonic", lambda: moment[0])
    write_package(tmp_path, "0", 0)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    write_package(tmp_path, "0", 500_000)
    meter.sample()
    assert meter.joules == 0
    moment[0] = energy.EVERY
    meter.sample()
    assert meter.joules == pytest.approx(0.5)


def test_what_is_not_known_is_none(tmp_path):
    assert EnergyMeter(CPU, powercap=tmp_path / "nothing").joules is None
    write_package(tmp_path, "0", 0)
    unreadable = write_package(tmp_path, "1", 0)
    (unreadable / "energy_uj").unlink()
    assert EnergyMeter(CPU, powercap=tmp_path).joules is None  # half of the packages is not the machine
    write_package(tmp_path, "1", 0)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    (unreadable / "energy_uj").unlink()
    meter.sample(now=True)
    assert meter.joules is None


def test_a_stage_that_goes_on_adds_what_it_had(tmp_path):
    write_package(tmp_path, "0", 0)
    meter = EnergyMeter(CPU, powercap=tmp_path)
    meter.go_on(3.0)
    write_package(tmp_path, "0", 250_000)
    meter.sample(now=True)
    assert meter.joules == pytest.approx(3.25)
    meter.go_on(None)
    assert meter.joules is None


def test_gpus_are_counted_by_their_identity(tmp_path, monkeypatch):
    used = {"GPU-a": 1000, "GPU-b": 2000}
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: type("P", (), {"uuid": "ab"[index]}))
    monkeypatch.setattr(energy.pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(energy.pynvml, "nvmlDeviceGetHandleByUUID", lambda identity: identity.decode())
    monkeypatch.setattr(energy.pynvml, "nvmlDeviceGetTotalEnergyConsumption", used.__getitem__)
    meter = EnergyMeter(torch.device("cuda"), processes=2, powercap=tmp_path)
    used |= {"GPU-a": 3000, "GPU-b": 2500}
    meter.sample(now=True)
    assert (meter.joules, meter.sources) == (pytest.approx(2.5), ["nvml"])


def test_a_run_records_the_energy_of_its_stages(tmp_path, hippocampus_phantom, monkeypatch):
    write_package(tmp_path / "power", "0", 0)
    counter = iter(range(0, 10**9, 3_600_000))
    monkeypatch.setattr(energy, "POWERCAP", tmp_path / "power")
    monkeypatch.setattr(energy, "_package", lambda _: energy._increments(lambda: next(counter), 1.0, 2**40))
    run = make_run(tmp_path / "runs", hippocampus_phantom, "simmim")
    record = json.loads((run / "record.json").read_text())
    # One read when the stage begins, one at its end: 3.6 MJ are 1 kWh.
    assert record["energy"] == {"pretrain_kwh": 1.0, "finetune_kwh": 1.0, "counted": ["rapl"]}
