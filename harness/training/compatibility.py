"""Do method, backbone, crop, batch and memory fit each other? Asked before any data is read."""

import psutil

from harness.api.registry import Registry
from harness.compute.memory import is_too_large, weights_bytes
from harness.config.schema import RunConfig
from harness.system.errors import UserError
from harness.training.models import Plugins
from harness.training.trainer import refuse_batch_norm


def check_fit(
    registry: Registry,
    config: RunConfig,
    plugins: Plugins,
    channels: int,
    pretrain_channels: int,
    in_turn: int = 1,
) -> None:
    """Whether method, backbone, crops and batch fit each other and the memory; builds the modules, reads no data.

    Raises:
        UserError: a need that the backbone does not meet, a crop that is not a multiple of its stride, weights that no
            memory holds, batch norm over `in_turn` micro-batches, or whatever the method itself refuses.
    """
    try:
        # A copy for gradients and two for AdamW's moments; known before a byte of it is taken.
        need = 4 * weights_bytes(
            lambda: plugins.method(config.method_settings, plugins.new_backbone(config, pretrain_channels))
        )
        if need > psutil.virtual_memory().available:
            raise MemoryError(f"weights, gradients and moments take {need / 2**30:.1f} GiB")
        _check_parts(registry, config, plugins, channels, pretrain_channels, in_turn)
    except Exception as error:
        if not is_too_large(error):
            raise
        given = (f"{key}={value:.60}" for key, value in config.overrides.items())
        raise UserError(
            f"method {config.method!r} and backbone {config.backbone!r} with {', '.join(given) or 'these settings'} do not fit "
            f"the {psutil.virtual_memory().available / 2**30:.1f} GiB that are free ({' '.join(str(error).split())[:160]}): "
            "set smaller ones"
        ) from None


def _check_parts(
    registry: Registry, config: RunConfig, plugins: Plugins, channels: int, pretrain_channels: int, in_turn: int
) -> None:
    backbone = plugins.new_backbone(config, channels)
    missing = plugins.method.needs - backbone.abilities
    if missing:
        able = [
            name
            for name in registry.names("backbone")
            if registry.load("backbone", name).abilities >= plugins.method.needs
        ]
        raise UserError(
            f"method {config.method!r} needs a backbone with {', '.join(sorted(missing))}, {config.backbone!r} has "
            f"{', '.join(sorted(backbone.abilities)) or 'no optional ability'}: choose --backbone from "
            f"{', '.join(able) or 'none of those installed'}"
        )
    for section, crop in (("pretrain", config.pretrain.crop), ("finetune", config.finetune.crop)):
        if any(edge % stride for edge, stride in zip(crop, backbone.stride, strict=True)):
            raise UserError(
                f"{section}.crop={','.join(map(str, crop))} is not a multiple of the deepest stride "
                f"{','.join(map(str, backbone.stride))} of backbone {config.backbone!r}: set {section}.crop to one"
            )
        if crop == backbone.stride:
            raise UserError(
                f"{section}.crop={','.join(map(str, crop))} leaves a single voxel of the deepest features of backbone "
                f"{config.backbone!r}, which cannot be normalised: set it to at least twice as much along one axis"
            )
    if pretrain_channels != channels:
        backbone = plugins.new_backbone(config, pretrain_channels)
    method = plugins.method(config.method_settings, backbone)
    refuse_batch_norm(method, in_turn)
    method.check(config.pretrain.crop, config.pretrain.batch_size)
