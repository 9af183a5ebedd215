"""Reads and writes checkpoints in the format of nnssl, which nnU-Net fine-tunes from.

Such a checkpoint holds `network_weights` and a plan that says which of them are encoder and stem. The facts about the format
were found by trying files on nnU-Net; no code of nnssl is used. Arrays there are in the order (z, y, x), here in (x, y, z):
kernels are turned, because unturned ones load without an error and compute something else.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from harness.api.backbone import Backbone
from harness.api.weight_files import WeightsFile
from harness.system.errors import UserError

BACKBONES = {"ResidualEncoderUNet": "resenc", "ResEncL": "resenc", "PlainConvUNet": "plainunet"}
"""Last part of an architecture's name in a plan -> the backbone that is the same network."""

NNSSL_NORMALISATION = "ZScore"
"""How nnssl scales intensities, whatever the data set."""


class _Part(BaseModel):
    """A part of a plan; entries that are not needed are left alone."""

    model_config = ConfigDict(frozen=True, extra="ignore")


_Counts = int | Annotated[list[int], Field(min_length=1)]
_Sizes = int | Annotated[list[int | list[int]], Field(min_length=1)]


class _Arguments(_Part):
    """Sizes of the network for each stage, or one for all of them; along several axes in the order (z, y, x)."""

    n_stages: int | None = None
    features_per_stage: _Counts | None = None
    strides: _Sizes | None = None
    kernel_sizes: _Sizes | None = None
    n_blocks_per_stage: _Counts | None = None
    n_conv_per_stage: _Counts | None = None

    def per_stage(self, name: str) -> list[Any]:
        """A size for each stage; an empty list where the plan does not state it."""
        lengths = [len(value) for value in dict(self).values() if isinstance(value, list)]
        value = getattr(self, name)
        if isinstance(value, int):
            return [value] * (self.n_stages or max(lengths, default=1))
        return value or []


class _Architecture(_Part):
    """The network: the dotted or short name of its class, and its arguments, which named networks lack."""

    arch_class_name: str
    arch_kwargs: _Arguments | None = None


class _Configuration(_Part):
    """A configuration of the pre-training; `spacing` in mm along (z, y, x), or None for each data set's own."""

    spacing: tuple[float, float, float] | None


class _Pretraining(_Part):
    """The pre-training; its first configuration counts."""

    configurations: dict[str, _Configuration] = Field(min_length=1)


class AdaptationPlan(_Part):
    """The entry `nnssl_adaptation_plan`, as far as it is needed here."""

    architecture_plans: _Architecture
    pretrain_plan: _Pretraining
    pretrain_num_input_channels: int
    key_to_encoder: str
    key_to_stem: str

    @property
    def architecture(self) -> str:
        """The name of the network's class, without its module."""
        return self.architecture_plans.arch_class_name.rpartition(".")[2]

    @property
    def spacing(self) -> tuple[float, float, float] | None:
        """The spacing of the pre-training in mm along (x, y, z)."""
        spacing = next(iter(self.pretrain_plan.configurations.values())).spacing
        return None if spacing is None else (spacing[2], spacing[1], spacing[0])


def read_plan(file: WeightsFile) -> AdaptationPlan | None:
    """The plan of a checkpoint of nnssl; None for another file. Raises UserError if an entry is missing or wrong."""
    if file.adaptation is None:
        return None
    try:
        return AdaptationPlan.model_validate(file.adaptation)
    except ValidationError as error:
        problem = error.errors()[0]
        entry = ".".join(["nnssl_adaptation_plan", *map(str, problem["loc"])])
        raise UserError(
            f"method.weights={file.path}: {entry}: {problem['msg'].lower()}: give a checkpoint as nnssl writes it, "
            "with its whole plan"
        ) from None


