"""Arrays (C, x, y, z) in files, and crops of them."""

import tokenize
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import numpy as np
from numpy.lib.format import MAGIC_PREFIX
from numpy.typing import NDArray

_READING = Lock()


def load_array(path: Path, mmap_mode: Literal["r"] | None = None) -> NDArray[Any]:
    """`numpy.load` without pickles, one thread at a time: CPython 3.11 may fail if two threads parse a header at once.

    Raises:
        OSError, ValueError, EOFError: the file cannot be read, or is damaged.
    """
    with path.open("rb") as file:
        if file.read(len(MAGIC_PREFIX)) != MAGIC_PREFIX:  # else NumPy takes it for an archive or a pickle
            raise ValueError(f"{path} is no array of NumPy")
    with _READING:
        try:
            loaded: NDArray[Any] = np.load(path, mmap_mode=mmap_mode, allow_pickle=False)
        # NumPy reads the header as Python, and hands on what the parser says of a damaged one.
        except (SyntaxError, tokenize.TokenError) as error:
            raise ValueError(f"{path} has no header of NumPy: {error}") from None
    return loaded


def save_array(path: Path, array: NDArray[Any]) -> None:
    """`numpy.save` for an array without objects, except for errors: NumPy's own do not say why a disk takes no more.

    Raises:
        OSError: with its number and the path; the file is removed.
    """
    header = np.lib.format.header_data_from_array_1_0(array)
    content = array.T if header["fortran_order"] else np.ascontiguousarray(array)
    try:
        with path.open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            file.write(content.data)
    except OSError as error:
        error.filename = str(path)
        path.unlink(missing_ok=True)
        raise


def cut(array: NDArray[Any], origin: Sequence[int], size: Sequence[int], scale: float | None = None) -> NDArray[Any]:
    """Copy a crop (C, *size) that starts at `origin` out of an array (C, x, y, z); zeros outside of the array.

    With `scale`, the crop is float32 and multiplied by `scale` in the same pass.
    """
    source, target = [], []
    for start, edge, extent in zip(origin, size, array.shape[1:], strict=True):
        first, last = max(start, 0), min(start + edge, extent)
        source.append(slice(first, max(first, last)))
        target.append(slice(first - start, max(first, last) - start))
    whole = all(span == slice(0, edge) for span, edge in zip(target, size, strict=True))
    dtype = array.dtype if scale is None else np.dtype(np.float32)
    crop = (np.empty if whole else np.zeros)((len(array), *size), dtype=dtype)
    inside, voxels = crop[(slice(None), *target)], array[(slice(None), *source)]
    if scale is None:
        inside[...] = voxels
    else:
        np.multiply(voxels, np.float32(scale), out=inside, dtype=np.float32)
    return crop


def origins(shape: Sequence[int], size: Sequence[int]) -> tuple[list[int], list[int]]:
    """Lowest and highest origin of a crop along each axis; a volume smaller than the crop may lie anywhere in it."""
    low = [min(0, extent - edge) for extent, edge in zip(shape, size, strict=True)]
    high = [max(0, extent - edge) for extent, edge in zip(shape, size, strict=True)]
    return low, high


def random_origin(shape: Sequence[int], size: Sequence[int], rng: np.random.Generator) -> list[int]:
    """Origin of a crop of `size` in a volume of `shape`, drawn uniformly from `origins`."""
    return [int(rng.integers(a, b + 1)) for a, b in zip(*origins(shape, size), strict=True)]
