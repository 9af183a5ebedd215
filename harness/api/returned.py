"""What is wrong with what a plugin returned, in words for its author."""

from typing import Any

from torch import Tensor


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