def from_nnssl(file: WeightsFile, plan: AdaptationPlan, backbone: Backbone) -> dict[str, Tensor]:
    """The weights of encoder and stem under the names of `backbone`, with kernels in the order (x, y, z).

    The decoder is left out, as nnU-Net leaves it out: nnssl's methods train it for their pretext task, or not at all.

    Raises:
        UserError: the checkpoint is of another network, or the backbone has other settings than the plan.
    """
    name = BACKBONES.get(plan.architecture)
    if name is None:
        raise UserError(
            f"method.weights={file.path} is of network {plan.architecture!r:.80}, which no backbone here is; there are backbones "
            f"for {', '.join(BACKBONES)}"
        )
    if name != backbone.name:
        raise UserError(f"method.weights={file.path} is of network {plan.architecture!r}: give --backbone {name}")
    wanted = plan_settings(plan)
    own = backbone.config.model_dump()
    if foreign := sorted(wanted.keys() - own.keys()):
        raise UserError(
            f"method.weights={file.path}: its plan gives {plan.architecture!r} {', '.join(foreign)}, which this network does not "
            "have: give a checkpoint with the plan that it was trained with"
        )
    wrong = [key for key, value in wanted.items() if value != _as_given(own, key, backbone)]
    if wrong:
        words = " ".join(f"--set backbone.{key}='{_text(wanted[key])}'" for key in wrong)
        raise UserError(f"method.weights={file.path} is of a network of another size: give {words}")
    weights = {}
    for key, value in file.tensors.items():
        renamed = _renamed(key, plan)
        if renamed is not None:
            weights[renamed] = value.permute(0, 1, 4, 3, 2).contiguous() if value.ndim == 5 else value
    return weights


def own_citations(file: WeightsFile) -> list[dict[str, str]]:
    """What a checkpoint asks to be cited, as the record has it: kind, name, licence, reference, bibtex.

    Entries of another form are left out: they are for readers, and nothing depends on them.
    """
    cited = []
    for entry in file.citations if isinstance(file.citations, list | tuple) else ():
        if not isinstance(entry, Mapping):
            continue
        texts = {key: entry.get(f"{key}_citations") for key in ("bibtex", "apa")}
        lists = {
            key: [str(t) for t in value] if isinstance(value, list | tuple) else [] for key, value in texts.items()
        }
        name = f"{entry.get('type', 'weights')}: {entry.get('name', 'unknown')}"
        cited.append(
            {
                "kind": "weights",
                "name": name[:200],
                "licence": "",
                "reference": "; ".join(lists["apa"])[:1000],
                "bibtex": "\n".join(lists["bibtex"])[:10_000],
            }
        )
    return cited[:20]


def _renamed(key: str, plan: AdaptationPlan) -> str | None:
    """The backbone's name for a key of encoder or stem; None for an alias and for any other part."""
    if "all_modules" in key.split("."):
        return None
    for prefix, own in ((plan.key_to_encoder, "encoder.stages"), (plan.key_to_stem, "encoder.stem")):
        if key.startswith(f"{prefix}."):
            return f"{own}.{key.removeprefix(f'{prefix}.')}"
    return None


def plan_settings(plan: AdaptationPlan) -> dict[str, Any]:
    """The settings of the backbone that make it the plan's network, with sizes in the order (x, y, z).

    Empty for a named network without arguments, which is the backbone's default.
    """
    arguments = plan.architecture_plans.arch_kwargs or _Arguments()
    settings: dict[str, Any] = {
        "features": tuple(arguments.per_stage("features_per_stage")),
        "strides": tuple(map(_turned, arguments.per_stage("strides"))),
        "kernels": tuple(map(_turned, arguments.per_stage("kernel_sizes"))),
        "blocks": tuple(arguments.per_stage("n_blocks_per_stage")),
    }
    if convs := arguments.per_stage("n_conv_per_stage"):
        settings["convs"] = convs[0]
    return {key: value for key, value in settings.items() if value}


