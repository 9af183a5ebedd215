"""Start from published weights instead of pre-training."""

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, FilePath
from safetensors.torch import save_file
from torch import Tensor

from harness import (
    NNSSL_NORMALISATION,
    Backbone,
    Method,
    Settings,
    Triple,
    UserError,
    WeightsFile,
    from_nnssl,
    inflate,
    read_plan,
    read_weights_file,
)

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
PREFIXES = ("module.", "model.", "backbone.", "classficationNet.")  # the last one is TransVW's own spelling


class Official(Method):
    """Published weights instead of pre-training, as the paper does for Models Genesis and TransVW.

    Source: HybridMIM, section IV-B ("as ModelGenesis and TransVW officially release their pre-trained model weights, we
    skip the pre-training step"). It reads these files and executes nothing in them:
      * Models Genesis' `Genesis_Chest_CT.pt` and TransVW's `TransVW_chest_ct.pt`, for backbone `genesis_unet3d`;
      * MONAI's self-supervised SwinUNETR encoder (`module.` or `swin_vit.` prefixes, `mlp.fc1` names) and whole
        SwinUNETR state dicts, for backbone `swinunetr`;
      * state dicts of MONAI's BasicUNet, SegResNet and UNETR, for `unet`, `segresnet` and `unetr`;
      * checkpoints of nnssl (OpenMind's ResEnc-L and the like), for `resenc` and `plainunet`: encoder and stem, as their plan
        names them, with kernels turned from (z, y, x) to (x, y, z). They need `task.normalisation=zscore`;
      * `weights.safetensors` of any run or pre-training of this harness.

    Prefixes are removed from key names, and the backbone's `aliases` translate them. Every tensor that is not loaded is
    reported. It is an error if less than half of the encoder's parameters can be loaded. Weights for one channel serve
    several modalities with `inflate_stem`. Without it their first convolution stays random. That is a thousandth of the
    parameters, but the other layers then see features that they were not trained on: the transfer says so.

    None of the published files was at hand. Their key names are those of the published networks and loading examples: in
    TransVW's example (`pytorch/README.md`) keys have the prefix `module.`, some also `classficationNet.` (its spelling),
    and keys with `projection_head` or `prototypes` are left out, as are all heads here.

    Intensities: published weights expect the range that they were trained on, and no file says which one that is. Models
    Genesis and TransVW: CT from -1000 to 1000 HU mapped to 0..1. MONAI's self-supervised SwinUNETR: CT from -1000 to
    1000 HU mapped to 0..1 in its pre-training, -175 to 250 HU in the fine-tuning of BTCV. The harness gives every network
    intensities in 0..1 under the window of its own task (BTCV: -175 to 250 HU), and MR by percentiles, so the same
    tissue has another value than in pre-training. Fine-tuning has to adapt to that; the harness does not map it back.
    """

    name = "official"
    version = "2"
    reference = "cite the weights that you give"
    trains = ()

    class Config(Settings):
        """Settings of `official`: the file of weights, and how its first convolution is used."""

        weights: FilePath = Field(description="checkpoint (.pt, .pth, ... or .safetensors)")
        inflate_stem: bool = Field(
            False,
            description="repeat first convolutions of one channel for all modalities, divided by their number",
        )
        corpus: str = Field(
            "unknown",
            description="what weights from elsewhere were trained on: a folder of scans, the name of a corpus or of "
            "published weights, or unknown",
        )

    config: Config

    @classmethod
    def example(cls, backbone: Backbone, folder: Path) -> dict[str, Any]:
        """Write the backbone's own encoder and decoder to `folder`, as weights for the conformance checks."""
        path = folder / "example.safetensors"
        save_file(backbone.part_weights(("encoder", "decoder")), path)
        return {"weights": path}

    def check(self, crop: Triple, batch_size: int) -> None:
        """Raise UserError if the weights cannot be used. See `weights`."""
        self.weights()

    @cached_property
    def file(self) -> WeightsFile:
        """What the file holds. Raises UserError if it cannot be read."""
        return read_weights_file(self.config.weights)

    def expects(self) -> dict[str, Any]:
        """z-scores at the plan's spacing, for a checkpoint of nnssl."""
        plan = read_plan(self.file)
        return {} if plan is None else {"normalisation": NNSSL_NORMALISATION, "spacing": plan.spacing}

    def weights(self) -> dict[str, Tensor]:
        """The file's tensors under the backbone's names. Tensors that do not fit are included; the transfer reports them.

        Raises:
            UserError: the file is no state dict, holds more than tensors, holds a value that is not finite, or gives
                less than half of the encoder.
        """
        own = self.backbone.state_dict()
        plan = read_plan(self.file)
        weights = self.file.tensors if plan is None else from_nnssl(self.file, plan, self.backbone)
        weights = {self._rename(key, own): value for key, value in weights.items()}
        if self.config.inflate_stem:
            weights = {key: inflate(value, own[key].shape) if key in own else value for key, value in weights.items()}
        encoder = {
            key: parameter.numel()
            for key, parameter in self.backbone.named_parameters()
            if self.backbone.part_of(key) == "encoder"
        }
        fits = {key for key, value in weights.items() if key in own and own[key].shape == value.shape}
        share = sum(number for key, number in encoder.items() if key in fits) / sum(encoder.values())
        quantised = [key for key in sorted(fits) if own[key].is_floating_point() and weights[key].dtype not in FLOATS]
        if quantised:
            kind = str(weights[quantised[0]].dtype).removeprefix("torch.")
            raise UserError(
                f"method.weights={self.config.weights}: {quantised[0]} is {kind} ({len(quantised)} tensors), which is quantised: "
                "give weights in float32, float16 or bfloat16"
            )
        broken = [key for key in sorted(fits) if not torch.isfinite(weights[key].float()).all()]
        if broken:
            raise UserError(
                f"method.weights={self.config.weights}: {broken[0]} is not finite ({len(broken)} tensors): give other weights"
            )
        if share < 0.5:
            raise UserError(self._refusal(share, [key for key in encoder if key not in fits], weights, own))
        return weights

    def _rename(self, key: str, own: dict[str, Tensor]) -> str:
        """The backbone's name for a key of the file; `own` is the backbone's state dict."""
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

    def _refusal(self, share: float, missing: list[str], weights: dict[str, Tensor], own: dict[str, Tensor]) -> str:
        """The text of the error for weights that give only `share` of the encoder."""
        examples = [
            f"{key} is {tuple(weights[key].shape)} there and {tuple(own[key].shape)} here"
            if key in weights
            else f"{key} is not there"
            for key in missing[:3]
        ]
        foreign = [key for key in weights if key not in own][:3]
        stem = any(
            key in weights
            and weights[key].shape[:1] + weights[key].shape[2:] == own[key].shape[:1] + own[key].shape[2:]
            for key in missing
        )
        hint = "; method.inflate_stem=true repeats a stem of one channel for all modalities" if stem else ""
        return (
            f"method.weights={self.config.weights} gives {share:.0%} of the encoder of backbone {self.backbone.name!r}, at "
            f"least 50% are needed: {'; '.join(examples)}; unknown in the file: {', '.join(foreign) or 'nothing'}: choose the "
            f"backbone, and its settings, that the weights were made for{hint}"
        )
