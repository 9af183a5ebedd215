"""Reads files of weights: safetensors files, and PyTorch checkpoints without executing what is in them."""

import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from safetensors.torch import load_file
from torch import Tensor

from harness.system.console import say_once
from harness.system.errors import UserError
from harness.system.files import disguise

CONTAINERS = (
    *("state_dict", "model", "model_state_dict", "network_weights", "net", "module"),
    *("teacher", "student", "state_dict_ema", "model_ema", "ema"),
)
"""Entries of checkpoints that hold a network, in the order in which they are taken."""
LONGEST_KEY = 1000  # characters; prefixes are removed one by one, which takes long for longer keys
# TransVW's checkpoint holds its best loss as a NumPy number, under the former name of NumPy's module. Only numbers are
# allowed here, because NumPy arrays can hold objects.
_NUMBER = np.float64(0).__reduce__()[0]
NUMBERS: list[Any] = [
    (_NUMBER, "numpy.core.multiarray.scalar"),
    (_NUMBER, "numpy._core.multiarray.scalar"),
    *(np.dtype, np.dtypes.Float64DType, np.dtypes.Float32DType, np.dtypes.Int64DType),
]


@dataclass(frozen=True)
class WeightsFile:
    """What a file of weights holds.

    Attributes:
        tensors: by name.
        adaptation: the entry `nnssl_adaptation_plan` of a checkpoint of nnssl, see `harness.api.nnssl`; None for other files.
        citations: the entry `citations` of such a checkpoint, unchecked.
    """

    path: Path
    tensors: dict[str, Tensor]
    adaptation: Any = None
    citations: Any = None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors by name, as `read_weights_file` gives them."""
    return read_weights_file(path).tensors


def read_weights_file(path: Path) -> WeightsFile:
    """Read a safetensors file or a PyTorch checkpoint. Nothing in the file is executed.

    Raises:
        UserError: the file cannot be read this way, unpacks to more than the free memory, or holds no tensors.
    """
    try:
        _check_size(path)
        if path.suffix == ".safetensors":
            return WeightsFile(path, {_plain_key(key): value for key, value in load_file(path).items()})
        with torch.serialization.safe_globals(NUMBERS):
            content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    # The readers raise errors of nearly any class for foreign bytes. In every case the file is at fault.
    except Exception as error:
        if kind := disguise(path):
            raise UserError(f"method.weights={path} is {kind}") from None
        raise UserError(
            f"method.weights={path} cannot be read as weights: {_reason(error)}; give a .safetensors file or "
            "a PyTorch checkpoint that holds tensors only (saving its state_dict alone makes one)"
        ) from None
    outer = content if isinstance(content, dict) else {}
    tensors = _most_tensors(content)
    if not tensors:
        held = ", ".join(ascii(key)[:40] for key in list(outer)[:12]) or f"a {type(content).__name__}"
        raise UserError(
            f"method.weights={path} holds no state dict (looked for {', '.join(CONTAINERS)}); it holds {held}: save the "
            "network's state_dict"
        )
    logical = sum(value.numel() * value.element_size() for value in tensors.values())
    if logical > (free := psutil.virtual_memory().available):  # a few bytes may stand for a tensor of any size
        raise UserError(
            f"method.weights={path} holds tensors of {logical / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: give others"
        )
    return WeightsFile(path, tensors, outer.get("nnssl_adaptation_plan"), outer.get("citations"))


def _most_tensors(content: Any) -> dict[str, Tensor]:
    """The tensors of the state dict in a checkpoint: of the content itself or, if it has more, of its first container.

    A compiled network's names have `_orig_mod.` in them, which is left out.
    """
    best: dict[str, Tensor] = {}
    for _ in range(4):  # checkpoints have few wrappers; without a limit, a dict that contains itself would never end
        if not isinstance(content, dict):
            break
        tensors = {
            _plain_key(key): value for key, value in content.items() if _usable(value) and len(str(key)) <= LONGEST_KEY
        }
        if len(tensors) > len(best):
            best = tensors
        held = [name for name in CONTAINERS if isinstance(content.get(name), dict)]
        if len(held) > 1:
            say_once(f"the checkpoint holds {', '.join(held)}: {held[0]} is read")
        content = content[held[0]] if held else None
    return best


def _plain_key(key: Any) -> str:
    """The name of a tensor without what `torch.compile` puts into it."""
    return str(key).replace("_orig_mod.", "")


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without PyTorch's advice, which names options that do not exist here."""
    if isinstance(error, pickle.UnpicklingError):
        kind = re.search(r"(?:[Uu]nsupported (?:class|global)|global):? (?:GLOBAL )?([\w.]+)", str(error))
        return f"it holds an object of {kind[1]}" if kind else "it is no checkpoint"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def _check_size(path: Path) -> None:
    """Raise UserError if the members of a zipped checkpoint, once decompressed, need more than the free memory."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as packed:
        size = sum(member.file_size for member in packed.infolist())
    if size > (free := psutil.virtual_memory().available):
        raise UserError(
            f"method.weights={path} unpacks to {size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free: give other weights"
        )


def _usable(value: Any) -> bool:
    """Whether this is a dense tensor with values. All others are left out and later reported as missing."""
    return (
        isinstance(value, Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and not (value.is_quantized or value.is_nested)
    )
