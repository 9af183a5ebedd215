"""One picture of a run: image, reference and prediction side by side."""

from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from harness.images import load_case
from harness.task import Task
from harness.volumes import Volume

# Okabe-Ito: told apart with any colour vision and in print.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")

Panel = tuple[float, Volume, NDArray[np.bool_]]


def mean_dice(scores: Sequence[float | None]) -> float:
    """Mean over the targets that were scored; 0 where none was."""
    kept = [value for value in scores if value is not None]
    return float(np.mean(kept)) if kept else 0.0


def segmentation(task: Task, panels: Sequence[Panel], path: Path, title: str) -> None:
    """Worst, median and best test case by mean Dice, each at the axial slice with the largest reference.

    Args:
        panels: (mean Dice, volume, predicted masks (targets, x, y, z) on the native grid) of every test case.
    """
    ordered = sorted(panels, key=lambda panel: panel[0])
    picked = {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}
    if len(ordered) < 3:
        picked = {"case": ordered[-1]}
    figure = Figure(figsize=(9, 3.1 * len(picked) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(picked), 3, squeeze=False)
    for row, (which, (dice, volume, predicted)) in zip(axes, picked.items(), strict=True):
        _row(task, row, volume, predicted, f"{which}: {volume.case.id}\nmean Dice {dice:.3f}")
    for axis, heading in zip(axes[0], ("image", "reference", "prediction"), strict=True):
        axis.set_title(heading)
    figure.suptitle(title)
    handles = [Patch(color=COLOURS[n % len(COLOURS)], label=name) for n, name in enumerate(task.targets)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(5, len(handles)), frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _row(task: Task, row: NDArray[np.object_], volume: Volume, predicted: NDArray[np.bool_], text: str) -> None:
    loaded = load_case(task, volume.case)
    turn = nib.orientations.io_orientation(loaded.affine)
    reference = task.masks(nib.orientations.apply_orientation(loaded.label, turn))
    prediction = np.stack([nib.orientations.apply_orientation(mask, turn) for mask in predicted])
    image = nib.orientations.apply_orientation(loaded.image[0], turn)
    spacing = np.empty(3)
    spacing[turn[:, 0].astype(int)] = loaded.spacing
    middle = int(reference.any(axis=0).sum(axis=(0, 1)).argmax())
    # Rows of the picture run from anterior to posterior, columns from the patient's right to left.
    image = image[::-1, ::-1, middle].T
    low, high = np.percentile(image, (0.5, 99.5))
    aspect = spacing[1] / spacing[0]
    for axis, masks in zip(row, (None, reference, prediction), strict=True):
        axis.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
        if masks is not None:
            # One colour a voxel: of targets that overlap, the last (the innermost) is shown.
            shown = np.zeros(image.shape, dtype=np.uint8)
            for number, mask in enumerate(masks, start=1):
                shown[mask[::-1, ::-1, middle].T] = number
            palette = ListedColormap([COLOURS[number % len(COLOURS)] for number in range(len(masks))])
            overlay = np.ma.masked_equal(shown, 0)
            axis.imshow(
                overlay, cmap=palette, vmin=1, vmax=len(masks), alpha=0.55, aspect=aspect, interpolation="nearest"
            )
        axis.set_xticks([])
        axis.set_yticks([])
    row[0].set_ylabel(text, fontsize=9)
