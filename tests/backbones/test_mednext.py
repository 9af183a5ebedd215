"""MedNeXt: MONAI's modules, keys and sizes."""

import pytest
import torch
from monai.networks.nets import mednext as monai_mednext

from backbones.mednext import MedNeXt
from tests.backbones.parts import check_dropout, check_levels_and_parts, small


def test_levels_and_parts():
    check_levels_and_parts("mednext", (4, 8, 16, 32, 64), (32, 16, 8, 4, 2), 4)
    check_dropout("mednext")


@pytest.mark.parametrize("size", "SBML")
@pytest.mark.parametrize("kernel", [3, 5])
def test_sizes_are_those_of_monai(size, kernel):
    with torch.device("meta"):
        ours = MedNeXt(MedNeXt.Config(size=size, kernel=kernel), in_channels=2)
        ours.set_head(3)
        theirs = monai_mednext.create_mednext(size, in_channels=2, out_channels=3, kernel_size=kernel)
    shapes = [{key: value.shape for key, value in network.state_dict().items()} for network in (ours, theirs)]
    # MONAI's output block has a tensor that only its checkpointing uses.
    assert shapes[0] == {key: value for key, value in shapes[1].items() if "dummy" not in key}


def test_outputs_are_those_of_monai():
    ours = small("mednext")
    ours.set_head(3)
    name, arguments = ours.monai(3)
    theirs = getattr(monai_mednext, name)(**arguments)
    theirs.load_state_dict(ours.state_dict())
    image = torch.rand(1, 2, 32, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(image), theirs.eval()(image), rtol=1e-5, atol=1e-6)
