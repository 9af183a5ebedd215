"""Our steps of nnU-Net's augmentation beside those of batchgeneratorsv2, with the same parameters.

HARNESS_NNUNET_PYTHON=nnunet/bin/python pytest -m nnunet tests/nnunet/test_augmentation.py
"""

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from harness.data.crops import Warp
from harness.training import augmentation

SIZE = (12, 10, 8)


class Given:
    """A generator whose only draw is given; factors are below one."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return 0.0

    def uniform(self, low, high, size=None):
        assert low <= np.min(self.value) <= np.max(self.value) <= high
        return self.value


@pytest.mark.nnunet
def test_each_step_is_that_of_batchgeneratorsv2(tmp_path):
    python = os.environ.get("HARNESS_NNUNET_PYTHON")
    if not python:
        pytest.skip("set HARNESS_NNUNET_PYTHON to the Python of an environment with nnunetv2")
    rng = np.random.default_rng(0)
    turn = augmentation._rotation(0, 0.3) @ augmentation._rotation(1, -0.4) @ augmentation._rotation(2, 0.2)
    warp = Warp(turn * 1.2)
    extent = [edge + 2 * more for edge, more in zip(SIZE, warp.margin(SIZE), strict=True)]
    image, larger = (rng.normal(size=shape).astype(np.float32) for shape in (SIZE, extent))
    label = rng.integers(0, 3, [max(1, edge // 4) for edge in extent]).repeat(4, 0).repeat(4, 1).repeat(4, 2)
    label = np.pad(label, [(0, edge - size) for edge, size in zip(extent, label.shape, strict=True)]).astype(np.uint8)
    case = {
        "image": torch.from_numpy(image)[None],
        "larger": torch.from_numpy(larger)[None],
        "label": torch.from_numpy(label.astype(np.int16))[None],
        "matrix": torch.from_numpy(warp.matrix),
        "size": list(SIZE),
    }
    torch.save(case, tmp_path / "case.pt")
    script = Path(__file__).with_name("batchgenerators_steps.py")
    subprocess.run([python, str(script), tmp_path / "case.pt", tmp_path / "out.pt"], check=True, timeout=300)
    theirs = {name: value[0].numpy() for name, value in torch.load(tmp_path / "out.pt", weights_only=True).items()}
    ours = {
        "gamma False": augmentation.change_gamma(image, Given(0.8), inverted=False),
        "gamma True": augmentation.change_gamma(image, Given(0.8), inverted=True),
        "contrast": augmentation.change_contrast(image, Given(0.8)),
        "resolution": augmentation.lower_resolution(image, Given(0.6)),
        "blur": augmentation.blur(image, Given(np.array([0.5, 0.75, 1.0]))),
        "warp": warp.image(larger[None], SIZE)[0],
    }
    for name, values in ours.items():
        # Its kernel of a blur is cut off earlier than scipy's.
        np.testing.assert_allclose(values, theirs[name], atol=3e-3 if name == "blur" else 2e-5, err_msg=name)
    # Where two labels weigh the same, the two choose differently.
    assert (warp.label(label, SIZE) == theirs["label"]).mean() > 0.99
