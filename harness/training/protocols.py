"""Protocols of fine-tuning: the weights that training with labels may change.

They are the whole network, all but its encoder, or one layer on top of the frozen encoder.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from harness.api.backbone import Backbone, Pyramid
from harness.config.request import FinetuneProtocol
from harness.system.files import digest_chunks


class LinearProbe(nn.Module):
    """One 1x1x1 convolution on the feature pyramid of a frozen encoder; decoder and head are not used.

    The convolution acts on each level of the pyramid before the level is upsampled (trilinear) to the image. This gives the
    same sum as the opposite order at a fraction of the cost, because both steps are linear and the weights of the
    interpolation add up to one.
    """

    def __init__(self, backbone: Backbone, num_outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.probe = nn.Conv3d(sum(backbone.channels), num_outputs, 1)

    def forward(self, image: Tensor) -> Tensor:
        """(N, C, x, y, z) -> logits (N, num_outputs, x, y, z)."""
        with torch.no_grad():
            pyramid = self.backbone.encode(image)
        bias = self.probe.bias
        assert bias is not None
        return self.logits(pyramid, self.probe.weight.flatten(1), bias, image.shape[2:])

    def logits(self, pyramid: Pyramid, weight: Tensor, bias: Tensor, size: torch.Size) -> Tensor:
        """Logits (N, num_outputs, x, y, z) of the layer with this weight (num_outputs, channels of all levels) and bias.

        Args:
            size: extent of the image.
        """
        logits = bias.view(1, -1, 1, 1, 1)
        for features, part in zip(pyramid, weight.split(self.backbone.channels, dim=1), strict=True):
            level = F.conv3d(features, part[:, :, None, None, None].to(features.dtype))
            logits = logits + F.interpolate(level, size, mode="trilinear", align_corners=False)
        return logits


def with_head(backbone: Backbone, num_outputs: int, protocol: FinetuneProtocol) -> nn.Module:
    """The network that is trained and evaluated, image -> logits, with a new head. Fixed modules get no gradients."""
    if protocol == "linear":
        backbone.requires_grad_(False)
        return LinearProbe(backbone, num_outputs)
    backbone.set_head(num_outputs)
    if protocol == "frozen":
        for module in fixed(backbone, protocol):
            module.requires_grad_(False)
    return backbone


def fixed(network: nn.Module, protocol: FinetuneProtocol) -> tuple[nn.Module, ...]:
    """Modules that training must not change; they stay in evaluation mode, so that running statistics do not change either."""
    if isinstance(network, LinearProbe):
        return (network.backbone,)
    if protocol == "frozen":
        assert isinstance(network, Backbone)
        return tuple(getattr(network, child) for child in network.parts["encoder"])
    return ()


def digest_modules(modules: Iterable[nn.Module]) -> str:
    """Digest of all parameters and buffers, with their names."""
    return digest_chunks(chunk for module in modules for chunk in _chunks(module))


def _chunks(module: nn.Module) -> Iterator[bytes]:
    """Name, shape, type and bytes of every parameter and buffer, sorted by name."""
    for name, value in sorted(module.state_dict().items()):
        yield f"{name} {tuple(value.shape)} {value.dtype};".encode()
        yield value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
