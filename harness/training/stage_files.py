"""Files of a finished training stage."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save as serialise
from torch import Tensor

from harness.data.volumes import Volume, verify_volumes
from harness.system.errors import UserError
from harness.system.files import digest_file, read_json, write_atomic
from harness.training.checkpoints import Checkpoints
from harness.training.lineage import Lineage, write_lineage

PROBE = "probe.json"
"""File beside the weights with the points of `harness.runs.probe`."""


def read_stage(path: Path) -> dict[str, Any] | None:
    """The report of a finished training stage; None if it, or the weights file beside it, is missing or damaged."""
    stage, weights = read_json(path), path.with_name("weights.safetensors")
    intact = isinstance(stage, dict) and weights.is_file() and stage.get("weights") == digest_file(weights)
    return stage if intact else None


def first_gradient_norms(history: Path, stage: str, number: int = 10) -> list[float]:
    """Gradient norms of the first `number` steps of a stage, of four digits, without the steps that were left out."""
    lines = (json.loads(line) for line in history.read_text().splitlines())
    norms = [line.get("gradient_norm") for line in lines if line.get("stage") == stage and line["step"] <= number]
    return [float(f"{norm:.4g}") for norm in norms if norm is not None]


def final_soft_dice(history: Path) -> float | None:
    """1 minus the Dice loss of fine-tuning, averaged over the last tenth of the steps; None if every step was left out."""
    lines = (json.loads(line) for line in history.read_text().splitlines())
    losses = [line["terms"].get("dice") for line in lines if line.get("stage") == "finetune"]
    last = [loss for loss in losses[-max(1, len(losses) // 10) :] if loss is not None]
    return round(1 - sum(last) / len(last), 4) if last else None


def write_weights(
    weights: Mapping[str, Tensor], path: Path, lineage: Lineage | None = None, unchanged: frozenset[str] = frozenset()
) -> None:
    """Write weights by renaming a finished file, so that nobody reads half of it; and their lineage, if there is one.

    Args:
        unchanged: as in `write_lineage`.

    Raises:
        OSError: the disk is full.
    """
    tensors = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    metadata = None if lineage is None else write_lineage(lineage, tensors, path, unchanged)
    write_atomic(path, serialise(tensors, metadata))


def assert_unchanged(volumes: Sequence[Volume], folder: Path) -> None:
    """Check that no preprocessed volume has changed during training; if one has, remove the stage's checkpoints and probes.

    Raises:
        UserError: a volume was changed or removed.
    """
    changed = [volume for volume, intact in zip(volumes, verify_volumes(volumes), strict=True) if not intact]
    if changed:
        Checkpoints(folder / "checkpoints", 0).clear()
        (folder / PROBE).unlink(missing_ok=True)
        raise UserError(
            f"{len(changed)} prepared volumes were changed or removed during training, {changed[0].stem} among them: "
            "what was trained on them is dropped; ask again, and they are prepared again"
        )
