"""Pictures of scans: image, reference and predictions side by side; inputs and outputs of a restoring method."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from harness.api.task import Task

# Colours of Okabe and Ito, which can be told apart with any colour vision and in print.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def colours(number: int) -> list[str]:
    """`number` colours as "#rrggbb": those of Okabe and Ito up to eight, else matplotlib's tab20, which repeat after twenty."""
    tab20 = [to_hex(colour) for colour in colormaps["tab20"](range(20))]
    palette = OKABE_ITO if number <= len(OKABE_ITO) else tab20
    return [palette[index % len(palette)] for index in range(number)]


@dataclass(frozen=True)
class Panel:
    """One axial slice of a case, on the preprocessed grid. A single slice per case, so that a test set fits in memory.

    Attributes:
        dice: mean over the targets that were scored, on the native grid; 0 if none was scored.
        image: first channel, (x, y).
        reference: (x, y), the number of the target from 1 on; 0 for background.
        prediction: as `reference`.
        aspect: voxel edge along y divided by the voxel edge along x.
    """

    case: str
    dice: float
    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    aspect: float


@dataclass(frozen=True)
class Row:
    """One slice of a case with the predictions of several runs: (x, y) arrays as in `Panel`; one prediction and Dice per run."""

    case: str
    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    predictions: list[NDArray[np.uint8]]
    dice: list[float | None]
    aspect: float


def segmentation(task: Task, panels: Sequence[Panel], path: Path, title: str) -> None:
    """Save a picture of the worst, the median and the best test case by mean Dice; only the best of fewer than 3 cases."""
    ordered = sorted(panels, key=lambda panel: panel.dice)
    selected = {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}
    if len(ordered) < 3:
        selected = {"case": ordered[-1]}
    figure = Figure(figsize=(9, 3.1 * len(selected) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(selected), 3, squeeze=False)
    for row, (rank, panel) in zip(axes, selected.items(), strict=True):
        for axis, overlay in zip(row, (None, panel.reference, panel.prediction), strict=True):
            _draw(axis, panel, overlay, len(task.targets))
        row[0].set_ylabel(f"{rank}: {_escape(panel.case)}\nmean Dice {panel.dice:.3f}", fontsize=9)
    for axis, heading in zip(axes[0], ("image", "reference", "prediction"), strict=True):
        axis.set_title(heading)
    figure.suptitle(_escape(title))
    _add_legend(figure, list(task.targets))
    _save(figure, path)


def grid(rows: Sequence[Row], headings: Sequence[str], targets: Sequence[str], path: Path, title: str) -> None:
    """Save a picture with a row per case: image, reference, and the prediction of each run in columns."""
    figure = Figure(figsize=(2.6 * len(headings), 2.9 * len(rows) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    for axes_row, row in zip(axes, rows, strict=True):
        for axis, overlay in zip(axes_row, (None, row.reference, *row.predictions), strict=True):
            _draw(axis, row, overlay, len(targets))
        axes_row[0].set_ylabel(_escape(row.case), fontsize=9)
        for axis, dice in zip(axes_row[2:], row.dice, strict=True):
            axis.set_xlabel("-" if dice is None else f"Dice {dice:.3f}", fontsize=9)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(_escape(heading), fontsize=9)
    figure.suptitle(_escape(title))
    _add_legend(figure, targets)
    _save(figure, path)


def restoration(images: Mapping[str, NDArray[np.float32]], path: Path, title: str) -> None:
    """Save a picture of what a method gets and restores: a row per sample (three at most), a column per array.

    Args:
        images: name -> array (samples, C, x, y, z); the middle axial slice of the first channel is drawn.
    """
    number = min(3, *(len(batch) for batch in images.values()))
    figure = Figure(figsize=(2.6 * len(images), 2.7 * number + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(number, len(images), squeeze=False)
    for column, (name, batch) in zip(axes.T, images.items(), strict=True):
        column[0].set_title(_escape(name), fontsize=9)
        for axis, sample in zip(column, batch, strict=False):
            axis.imshow(sample[0, :, :, sample.shape[3] // 2][::-1, ::-1].T, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(_escape(title), fontsize=9)
    _save(figure, path)


def _add_legend(figure: Figure, targets: Sequence[str]) -> None:
    """A legend below the figure with the colour of each target."""
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours(len(targets)), targets, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)


def _save(figure: Figure, path: Path) -> None:
    """Write a picture. Letters that the font lacks, as of a case named in Chinese, become boxes without a warning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font", UserWarning)
        figure.savefig(path, dpi=110)


def _escape(text: str) -> str:
    """Escape the dollar signs of a text, with which matplotlib would begin a formula."""
    return text.replace("$", r"\$")


def _draw(axis: Axes, panel: Panel | Row, overlay: NDArray[np.uint8] | None, num_targets: int) -> None:
    """Draw the image of a panel, and the target numbers `overlay` over it in colour."""
    # Rows of the picture run from anterior to posterior, columns from the patient's right to left.
    low, high = np.percentile(panel.image, (0.5, 99.5))
    style: dict[str, Any] = {"aspect": panel.aspect, "interpolation": "nearest"}
    axis.imshow(panel.image[::-1, ::-1].T, cmap="gray", vmin=low, vmax=high, **style)
    if overlay is not None:
        palette = ListedColormap(colours(num_targets))
        coloured = np.ma.masked_equal(overlay[::-1, ::-1].T, 0)
        axis.imshow(coloured, cmap=palette, vmin=1, vmax=num_targets, alpha=0.55, **style)
    axis.set_xticks([])
    axis.set_yticks([])


def target_numbers(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Masks (targets, x, y) -> number of the target per voxel (x, y); of overlapping targets the last, innermost one."""
    numbers = np.zeros(masks.shape[1:], dtype=np.uint8)
    for number, mask in enumerate(masks, start=1):
        numbers[mask] = number
    return numbers
