"""Predicts probabilities for a preprocessed image, by overlapping windows."""

from collections.abc import Sequence
from functools import partial
from itertools import combinations

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.api.task import Task
from harness.compute import devices
from harness.compute.layers import prepare_module
from harness.config.schema import Evaluate, Training

MIRRORED = [axes for number in range(4) for axes in combinations((2, 3, 4), number)]
"""The axes of a batch of volumes that each of the 8 mirror images turns round; the first turns none."""


@torch.inference_mode()
def predict(
    task: Task, network: nn.Module, image: NDArray[np.float32], trained: Training, settings: Evaluate
) -> NDArray[np.float32]:
    """A preprocessed image (C, x, y, z) -> probabilities (outputs, x, y, z) on the same grid, by sliding windows.

    Windows have the extent, precision and memory layout that the network was `trained` with. Logits are averaged over windows
    (by a Gaussian weight) and, with `settings.mirror`, over the mirror images of each window.
    """
    device = next(network.parameters()).device
    bf16 = devices.precision(trained.precision, device) == "bf16"
    layout = torch.channels_last_3d if trained.channels_last else torch.contiguous_format
    devices.keep_memory()
    prepare_module(network.eval(), device, trained.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = sliding_window_inference(
            torch.from_numpy(image)[None].to(device),
            roi_size=trained.crop,
            sw_batch_size=2,
            predictor=partial(_logits, network, layout, MIRRORED if settings.mirror else MIRRORED[:1]),
            overlap=settings.overlap,
            mode="gaussian",
        )
    assert isinstance(logits, Tensor)
    probabilities = logits.sigmoid() if task.overlapping else logits.softmax(dim=1)
    array: NDArray[np.float32] = probabilities[0].float().cpu().numpy()
    return array


def _logits(
    network: nn.Module, layout: torch.memory_format, mirrored: Sequence[tuple[int, ...]], window: Tensor
) -> Tensor:
    """Mean logits of windows (N, C, x, y, z) over their mirror images."""
    images = (network(window.flip(axes).to(memory_format=layout)).float().flip(axes) for axes in mirrored)
    return sum(images, torch.zeros(())) / len(mirrored) if len(mirrored) > 1 else next(images)
