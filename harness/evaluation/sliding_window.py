"""Predicts probabilities for a preprocessed image, by overlapping windows."""

import numpy as np
import torch
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn

from harness.api.task import Task
from harness.compute import devices
from harness.compute.layers import prepare_module
from harness.config.schema import Evaluate, Training


@torch.inference_mode()
def predict(
    task: Task, network: nn.Module, image: NDArray[np.float32], trained: Training, settings: Evaluate
) -> NDArray[np.float32]:
    """A preprocessed image (C, x, y, z) -> probabilities (outputs, x, y, z) on the same grid, by sliding windows.

    Windows have the extent, precision and memory layout that the network was `trained` with.
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
            predictor=lambda window: network(window.to(memory_format=layout)).float(),
            overlap=settings.overlap,
            mode="gaussian",
        )
    assert isinstance(logits, Tensor)
    probabilities = logits.sigmoid() if task.overlapping else logits.softmax(dim=1)
    array: NDArray[np.float32] = probabilities[0].float().cpu().numpy()
    return array
