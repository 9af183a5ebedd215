"""What a finished training stage leaves on disk."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialise
from torch import Tensor

from harness.data.volumes import Volume, verified
from harness.system.errors import UserError
from harness.system.files import digest_file, read_json, write_atomic
from harness.training.checkpoints import Checkpoints


def read_stage(path: Path) -> dict[str, Any] | None:
    """What a finished training stage says of itself; None where that, or the weights beside it, is not as it was written."""
    stage, weights = read_json(path), path.with_name("weights.safetensors")
    whole = isinstance(stage, dict) and weights.is_file() and stage.get("weights") == digest_file(weights)
    return stage if whole else None


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """By rename, as all that others read. Raises OSError where the disk cannot hold them."""
    whole = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    write_atomic(path, serialise(whole))


def assert_unchanged(volumes: Sequence[Volume], folder: Path) -> None:
    """Whether the prepared volumes still are what they were; what was trained on others is dropped.

    Raises:
        UserError: some are not.
    """
    changed = [volume for volume, whole in zip(volumes, verified(volumes), strict=True) if not whole]
    if changed:
        Checkpoints(folder / "checkpoints", 0).clear()
        raise UserError(
            f"{len(changed)} prepared volumes were changed or removed during training, {changed[0].stem} among them: "
            "what was trained on them is dropped; ask again, and they are prepared again"
        )
