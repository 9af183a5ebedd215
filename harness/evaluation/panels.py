"""A figure of cases: image, reference, and the predictions of several runs side by side (the paper's Figure 3)."""

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
    """Write the figure, as PNG or SVG by the ending of `out`. Returns the ids of the cases that it shows.

    Without `cases`, it shows the three cases on which the mean Dice of the runs differs most. Of each case it shows the axial
    slice with the most voxels on which any run and the reference disagree.

    Args:
        fallback: runs folder, where a phantom is written if no data is given.

    Raises:
        UserError: the runs are not comparable, kept no predictions, have no such case, or were made from other data.
    """
    for run in runs[1:]:
        if differences := board.differing(runs[0], run):
            raise UserError(
                f"{runs[0].run_id} and {run.run_id} differ in {', '.join(differences)}: give runs of one table"
            )
    for run in runs:
        if not (run.folder / "predictions").is_dir():
            raise UserError(
                f"{run.run_id} kept no predictions: ask for it again with `harness run ... --save-predictions`"
            )
    task = Registry(plugins).task(str(runs[0].record["task"]))
    root = find_data(task, data, fallback)
    task_cases = {case.id: case for case in task.cases(root)}
    chosen = list(cases) or _most_different(runs)
    for name in chosen:
        if name not in runs[0].cases or name not in task_cases:
            raise UserError(
                f"{name!r} is no test case of these runs in {root}: there are {', '.join(runs[0].cases[:8])} ..."
            )
    rows = [_row(task, task_cases[name], runs) for name in chosen]
    headings = ["image", "reference", *(f"{run.method}, {run.backbone}, seed {run.seed}" for run in runs)]
    title = "PHANTOM" if runs[0].phantom else f"{task.name}, the slice with the largest disagreement, Dice on it"
    pictures.grid(rows, headings, list(task.targets), out, title)
    return chosen


def _most_different(runs: Sequence[Run], number: int = 3) -> list[str]:
    """The `number` cases whose mean Dice differs most between the runs; with a single run, those with its lowest Dice."""
    means = np.array([np.nanmean(run.dice, axis=1) for run in runs])
    spread = np.ptp(means, axis=0) if len(runs) > 1 else -means[0]
    return [runs[0].cases[index] for index in np.argsort(-np.nan_to_num(spread), kind="stable")[:number]]


def _row(task: Task, case: Case, runs: Sequence[Run]) -> Row:
    """The row of one case in the figure."""
    loaded = load_case(task, case)
    assert loaded.label is not None
    # All volumes get the nearest axis-aligned orientation, so that slices are axial whatever order of axes the file has.
    orientation = nib.orientations.io_orientation(loaded.affine)
    reorient = nib.orientations.apply_orientation
    reference = reorient(task.masks(loaded.label).transpose(1, 2, 3, 0), orientation)
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
        predictions.append(reorient(task.masks(label).transpose(1, 2, 3, 0), orientation))
    wrong = np.any([(prediction != reference).any(axis=3) for prediction in predictions], axis=0)
    index = (
        int(wrong.sum(axis=(0, 1)).argmax()) if wrong.any() else int(reference.any(axis=3).sum(axis=(0, 1)).argmax())
    )
    slices = [prediction[:, :, index] for prediction in predictions]
    voxel_edges = np.abs(loaded.affine[:3, :3]).max(axis=1)
    return Row(
        case=case.id,
        image=reorient(loaded.image[0], orientation)[:, :, index],
        reference=pictures.target_numbers(reference[:, :, index].transpose(2, 0, 1)),
        predictions=[pictures.target_numbers(masks.transpose(2, 0, 1)) for masks in slices],
        dice=[_dice(masks, reference[:, :, index]) for masks in slices],
        aspect=float(voxel_edges[1] / voxel_edges[0]),
    )


def _dice(prediction: NDArray[np.bool_], reference: NDArray[np.bool_]) -> float | None:
    """Mean Dice of masks (x, y, targets) over the targets that either of them has on the slice; None if there are none."""
    both, sizes = (prediction & reference).sum(axis=(0, 1)), prediction.sum(axis=(0, 1)) + reference.sum(axis=(0, 1))
    present = sizes > 0
    return float((2 * both[present] / sizes[present]).mean()) if present.any() else None
