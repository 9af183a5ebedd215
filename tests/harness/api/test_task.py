"""Targets and label maps: from a map to masks, to what a loss compares with, and back."""

from dataclasses import replace

import numpy as np
import pytest

from harness import Case, Window
from harness.api.registry import Registry


@pytest.fixture(scope="module")
def overlapping(registry):
    """Whole tumour, core, enhancing tumour: 1, 2, 3 contain each other."""
    return registry.task("msd_brats")


@pytest.fixture(scope="module")
def exclusive(registry):
    return registry.task("msd_hippocampus")


def some_label(values, seed=0):
    return np.random.default_rng(seed).choice(values, size=(4, 5, 6)).astype(np.uint8)


def test_masks_are_where_the_labels_are(overlapping, exclusive):
    label = some_label(overlapping.labels)
    whole, core, enhancing = overlapping.masks(label)
    assert np.array_equal(whole, label > 0)
    assert np.array_equal(core, label >= 2)
    assert np.array_equal(enhancing, label == 3)
    assert (overlapping.num_outputs, exclusive.num_outputs) == (3, 3)
    assert replace(exclusive, targets={}).masks(label).shape == (0, 4, 5, 6)


def test_the_loss_compares_with_masks_or_with_class_numbers(overlapping, exclusive):
    label = some_label(overlapping.labels)
    found = overlapping.training_target(label)
    assert found.dtype == np.float32
    assert np.array_equal(found[2] == 1, label == 3)
    # Two labels in one target, numbered in the order of the targets and not of the labels.
    task = replace(exclusive, targets={"b": (2, 5), "a": (1,)}, labels=(0, 1, 2, 5))
    label = some_label(task.labels)
    classes = task.training_target(label)
    assert classes.dtype == np.int64
    assert np.array_equal(classes[0], np.select([np.isin(label, (2, 5)), label == 1], [1, 2], 0))


def test_the_likeliest_class_wins_and_overlapping_ones_are_decided_alone(overlapping, exclusive):
    scores = np.random.default_rng(0).random((3, 4, 5, 6), dtype=np.float32)
    first, second = exclusive.decide(scores)
    assert np.array_equal(first, (scores[1] > scores[0]) & (scores[1] > scores[2]))
    assert np.array_equal(second, (scores[2] > scores[0]) & (scores[2] > scores[1]))
    assert np.array_equal(overlapping.decide(scores), scores > 0.5)


def test_a_label_map_comes_back_from_its_masks_in_the_numbers_of_its_file(overlapping, exclusive):
    for task in (overlapping, exclusive):
        label = some_label(task.labels)
        assert np.array_equal(task.compose(task.masks(label)), label)
        own = {0: 0, 1: 7, 2: 4, 3: 9}
        numbering = tuple((own[value], value) for value in task.labels)
        assert np.array_equal(task.compose(task.masks(label), numbering), np.vectorize(own.get)(label))


def test_masks_that_no_label_has_become_the_nearest_one(overlapping):
    # Core without whole, enhancing without core; in both the fewest targets differ from the label that is chosen.
    masks = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 1, 1], [0, 1, 1, 1, 1]], dtype=bool)[:, :, None, None]
    columns = {value: overlapping.masks(np.array([value]))[:, 0] for value in overlapping.labels}
    for column, value in zip(masks[:, :, 0, 0].T, overlapping.compose(masks)[:, 0, 0], strict=True):
        apart = {each: int((mask != column).sum()) for each, mask in columns.items()}
        assert value == min(overlapping.labels, key=lambda each: apart[each])


@pytest.mark.parametrize(
    ("low", "high", "usable"),
    [(-175, 250, True), (0, 0, False), (5, 1, False), (0, 1e39, False), (1e8, 1e8 + 1, False), (0, 1e-45, False)],
)
def test_a_window_is_usable_where_float32_tells_its_ends_apart(low, high, usable):
    assert Window(low, high).usable is usable


def test_the_files_of_a_case_are_its_images_and_its_label(tmp_path):
    images, label = (tmp_path / "a", tmp_path / "b"), tmp_path / "c"
    assert Case("x", images, label).files == (*images, label)
    assert Case("x", images, None).files == images


@pytest.mark.parametrize("targets", [{"inner": (1,), "whole": (1, 2)}, {"whole": (1, 2), "inner": (1,)}])
def test_regions_are_composed_in_any_order(targets):
    task = replace(Registry().task("msd_hippocampus"), targets=targets, overlapping=True)
    label = np.array([[[0, 1, 2]]], np.uint8)
    assert np.array_equal(task.compose(task.masks(label)), label)


def test_regions_that_overlap_without_nesting():
    task = replace(
        Registry().task("msd_hippocampus"), targets={"a": (1, 2), "b": (2, 3)}, overlapping=True, labels=(0, 1, 2, 3)
    )
    label = np.array([[[0, 1, 2, 3]]], np.uint8)
    assert np.array_equal(task.compose(task.masks(label)), label)


def test_compose_writes_the_datas_own_numbering():
    task = Registry().task("brats")
    label = np.array([[[0, 1, 2, 4]]], np.uint8)
    assert np.array_equal(task.compose(task.masks(label)), label)
    assert task.compose(task.masks(label), ((0, 0), (1, 1), (2, 2), (3, 4))).ravel().tolist() == [0, 1, 2, 3]
    msd = Registry().task("msd_brats")
    theirs = np.array([[[0, 1, 2, 3]]], np.uint8)
    assert np.array_equal(msd.compose(msd.masks(theirs)), theirs)


def test_the_background_has_the_number_of_its_file_too(overlapping, exclusive):
    for task in (overlapping, exclusive):
        label = np.zeros((2, 2, 2), dtype=np.uint8)
        numbering = tuple((value + 4, value) for value in task.labels)
        assert np.array_equal(task.compose(task.masks(label), numbering), label + 4)
