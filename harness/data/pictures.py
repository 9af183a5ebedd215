"""Pictures of scans: image, reference and predictions side by side; what a method sees and restores."""

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

# Okabe-Ito: told apart with any colour vision and in print.
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")


def colours(number: int) -> list[str]:
    """So many colours, as "#rrggbb"; more than eight are those of matplotlib's tab20, which repeat after twenty."""
    many = [to_hex(colour) for colour in colormaps["tab20"](range(20))]
    chosen = OKABE_ITO if number <= len(OKABE_ITO) else many
    return [chosen[place % len(chosen)] for place in range(number)]


@dataclass(frozen=True)
class Panel:
    """One axial slice of a case, on the prepared grid; a slice each, so that a whole test set fits in memory.

    Attributes:
        dice: mean over the targets that were scored, in the native grid; 0 where none was.
        image: (x, y) of the first channel. reference, prediction: (x, y), 0 or the number of the target from 1.
        aspect: voxel edge along y over the one along x.
    """

    case: str
    dice: float
    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    prediction: NDArray[np.uint8]
    aspect: float


@dataclass(frozen=True)
class Row:
    """One slice of one case as several runs segment it: (x, y) arrays as in `Panel`; one prediction and Dice per run."""

    case: str
    image: NDArray[np.float32]
    reference: NDArray[np.uint8]
    predictions: list[NDArray[np.uint8]]
    dice: list[float | None]
    aspect: float


def segmentation(task: Task, panels: Sequence[Panel], path: Path, title: str) -> None:
    """Worst, median and best test case by mean Dice."""
    ordered = sorted(panels, key=lambda panel: panel.dice)
    picked = {"worst": ordered[0], "median": ordered[len(ordered) // 2], "best": ordered[-1]}
    if len(ordered) < 3:
        picked = {"case": ordered[-1]}
    figure = Figure(figsize=(9, 3.1 * len(picked) + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(picked), 3, squeeze=False)
    for row, (which, shown) in zip(axes, picked.items(), strict=True):
        for axis, overlay in zip(row, (None, shown.reference, shown.prediction), strict=True):
            _draw(axis, shown, overlay, len(task.targets))
        row[0].set_ylabel(f"{which}: {shown.case}\nmean Dice {shown.dice:.3f}", fontsize=9)
    for axis, heading in zip(axes[0], ("image", "reference", "prediction"), strict=True):
        axis.set_title(heading)
    figure.suptitle(_plain(title))
    _name_targets(figure, list(task.targets))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def grid(rows: Sequence[Row], headings: Sequence[str], targets: Sequence[str], path: Path, title: str) -> None:
    """Cases below each other; image, reference and the prediction of each run beside each other."""
    figure = Figure(figsize=(2.6 * len(headings), 2.9 * len(rows) + 1), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), len(headings), squeeze=False)
    for line, row in zip(axes, rows, strict=True):
        for axis, overlay in zip(line, (None, row.reference, *row.predictions), strict=True):
            _draw(axis, row, overlay, len(targets))
        line[0].set_ylabel(_plain(row.case), fontsize=9)
        for axis, dice in zip(line[2:], row.dice, strict=True):
            axis.set_xlabel("-" if dice is None else f"Dice {dice:.3f}", fontsize=9)
    for axis, heading in zip(axes[0], headings, strict=True):
        axis.set_title(_plain(heading), fontsize=9)
    figure.suptitle(_plain(title))
    _name_targets(figure, targets)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def restoration(images: Mapping[str, NDArray[np.float32]], path: Path, title: str) -> None:
    """What a method sees and restores: name -> (samples, C, x, y, z); middle slices of the first channel, a sample a row."""
    number = min(3, *(len(each) for each in images.values()))
    figure = Figure(figsize=(2.6 * len(images), 2.7 * number + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(number, len(images), squeeze=False)
    for column, (name, batch) in zip(axes.T, images.items(), strict=True):
        column[0].set_title(_plain(name), fontsize=9)
        for axis, sample in zip(column, batch, strict=False):
            axis.imshow(sample[0, :, :, sample.shape[3] // 2][::-1, ::-1].T, cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
    figure.suptitle(_plain(title), fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def _name_targets(figure: Figure, targets: Sequence[str]) -> None:
    handles = [Patch(color=colour, label=name) for colour, name in zip(colours(len(targets)), targets, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)


def _plain(text: str) -> str:
    """Text that is no formula: a dollar sign would begin one."""
    return text.replace("$", r"\$")


def _draw(axis: Axes, panel: Panel | Row, overlay: NDArray[np.uint8] | None, num_targets: int) -> None:
    # Rows of the picture run from anterior to posterior, columns from the patient's right to left.
    low, high = np.percentile(panel.image, (0.5, 99.5))
    style: dict[str, Any] = {"aspect": panel.aspect, "interpolation": "nearest"}
    axis.imshow(panel.image[::-1, ::-1].T, cmap="gray", vmin=low, vmax=high, **style)
    if overlay is not None:
        palette = ListedColormap(colours(num_targets))
        shown = np.ma.masked_equal(overlay[::-1, ::-1].T, 0)
        axis.imshow(shown, cmap=palette, vmin=1, vmax=num_targets, alpha=0.55, **style)
    axis.set_xticks([])
    axis.set_yticks([])


def numbered(masks: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Masks (targets, x, y) -> one number a voxel: of targets that overlap, the last (the innermost) is shown."""
    numbered = np.zeros(masks.shape[1:], dtype=np.uint8)
    for number, mask in enumerate(masks, start=1):
        numbered[mask] = number
    return numbered