def _turned(size: int | Iterable[int]) -> tuple[int, ...]:
    """A size along (z, y, x) as one along (x, y, z); a single number is a cube."""
    return (size,) * 3 if isinstance(size, int) else tuple(size)[::-1]


def _as_given(own: Mapping[str, Any], key: str, backbone: Backbone) -> Any:
    """A setting of the backbone, with the values that stand for its defaults."""
    effective = {"strides": "stage_strides", "kernels": "stage_kernels", "blocks": "stage_blocks"}
    value = getattr(backbone.config, effective[key]) if key in effective else own[key]
    return tuple(value) if isinstance(value, list) else value


def _text(value: Any) -> str:
    """A setting as it is written on the command line: stages of several axes are divided by `;`."""
    if isinstance(value, tuple) and value and isinstance(value[0], tuple):
        return ";".join(",".join(map(str, stage)) for stage in value)
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def nnunet_weights(weights: Mapping[str, Tensor], everything: bool) -> dict[str, Tensor]:
    """Weights of `resenc` or `plainunet` under the names of nnU-Net's package, with kernels in the order (z, y, x).

    A layer has two names there, and both are written: nnU-Net loads strictly. They are one tensor, which is stored once.

    Args:
        everything: also the decoder, and the encoder once more as a part of it; otherwise encoder and stem only.
    """
    named: dict[str, Tensor] = {}
    for key, value in weights.items():
        part = key.partition(".")[0]
        if part != "encoder" and not (everything and part == "decoder"):
            continue
        turned = value.detach().cpu()
        turned = turned.permute(0, 1, 4, 3, 2).contiguous() if turned.ndim == 5 else turned.clone()
        names = [key]
        for layer, number in ((".conv.", ".all_modules.0."), (".norm.", ".all_modules.1.")):
            names += [key.replace(layer, number)] if layer in key else []
        if everything and part == "encoder":
            names += [f"decoder.{name}" for name in names]
        named |= dict.fromkeys(names, turned)
    return named


def adaptation_plan(backbone: Backbone, spacing: Iterable[float] | None, crop: Iterable[int]) -> dict[str, Any]:
    """The plan of a checkpoint of `resenc` or `plainunet`: every entry that nnU-Net reads, with sizes in the order (z, y, x).

    Args:
        spacing: of the images in mm along (x, y, z); None for each image's own.
        crop: extent of a crop of pre-training in voxels.
    """
    config: Any = backbone.config
    residual = backbone.name == "resenc"
    features, patch = list(config.features), list(crop)[::-1]
    stages = config.stage_blocks if residual else [config.convs] * len(features)
    convs = config.decoder_convs if residual else config.convs
    imported = {
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "nonlin": "torch.nn.LeakyReLU",
    }
    arguments = {
        "n_stages": len(features),
        "features_per_stage": features,
        "kernel_sizes": [list(kernel)[::-1] for kernel in config.stage_kernels],
        "strides": [list(stride)[::-1] for stride in config.stage_strides],
        "n_blocks_per_stage" if residual else "n_conv_per_stage": stages,
        "n_conv_per_stage_decoder": [convs] * (len(features) - 1),
        "conv_bias": True,
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin_kwargs": {"inplace": True},
        **imported,
    }
    kind = "ResidualEncoderUNet" if residual else "PlainConvUNet"
    first = "encoder.stem.convs.0" if residual else "encoder.stages.0.0.convs.0"
    return {
        "architecture_plans": {
            "arch_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
            "arch_kwargs": arguments,
            "arch_kwargs_requiring_import": list(imported),
        },
        "pretrain_plan": {
            "configurations": {
                "harness": {"spacing": None if spacing is None else list(spacing)[::-1], "patch_size": patch}
            }
        },
        "pretrain_num_input_channels": backbone.in_channels,
        "recommended_downstream_patchsize": patch,
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem" if residual else "encoder.stages.0",
        "keys_to_in_proj": [f"{first}.conv", f"{first}.all_modules.0"],
        "key_to_lpe": None,
    }
