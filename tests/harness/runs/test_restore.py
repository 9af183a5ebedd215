"""A finished run's network, from a record that is not trusted."""

import json
import shutil

import pytest

from harness.cli.main import main
from tests.harness.commands import folder_of, harness, last_error

NESTED = "nested without end"
RECORD = {
    "spacing 0": lambda r: r["config"]["prepared"].update(spacing=[0, 1, 1]),
    "spacing negative": lambda r: r["config"]["prepared"].update(spacing=[-1, 1, 1]),
    "spacing tiny": lambda r: r["config"]["prepared"].update(spacing=[0.001] * 3),
    "spacing of two": lambda r: r["config"]["prepared"].update(spacing=[1, 1]),
    "spacing that overflows": lambda r: r["config"]["prepared"].update(spacing=[1e-200] * 3),
    "percentiles below 0": lambda r: r["config"]["prepared"].update(low=-5),
    "percentiles above 100": lambda r: r["config"]["prepared"].update(high=101),
    "window of one value": lambda r: r["config"]["prepared"].update(normalisation="Window", low=0, high=1e-45),
    "window without end": lambda r: r["config"]["prepared"].update(normalisation="Window", low=-1e308, high=1e308),
    "target without a label": lambda r: r["task_description"]["targets"].update(anterior=[]),
    "label in a list": lambda r: r["task_description"].update(labels=[[0], 1, 2]),
    "crop beyond the memory": lambda r: r["config"]["finetune"].update(crop=[3200000] * 3),
    "crop beyond 64 bits": lambda r: r["config"]["finetune"].update(crop=[32 * 10**30] * 3),
    "features beyond the memory": lambda r: r["config"]["backbone_settings"].update(features=[10**5] * 5),
    "nested": lambda r: r.update(config=NESTED),
    "window is text": lambda r: r["config"]["prepared"].update(low="x"),
    "unknown kind": lambda r: r["config"]["prepared"].update(normalisation="Exec"),
    "label 300": lambda r: r["task_description"]["targets"].update(anterior=[300]),
    "crop no multiple": lambda r: r["config"]["finetune"].update(crop=[32, 32, 33]),
    "no description": lambda r: r.pop("task_description"),
    "no such backbone": lambda r: r.update(backbone="os.system"),
    "other features": lambda r: r["config"]["backbone_settings"].update(features=[8, 8, 8, 8, 8]),
}


@pytest.mark.parametrize("kind", RECORD)
def test_records_are_not_trusted(kind, hippocampus_phantom, finished_simmim, tmp_path, capsys):
    (folder,) = [path.parent for path in finished_simmim.glob("*/record.json")]
    shutil.copytree(folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    RECORD[kind](record)
    text = json.dumps(record).replace(f'"{NESTED}"', "[" * 100_000 + "]" * 100_000)
    (tmp_path / "run" / "record.json").write_text(text)
    image = next((hippocampus_phantom / "imagesTr").iterdir())
    harness("predict", "--run", tmp_path / "run", image, tmp_path / "out.nii.gz", status=2)
    assert last_error(capsys).startswith("harness: error: ")
    assert not (tmp_path / "out.nii.gz").exists()


def test_a_window_that_the_memory_does_not_hold_is_said(
    predicted_runs, hippocampus_phantom, tmp_path, monkeypatch, capsys
):
    def full(*_):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 34359738368 bytes")

    folder = folder_of(predicted_runs, "scratch")
    monkeypatch.setattr("backbones.unet.UNet.forward", full)
    assert main(["export", "--run", str(folder), "--format", "safetensors", "--out", str(tmp_path / "out")]) == 2
    assert "a window of 32 x 32 x 64 voxels, the training crop, does not fit the memory" in capsys.readouterr().err
    image = next((hippocampus_phantom / "imagesTr").iterdir())
    assert main(["predict", "--run", str(folder), str(image), str(tmp_path / "out.nii.gz")]) == 2
    assert "does not fit the memory" in capsys.readouterr().err
