"""Pictures show the right cases, the right way round, in colours that can be told apart."""

import numpy as np
import pytest
from matplotlib.axes import Axes
from PIL import Image

from harness.data.pictures import Panel, Row, colours, grid, restoration, segmentation, target_numbers


@pytest.fixture
def drawn(monkeypatch):
    """All that is drawn: (what, value), in its order."""
    seen = []
    for name in ("imshow", "set_ylabel", "set_xlabel", "set_title"):
        plain = getattr(Axes, name)

        def noted(self, value, *more, name=name, plain=plain, **named):
            seen.append((name, value))
            return plain(self, value, *more, **named)

        monkeypatch.setattr(Axes, name, noted)
    return seen


def panel(case, dice):
    image = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    small = np.zeros((4, 5), np.uint8)
    return Panel(case, dice, image, small, small, 1.0)


def labels(drawn, what="set_ylabel"):
    return [value for name, value in drawn if name == what]


def test_the_worst_the_median_and_the_best_case_are_shown(drawn, registry, tmp_path):
    task = registry.task("msd_hippocampus")
    scores = {"a": 0.9, "b": 0.2, "c": 0.5, "d": 0.95, "e": 0.6}
    segmentation(task, [panel(*each) for each in scores.items()], tmp_path / "new" / "x.png", "costs $5 and $6")
    assert labels(drawn) == [
        "worst: b\nmean Dice 0.200",
        "median: e\nmean Dice 0.600",
        "best: d\nmean Dice 0.950",
    ]
    assert Image.open(tmp_path / "new" / "x.png").format == "PNG"
    drawn.clear()
    segmentation(task, [panel("a", 0.1), panel("b", 0.3)], tmp_path / "y.png", "")
    assert labels(drawn) == ["case: b\nmean Dice 0.300"]


def test_a_slice_is_seen_from_below_with_the_nose_up(drawn, registry, tmp_path):
    """Radiological: the patient's right is on the left of the picture, anterior is up."""
    image = np.zeros((4, 5), np.float32)
    image[3, 4] = 1  # in RAS the last x is the patient's right, the last y the front
    shown = Panel("a", 0.5, image, np.zeros((4, 5), np.uint8), np.zeros((4, 5), np.uint8), 1.0)
    segmentation(registry.task("msd_hippocampus"), [shown], tmp_path / "x.png", "")
    first = np.asarray(next(value for name, value in drawn if name == "imshow"))
    assert first.shape == (5, 4)
    assert np.argwhere(first == 1).tolist() == [[0, 0]]


def test_a_grid_has_a_row_per_case_and_a_column_per_run(drawn, tmp_path):
    small = np.zeros((4, 5), np.uint8)
    prediction = small.copy()
    prediction[1, 2] = 2
    row = Row("x$y", np.ones((4, 5), np.float32), small, [small, prediction], [0.25, None], 1.0)
    grid([row, row], ["image", "reference", "one", "two"], ["a", "b"], tmp_path / "g.svg", "")
    assert labels(drawn, "set_xlabel") == ["Dice 0.250", "-"] * 2
    assert labels(drawn) == [r"x\$y"] * 2
    assert len(labels(drawn, "imshow")) == 2 * (4 + 3)  # every image, and an overlay on all but the first
    last = np.ma.filled(labels(drawn, "imshow")[-1], 0)
    assert np.argwhere(last == 2).tolist() == [[2, 2]]
    assert (tmp_path / "g.svg").read_text().startswith("<?xml")


def test_what_a_method_sees_is_shown_by_its_middle_slices(drawn, tmp_path):
    batch = np.zeros((5, 2, 3, 4, 6), np.float32)
    for sample in range(5):
        batch[sample, 0, :, :, 3] = sample / 5
    restoration({"image": batch, "masked": batch[:2]}, tmp_path / "r.png", "")
    assert labels(drawn, "set_title") == ["image", "masked"]
    shown = [float(np.unique(value).item()) for value in labels(drawn, "imshow")]
    assert shown == pytest.approx([0, 0.2] * 2)  # as many samples as there are of all


@pytest.mark.parametrize("number", [1, 3, 8, 9, 20])
def test_colours_differ(number):
    assert len(set(colours(number))) == number
    assert all(len(colour) == 7 and int(colour[1:], 16) >= 0 for colour in colours(number))
    assert len(colours(45)) == 45


def test_of_targets_that_overlap_the_innermost_is_shown():
    masks = np.array([[[1, 1, 1, 0]], [[0, 1, 1, 0]], [[0, 0, 1, 0]]], dtype=bool)
    assert target_numbers(masks).tolist() == [[1, 2, 3, 0]]
    assert target_numbers(masks).dtype == np.uint8


@pytest.mark.parametrize("case", ["patient_$7_$8", "a$^$b"])
def test_a_case_whose_name_looks_like_a_formula_is_drawn(case, registry, tmp_path):
    segmentation(registry.task("msd_hippocampus"), [panel(case, 0.5)], tmp_path / "x.png", "")
