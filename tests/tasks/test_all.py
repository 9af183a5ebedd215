"""The task contract over the whole registry, on phantoms."""

import shutil

import numpy as np
import pytest

from harness import UserError, Window
from harness.api.registry import Registry
from harness.config.request import Request
from harness.config.resolve import resolve
from harness.data.cases import load_case
from harness.data.phantom import make_phantom

TASKS = [Registry().task(name) for name in Registry().names("task")]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_phantom_is_worth_learning(task):
    images, label = make_phantom(task, np.random.default_rng(3))
    assert images.shape == (len(task.channels), *label.shape)
    assert set(np.unique(label)) == set(task.labels)
    ct = isinstance(task.normalisation, Window)
    body = images > (-500 if ct else 0)
    assert 0.2 < body.mean() < 0.9
    for channel, inside in zip(images, body, strict=True):
        assert len(np.unique(channel[inside])) > (100 if ct else 1000)
        for value in task.labels[1:]:
            structure = channel[label == value]
            assert structure.std() > 0
            assert len(structure) > 30
    # Told apart by more than noise in at least one channel.
    scale = 100 if ct else np.array([channel[inside].mean() for channel, inside in zip(images, body, strict=True)])
    means = [
        [channel[(label == value) & inside].mean() for value in task.labels]
        for channel, inside in zip(images, body, strict=True)
    ]
    assert (np.ptp(means, axis=1) / scale).max() > 0.15
    if ct:
        assert images.dtype == np.int16
        assert -1100 < np.median(images[~body]) < -900
    if len(task.channels) > 1:
        assert not np.allclose(means[0], means[1], atol=0.05)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_phantoms_differ_between_cases_and_repeat_with_the_seed(task):
    first, again, other = (make_phantom(task, np.random.default_rng(seed))[1] for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert first.shape != other.shape or not np.array_equal(first, other)


def test_phantom_goes_through_the_same_reader(phantom):
    task, root = phantom
    cases = task.cases(task.find(root))
    assert len(cases) == task.phantom_cases
    loaded = load_case(task, cases[0])
    assert loaded.image.shape == (len(task.channels), *loaded.label.shape)


def test_find_takes_the_folder_or_the_one_that_contains_it(phantom, tmp_path):
    task, root = phantom
    (tmp_path / "outer").mkdir()
    folder = getattr(task, "folder", "MICCAI_BraTS2020_TrainingData")
    shutil.copytree(root, tmp_path / "outer" / folder)
    assert task.find(tmp_path / "outer") == task.find(tmp_path / "outer" / folder)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_an_empty_or_foreign_folder_is_refused(task, tmp_path):
    with pytest.raises(UserError, match="give --data"):
        task.find(tmp_path)


def test_paper_presets_are_section_iv():
    registry = Registry()
    for name, epochs, batch, crop, spacing in [
        ("brats", 300, 2, 128, (1.0, 1.0, 1.0)),
        ("btcv", 2000, 4, 96, (1.5, 1.5, 2.0)),
        ("msd_liver", 600, 4, 96, (1.5, 1.5, 2.0)),
        ("msd_spleen", 600, 4, 96, (1.5, 1.5, 2.0)),
    ]:
        task = registry.task(name)
        config = resolve(Request(method="scratch", task=name, preset="paper"), registry, task)
        assert config.finetune.epochs == epochs
        assert config.finetune.batch_size == config.pretrain.batch_size == batch
        assert config.finetune.crop == config.pretrain.crop == (crop,) * 3
        assert task.spacing == spacing
        assert config.pretrain.steps == 100_000
        assert (config.finetune.lr, config.finetune.weight_decay, config.finetune.warmup_epochs) == (1e-4, 1e-5, 50)
