"""Small networks that several backbone tests use."""

import torch

from harness.api.registry import Registry
from harness.api.settings import build

SMALL = {
    "unet": {"features": (4, 4, 8, 8, 16)},
    "swinunetr": {"feature_size": 12, "window_size": 4},
    "genesis_unet3d": {"first": 4},
    "segresnet": {"init_filters": 8},
    "unetr": {"image_size": (64, 32, 32), "feature_size": 4, "hidden_size": 24, "mlp_dim": 48, "num_heads": 3},
}


def make(name: str, in_channels: int = 2):
    cls = Registry().load("backbone", name)
    torch.manual_seed(0)
    return cls(build(cls.Config, SMALL.get(name, {}), "backbone"), in_channels)
