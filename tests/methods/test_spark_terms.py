"""SparK on real hippocampi: patches are learned (`pytest -m slow -s` prints the table)."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from methods.spark import normalised, to_patches
from tests.methods.pretext import learn
from tests.methods.spark_parts import voxels

# On real crops


def blurred(image, deviation):
    """Gaussian blur of (N, 1, x, y, z), with zeros outside."""
    reach = 3 * deviation
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * deviation**2))
    for axis in range(3):
        shape, padding = [1] * 5, [0] * 3
        shape[2 + axis], padding[axis] = -1, reach
        image = F.conv3d(image, kernel.view(shape), padding=padding)
    return image


def without_learning(method, crops) -> tuple[float, float]:
    """What two predictions without learning cost on `crops`, under the masks that `terms_on` draws.

    The first is 0. The second is the mean of visible neighbours, weighted by a Gaussian of 6 voxels, in each patch with mean 0
    and deviation 1, times the number that makes the loss as small as possible on these very crops.
    """
    method.generator.manual_seed(0)
    rows = []
    for batch in crops:
        image = batch["image"]
        hidden = method.draw_mask(image)
        visible = (~voxels(hidden, image)).float()
        neighbours = blurred(image * visible, 6) / blurred(visible, 6).clamp_min(1e-6)
        target, guess = (normalised(to_patches(values, method.patch))[0][hidden] for values in (image, neighbours))
        rows.append([target.square().mean(), (target * guess).mean(), guess.square().mean()])
    prior, product, square = np.mean(rows, axis=0)
    return float(prior), float(prior - product**2 / square)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_patches_of_real_hippocampi_are_learned(real_hippocampus, tmp_path):
    learned = learn(real_hippocampus, tmp_path, "spark", "unet", 300)
    prior, neighbours = without_learning(learned.method, learned.crops)
    before, after = learned.before["reconstruction"], learned.after["reconstruction"]
    print(f"\n| reconstruction | {prior:.4f} | {neighbours:.4f} | {before:.4f} | {after:.4f} |")
    assert abs(before - prior) < 0.02
    assert after < 0.75 * prior
    assert after < 0.85 * neighbours
