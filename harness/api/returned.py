"""What is wrong with what a plugin returned, in words for its author."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness.api.backbone import Backbone
from harness.api.settings import Triple


def wrong_terms(value: Any) -> str:
    """Why `value` cannot be what `forward` of a method returns, named scalar tensors; empty if it can."""
    if not isinstance(value, dict) or not value:
        kind = "an empty dict" if value == {} else type(value).__name__
        return f'forward must return a dict of named loss terms, it returned {kind}: return {{"loss": ...}}'
    for name, term in value.items():
        if not isinstance(name, str):
            return f"forward named a term {name!r}: names are text"
        if not isinstance(term, Tensor) or term.ndim:
            given = f"of shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            return f"term {name!r} is not a scalar tensor but {given}: take a mean or a sum"
    return ""


def wrong_images(value: Any) -> str:
    """Why `value` cannot be what `show` of a method returns, images (N, C, x, y, z) by name; empty if it can."""
    if not isinstance(value, dict):
        return f"show must return a dict of named images, it returned {type(value).__name__}"
    for name, image in value.items():
        if not isinstance(name, str) or not isinstance(image, Tensor):
            return f"show gives {name!r}: {type(image).__name__}: give tensors by name"
        if image.ndim != 5:
            return f"show gives {name!r} of shape {tuple(image.shape)}: give (N, C, x, y, z)"
    return ""


@torch.no_grad()
def wrong_features(backbone: Backbone, size: Triple) -> str:
    """Why the features of a backbone are not what it declares in `strides`, `channels` and `width`; empty if they are.

    Args:
        size: extent of an image in voxels that the backbone can encode.
    """
    if len(backbone.channels) != len(backbone.strides):
        return f"channels declares {len(backbone.channels)} levels, strides {len(backbone.strides)}: give one of each per level"
    declared = [
        (1, channels, *(edge // step for edge, step in zip(size, stride, strict=True)))
        for channels, stride in zip(backbone.channels, backbone.strides, strict=True)
    ]
    training = backbone.training
    backbone.eval()
    try:
        image = torch.zeros(1, backbone.in_channels, *size)
        levels, problem = _called("trunk", lambda: list(backbone.trunk(image)), image)
        if problem:
            return problem
        if len(levels) != len(declared):
            return f"trunk returned {len(levels)} levels, channels and strides declare {len(declared)}"
        for number, (level, shape) in enumerate(zip(levels, declared, strict=True)):
            if level.shape != shape:
                return (
                    f"level {number} of trunk is {tuple(level.shape)} for an image {tuple(image.shape)}, channels and strides "
                    f"declare {shape}: levels go from fine to coarse"
                )
        features, problem = _called("decode", lambda: backbone.decode(levels), image)
        expected = (1, backbone.width, *levels[0].shape[2:])
        if not problem and features.shape != expected:
            return f"decode returned {tuple(features.shape)}, width and the finest level declare {expected}"
        return problem
    finally:
        backbone.train(training)


def _called(name: str, function: Callable[[], Any], image: Tensor) -> tuple[Any, str]:
    """What a plugin's function returns, or what it raised, in words."""
    try:
        return function(), ""
    # A plugin is foreign code: any exception is its author's to mend.
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return None, f"{name} raised {text} for an image {tuple(image.shape)}"
