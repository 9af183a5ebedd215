"""Cases side by side: image, reference, and what each of several runs made of it (the paper's Figure 3)."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from harness.api.registry import Registry
from harness.api.task import Case, Task
from harness.data import pictures
from harness.data.cases import load_case, load_label
from harness.data.datasets import find_data
from harness.data.image_files import read_image
from harness.data.pictures import Row
from harness.system.errors import UserError
from leaderboards import board
from leaderboards.records import Run


def draw(
    runs: Sequence[Run], data: Path | None, out: Path, cases: Sequence[str], plugins: Sequence[str], fallback: Path
) -> list[str]:
    """Write the figure (PNG or SVG, as `out` ends); the cases that it shows.

    Without `cases`, the three on which the runs differ most by mean Dice. The slice is the one with most voxels on which any
    run and the reference disagree.

    Raises:
        UserError: runs that are not comparable, predictions that were not saved, an unknown case, or data that is not theirs.
    """
    for run in runs[1:]:
        if different := board.differing(runs[0], run):
            raise UserError(
                f"{runs[0].run_id} and {run.run_id} differ in {', '.join(different)}: give runs of one table"
            )
    for run in runs:
        if not (run.folder / "predictions").is_dir():
            raise UserError(
                f"{run.run_id} kept no predictions: ask for it again with `harness run ... --save-predictions`"
            )
    task = Registry(plugins).task(str(runs[0].record["task"]))
    root = find_data(task, data, fallback)
    known = {case.id: case for case in task.cases(root)}
    chosen = list(cases) or _most_different(runs)
    for name in chosen:
        if name not in runs[0].cases or name not in known:
            raise UserError(
                f"{name!r} is no test case of these runs in {root}: there are {', '.join(runs[0].cases[:8])} ..."
            )
    rows = [_row(task, known[name], runs) for name in chosen]
    headings = ["image", "reference", *(f"{run.method}, {run.backbone}, seed {run.seed}" for run in runs)]
    title = "PHANTOM" if runs[0].phantom else f"{task.name}, the slice with the largest disagreement, Dice on it"
    pictures.grid(rows, headings, list(task.targets), out, title)
    return chosen


def _most_different(runs: Sequence[Run], number: int = 3) -> list[str]:
    means = np.array([np.nanmean(run.dice, axis=1) for run in runs])
    spread = np.ptp(means, axis=0) if len(runs) > 1 else -means[0]
    return [runs[0].cases[place] for place in np.argsort(-np.nan_to_num(spread), kind="stable")[:number]]


def _row(task: Task, case: Case, runs: Sequence[Run]) -> Row:
    loaded = load_case(task, case)
    assert loaded.label is not None
    # The nearest axis-aligned orientation, so that a slice is axial whatever order the file has.
    turn = nib.orientations.io_orientation(loaded.affine)
    flipped = nib.orientations.apply_orientation
    reference = flipped(task.masks(loaded.label).transpose(1, 2, 3, 0), turn)
    predictions = []
    for run in runs:
        voxels, _ = read_image(run.folder / "predictions" / f"{case.id}.nii.gz")
        if voxels.shape != loaded.label.shape:
            raise UserError(
                f"{run.run_id} predicted {voxels.shape} voxels for {case.id}, the image has {loaded.label.shape}: is --data "
                "the data of these runs?"
            )
        written = Case(case.id, case.images, run.folder / "predictions" / f"{case.id}.nii.gz", numbering=case.numbering)
        label, _, _ = load_label(task, written)
        predictions.append(flipped(task.masks(label).transpose(1, 2, 3, 0), turn))
    wrong = np.any([(each != reference).any(axis=3) for each in predictions], axis=0)
    place = (
        int(wrong.sum(axis=(0, 1)).argmax()) if wrong.any() else int(reference.any(axis=3).sum(axis=(0, 1)).argmax())
    )
    slices = [each[:, :, place] for each in predictions]
    edges = np.abs(loaded.affine[:3, :3]).max(axis=1)
    return Row(
        case=case.id,
        image=flipped(loaded.image[0], turn)[:, :, place],
        reference=pictures.numbered(reference[:, :, place].transpose(2, 0, 1)),
        predictions=[pictures.numbered(each.transpose(2, 0, 1)) for each in slices],
        dice=[_dice(each, reference[:, :, place]) for each in slices],
        aspect=float(edges[1] / edges[0]),
    )


def _dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float | None:
    """Mean over the targets that either has on the slice; (x, y, targets)."""
    both, sizes = (prediction & reference).sum(axis=(0, 1)), prediction.sum(axis=(0, 1)) + reference.sum(axis=(0, 1))
    there = sizes > 0
    return float((2 * both[there] / sizes[there]).mean()) if there.any() else None
