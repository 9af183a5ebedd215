"""The picture after pre-training: what the method sees, and worth no run."""

from types import SimpleNamespace

import pytest
import torch

from harness.training.pretrain import _draw_restoration
from tests.harness.commands import folder_of


class Shower:
    def __init__(self, error):
        self.error, self.generator = error, torch.Generator()

    def eval(self):
        return self

    def show(self, batch):
        raise self.error


CONFIG = SimpleNamespace(seed=0, pretrain=SimpleNamespace(batch_size=2))
DATA = [{"image": torch.zeros(1, 2, 2, 2)}] * 3


def test_a_picture_that_does_not_fit_the_memory_is_left_out(tmp_path, capsys):
    path = tmp_path / "restoration.png"
    _draw_restoration(Shower(torch.OutOfMemoryError("CUDA out of memory")), DATA, CONFIG, torch.device("cpu"), path, "")
    assert "no restoration.png: its crops do not fit the memory of cpu" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("error", [RuntimeError("shapes"), KeyError("shapes")])
def test_another_fault_in_a_picture_is_said_and_costs_no_training(error, tmp_path, capsys):
    _draw_restoration(Shower(error), DATA, CONFIG, torch.device("cpu"), tmp_path / "a.png", "")
    said = capsys.readouterr().err
    assert f"no a.png: {type(error).__name__}: " in said
    assert "shapes" in said


def test_a_run_has_a_picture_of_what_its_method_sees(predicted_runs):
    assert (folder_of(predicted_runs, "simmim") / "figures" / "restoration.png").read_bytes().startswith(b"\x89PNG")
    assert not (folder_of(predicted_runs, "scratch") / "figures" / "restoration.png").exists()
