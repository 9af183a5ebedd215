"""Networks and volumes that several method tests use."""

import numpy as np
import torch

from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from backbones.unetr import UNETR


def unet(channels=1) -> UNet:
    torch.manual_seed(0)
    return UNet(UNet.Config(features=(4, 4, 8, 8, 16)), in_channels=channels)


def swin(channels=1) -> SwinUNETR:
    torch.manual_seed(0)
    config = SwinUNETR.Config(feature_size=12, window_size=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    return SwinUNETR(config, in_channels=channels)


def unetr(channels=1) -> UNETR:
    torch.manual_seed(0)
    config = UNETR.Config(image_size=(32, 64, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3)
    return UNETR(config, in_channels=channels)


def generator(seed=0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def images(n=2, channels=1, size=(32, 64, 32)) -> torch.Tensor:
    return torch.rand(n, channels, *size, generator=generator(1)) * 0.999 + 0.001


def image(channels=1, size=(40, 40, 20), seed=0) -> np.ndarray:
    return np.random.default_rng(seed).random((channels, *size), dtype=np.float32)
