"""Arrays (C, x, y, z): read from files, and crops of them."""

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

_READING = Lock()


def load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """`numpy.load` without pickles, one thread at a time: CPython 3.11 may fail where two parse a header at once."""
    with _READING:
        loaded: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
    return loaded


def cut(array: NDArray[Any], origin: Sequence[int], size: Sequence[int], scale: float | None = None) -> NDArray[Any]:
    """(C, x, y, z) -> a copy (C, *size) that starts at `origin`; zeros where that is outside.

    With `scale` the copy is float32 and multiplied by it, in the same pass.
    """
    source, target = [], []
    for start, edge, extent in zip(origin, size, array.shape[1:], strict=True):
        first, last = max(start, 0), min(start + edge, extent)
        source.append(slice(first, max(first, last)))
        target.append(slice(first - start, max(first, last) - start))
    whole = all(span == slice(0, edge) for span, edge in zip(target, size, strict=True))
    kind = array.dtype if scale is None else np.dtype(np.float32)
    crop = (np.empty if whole else np.zeros)((len(array), *size), dtype=kind)
    inside, found = crop[(slice(None), *target)], array[(slice(None), *source)]
    if scale is None:
        inside[...] = found
    else:
        np.multiply(found, np.float32(scale), out=inside, dtype=np.float32)
    return crop


def origins(shape: Sequence[int], size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Lowest and highest origin of a crop; a volume that is smaller lies anywhere in the crop."""
    low = [min(0, extent - edge) for extent, edge in zip(shape, size, strict=True)]
    high = [max(0, extent - edge) for extent, edge in zip(shape, size, strict=True)]
    return low, high


def random_origin(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """A uniform origin of a crop of `size` in a volume of `shape`."""
    return [int(rng.integers(a, b + 1)) for a, b in zip(*origins(shape, size), strict=True)]
