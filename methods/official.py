"""Start from published weights instead of pre-training."""

import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import Field, FilePath
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness import Backbone, Method, Settings, Triple, UserError, inflate

CONTAINERS = ("state_dict", "model", "model_state_dict", "network_weights", "net")
PREFIXES = ("module.", "model.", "backbone.")
LONGEST_KEY = 1000  # prefixes are taken off one by one
# TransVW's checkpoint holds its best loss as a NumPy number, under the name that NumPy's module had then. Numbers only:
# arrays can hold objects.
_NUMBER = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
]


class Official(Method):
    """Published weights instead of pre-training, as the paper does for Models Genesis and TransVW.

    Source: HybridMIM, section IV-B ("as ModelGenesis and TransVW officially release their pre-trained model weights, we skip
    the pre-training step"). Reads, never executes:
      * Models Genesis' `Genesis_Chest_CT.pt` and TransVW's PyTorch checkpoint, for backbone `genesis_unet3d`;
      * MONAI's self-supervised SwinUNETR encoder (`module.` or `swin_vit.` prefixes, `mlp.fc1` names) and whole SwinUNETR
        state dicts, for backbone `swinunetr`;
      * state dicts of MONAI's BasicUNet, SegResNet and UNETR, for `unet`, `segresnet` and `unetr`;
      * `weights.safetensors` of any run or pre-training of this harness.

    Key names are turned into the backbone's by removing wrappers and by the backbone's own `aliases`. Everything that is not
    loaded is reported; where less than half of the encoder's parameters would be loaded, that is an error.
    """

    name = "official"
    reference = "cite the weights that you give"
    trains = ()

    class Config(Settings):
        weights: FilePath = Field(description="checkpoint (.pt, .pth, ... or .safetensors)")
        inflate_stem: bool = Field(
            False,
            description="repeat first convolutions of one channel for all modalities, divided by their number",
        )

    config: Config

    @classmethod
    def example(cls, backbone: Backbone, folder: Path) -> dict[str, Any]:
        path = folder / "example.safetensors"
        save_file(backbone.part_weights(("encoder", "decoder")), path)
        return {"weights": path}

    def check(self, crop: Triple, batch_size: int) -> None:
        self.weights()

    def weights(self) -> dict[str, Tensor]:
        """The file's tensors under the backbone's names, those included that do not fit (the transfer reports them).

        Raises:
            UserError: the file is no state dict, holds more than tensors, or gives less than half of the encoder.
        """
        own = self.backbone.state_dict()
        found = {self._rename(key, own): value for key, value in read_state_dict(self.config.weights).items()}
        if self.config.inflate_stem:
            found = {key: inflate(value, own[key].shape) if key in own else value for key, value in found.items()}
        encoder = {
            key: parameter.numel()
            for key, parameter in self.backbone.named_parameters()
            if self.backbone.part_of(key) == "encoder"
        }
        fits = {key for key, value in found.items() if key in own and own[key].shape == value.shape}
        share = sum(number for key, number in encoder.items() if key in fits) / sum(encoder.values())
        broken = [key for key in sorted(fits) if not torch.isfinite(found[key].float()).all()]
        if broken:
            raise UserError(
                f"method.weights={self.config.weights}: {broken[0]} is not finite ({len(broken)} tensors): give other weights"
            )
        if share < 0.5:
            raise UserError(self._refusal(share, [key for key in encoder if key not in fits], found, own))
        return found

    def _rename(self, key: str, own: dict[str, Tensor]) -> str:
        stripped = True
        while key not in own and stripped:
            stripped = False
            for prefix in PREFIXES:
                if key.startswith(prefix):
                    key, stripped = key.removeprefix(prefix), True
        if key in own:
            return key
        for pattern, replacement in self.backbone.aliases:
            key = re.sub(pattern, replacement, key)
        return key

    def _refusal(self, share: float, missing: list[str], found: dict[str, Tensor], own: dict[str, Tensor]) -> str:
        shown = [
            f"{key} is {tuple(found[key].shape)} there and {tuple(own[key].shape)} here"
            if key in found
            else f"{key} is not there"
            for key in missing[:3]
        ]
        foreign = [key for key in found if key not in own][:3]
        stem = any(
            key in found and found[key].shape[:1] + found[key].shape[2:] == own[key].shape[:1] + own[key].shape[2:]
            for key in missing
        )
        hint = "; method.inflate_stem=true repeats a stem of one channel for all modalities" if stem else ""
        return (
            f"method.weights={self.config.weights} gives {share:.0%} of the encoder of backbone {self.backbone.name!r}, at "
            f"least 50% are needed: {'; '.join(shown)}; unknown in the file: {', '.join(foreign) or 'nothing'}: choose the "
            f"backbone, and its settings, that the weights were made for{hint}"
        )


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, from safetensors or a PyTorch checkpoint, without executing anything in it.

    Raises:
        UserError: the file cannot be read so, unpacks to more than the memory that is free, or holds no tensors.
    """
    try:
        _check_size(path)
        if path.suffix == ".safetensors":
            return load_file(path)
        with torch.serialization.safe_globals(NUMBERS):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    # Foreign bytes make the readers raise nearly anything; whatever it is, the file is what is wrong.
    except Exception as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(
            f"method.weights={path} cannot be read as weights, {type(error).__name__}: {reason}; give a .safetensors file or "
            "a PyTorch checkpoint that holds tensors only (saving its state_dict alone makes one)"
        ) from None
    for _ in range(3):  # a few wrappers at most; a file may even contain itself
        if not isinstance(content, dict) or any(isinstance(value, Tensor) for value in content.values()):
            break
        content = next((content[name] for name in CONTAINERS if isinstance(content.get(name), dict)), {})
    items = content.items() if isinstance(content, dict) else ()
    tensors = {str(key): value for key, value in items if _usable(value) and len(str(key)) <= LONGEST_KEY}
    if not tensors:
        raise UserError(
            f"method.weights={path} holds no state dict (looked for {', '.join(CONTAINERS)}): save the network's state_dict"
        )
    return tensors


def _check_size(path: Path) -> None:
    """Raises UserError for a checkpoint whose members, which may be compressed, take more than the memory that is free."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        size = sum(member.file_size for member in packed.infolist())
    if size > (free := psutil.virtual_memory().available):
        raise UserError(
            f"method.weights={path} unpacks to {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: give other weights"
        )


def _usable(value: Any) -> bool:
    """Dense tensors with values only; what is left out is reported as not there."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
    )
