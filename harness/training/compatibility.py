"""Checks that method, backbone, crops, batch and memory fit each other, before any data is read."""

import psutil

from harness.api.backbone import Backbone
from harness.api.method import Method
from harness.api.registry import Registry
from harness.api.returned import wrong_features
from harness.api.settings import size_text
from harness.compute.memory import is_too_large, weights_bytes
from harness.config.schema import RunConfig
from harness.system.console import say_once
from harness.system.errors import UserError
from harness.training.models import Plugins, new_method
from harness.training.trainer import refuse_batch_norm


def check_fit(
    registry: Registry,
    config: RunConfig,
    plugins: Plugins,
    channels: int,
    pretrain_channels: int,
    micro_batches: int = 1,
) -> None:
    """Build method and backbone, and check that they fit the crops, the batch, the memory and each other.

    Args:
        channels: of the task's images.
        pretrain_channels: of the images for pre-training.

    Raises:
        UserError: the backbone lacks an ability that the method needs, a crop is not a multiple of its stride, the weights
            do not fit the memory, batch norm would see several micro-batches, or the method's own `check` refuses.
    """
    try:
        # Bytes of the weights, the gradients and the moments (two of AdamW, one of SGD), before anything is allocated.
        need = (4 if config.pretrain.optimizer == "adamw" else 3) * weights_bytes(
            lambda: plugins.new_method(config, pretrain_channels)
        )
        if need > psutil.virtual_memory().available:
            raise MemoryError(f"weights, gradients and moments take {need / 2**30:.1f} GiB")
        backbone = plugins.new_backbone(config, channels)
        _check_needs(registry, config, plugins, backbone)
        _check_intensities(registry, config, plugins)
        _check_crops(config, backbone)
        _check_features(config, backbone)
        if pretrain_channels != channels:
            backbone = plugins.new_backbone(config, pretrain_channels)
        method = new_method(plugins.method, config.method_settings, backbone)
        _check_transfer(config, method)
        _check_expected(config, method)
        refuse_batch_norm(method, micro_batches)
        method.check(config.pretrain.crop, config.pretrain.batch_size)
    except Exception as error:
        if not is_too_large(error):
            raise
        settings = ", ".join(f"{key}={value:.60}" for key, value in config.overrides.items())
        raise UserError(
            f"method {config.method!r} and backbone {config.backbone!r} with {settings or 'these settings'} do not fit "
            f"the {psutil.virtual_memory().available / 2**30:.1f} GiB that are free ({' '.join(str(error).split())[:160]}): "
            "set smaller ones"
        ) from None


def _check_needs(registry: Registry, config: RunConfig, plugins: Plugins, backbone: Backbone) -> None:
    """Raises UserError if the method needs an ability that the backbone does not have."""
    needs = plugins.method.needs
    if needs <= backbone.abilities:
        return
    suitable = [name for name in registry.names("backbone") if registry.load("backbone", name).abilities >= needs]
    raise UserError(
        f"method {config.method!r} needs a backbone with the ability {', '.join(map(repr, sorted(needs - backbone.abilities)))}, "
        f"which {config.backbone!r} does not have: choose --backbone from "
        f"{', '.join(suitable) or 'none of those installed'}"
    )


def _check_intensities(registry: Registry, config: RunConfig, plugins: Plugins) -> None:
    """Raises UserError if the method pre-trains on intensities in 0..1, and the task has z-scores."""
    method = plugins.method
    if method.trains and method.unit_range and config.prepared.get("normalisation") == "ZScore":
        classes = [registry.load("method", name) for name in registry.names("method")]
        others = sorted(each.name for each in classes if each.trains and not each.unit_range)
        raise UserError(
            f"method {config.method!r} needs intensities in 0..1, task.normalisation=zscore (of --set or of preset "
            f"{config.preset!r}) gives others: give --set task.normalisation=none, or choose --method from "
            f"{', '.join(others) or 'none of those installed'}"
        )


def _check_transfer(config: RunConfig, method: Method) -> None:
    """Raises UserError if the method does not pass on what `--transfer` asks for."""
    if config.transfer == "all" and method.trains and "decoder" not in method.trains:
        raise UserError(
            f"--transfer all: method {config.method!r} pre-trains the {' and '.join(method.trains)} only: give --transfer "
            "encoder, or leave it out"
        )
    if config.transfer != "method" and not method.trains and not method.weights():
        raise UserError(
            f"--transfer {config.transfer}: method {config.method!r} has no pre-trained weights to transfer: leave it out"
        )


def _check_expected(config: RunConfig, method: Method) -> None:
    """Raises UserError if the weights that the method starts from expect other intensities; another spacing is said."""
    expected = method.expects()
    wanted, given = expected.get("normalisation"), config.prepared.get("normalisation")
    if wanted is not None and wanted != given:
        how = "give --set task.normalisation=zscore" if wanted == "ZScore" else "leave task.normalisation=zscore out"
        raise UserError(
            f"the weights that method {config.method!r} starts from expect {wanted} intensities, the task has {given}: {how}"
        )
    spacing, own = expected.get("spacing"), config.prepared.get("spacing")
    if spacing is not None and (own is None or any(abs(a - b) > 0.01 for a, b in zip(spacing, own, strict=True))):
        text = ",".join(f"{edge:g}" for edge in spacing)
        say_once(
            f"the weights were trained at {text} mm, the images have "
            f"{'their own spacing' if own is None else ','.join(f'{edge:g}' for edge in own) + ' mm'}; --set task.spacing={text} "
            "gives the same"
        )


def _check_crops(config: RunConfig, backbone: Backbone) -> None:
    """Raises UserError if a crop is no multiple of the deepest stride, or its deepest features are a single voxel."""
    for section, crop in (("pretrain", config.pretrain.crop), ("finetune", config.finetune.crop)):
        setting = f"{section}.crop={size_text(crop)}"
        if any(edge % stride for edge, stride in zip(crop, backbone.stride, strict=True)):
            raise UserError(
                f"{setting} is not a multiple of the deepest stride {size_text(backbone.stride)} of backbone "
                f"{config.backbone!r}: set {section}.crop to one"
            )
        if crop == backbone.stride:
            raise UserError(
                f"{setting} leaves a single voxel of the deepest features of backbone {config.backbone!r}, which cannot be "
                "normalised: set it to at least twice as much along one axis"
            )


def _check_features(config: RunConfig, backbone: Backbone) -> None:
    """Raises UserError if the features of a plugin are not what it declares. Our own are held to it by their tests."""
    if type(backbone).__module__.partition(".")[0] == "backbones":
        return
    crop = config.finetune.crop
    x, y, z = (min(edge, 2 * step) for edge, step in zip(crop, backbone.stride, strict=True))
    small = (x, y, z)
    try:
        backbone.check_view(small, "the image")
    except UserError:  # this network takes images of one extent
        small = crop
    if problem := wrong_features(backbone, small):
        raise UserError(f"backbone {config.backbone!r}: {problem}: mend the plugin, `harness check-method` checks it")
