"""Probes while pre-training runs: what they measure, that training does not notice, and that collapse is named."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from harness import UserError
from harness.config.request import Request
from harness.data.volumes import preprocess_cases
from harness.runs import probe
from harness.runs.execute import run
from harness.runs.locate import locate
from harness.runs.plan import plan
from harness.runs.probe import Probe, fit_probe, has_collapsed
from harness.training.protocols import LinearProbe
from tests.conftest import TINY, TINY_BUDGET

SETTINGS = (*TINY["unet"], *TINY_BUDGET, "pretrain.steps=5", "finetune.steps=1", "evaluate.overlap=0")


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Two crops and a few iterations, which say enough about a phantom."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(probe, "CROPS", 2)
        patched.setattr(probe, "ITERATIONS", 5)
        yield


def request_for(data, runs, every, method="simmim", **changes) -> Request:
    settings = (*SETTINGS, f"pretrain.probe_every={every}")
    return Request(method=method, task="msd_hippocampus", data=data, runs=runs, **({"settings": settings} | changes))


@pytest.fixture(scope="module")
def probed(thirty_cases, tmp_path_factory):
    """Folder and record of a run with probes, and of the same run without."""
    return [run(request_for(thirty_cases, tmp_path_factory.mktemp("runs"), every)) for every in (2, 0)]


def test_it_probes_before_training_at_its_pace_and_at_the_end(probed):
    with_probe, without = probed
    points = with_probe.record["probe"]["points"]
    assert [step for step, _, _ in points] == [0, 2, 4, 5]
    assert all(0 <= dice <= 1 and rank > 0 for _, dice, rank in points)
    assert with_probe.record["probe"]["collapsed"] is None
    assert without.record["probe"] is None


def test_training_does_not_notice(probed):
    ours, theirs = (load_file(each.folder / "weights.safetensors") for each in probed)
    assert all(ours[key].equal(theirs[key]) for key in theirs)
    assert probed[0].record["metrics"] == probed[1].record["metrics"]


def test_the_last_point_is_of_the_weights_that_are_transferred(probed, thirty_cases, tmp_path):
    with_probe, _ = probed
    runs = with_probe.folder.parent
    request = request_for(thirty_cases, runs, 2)
    run_plan = plan(request, *locate(request))
    weights = load_file(run_plan.pretrain_folder(runs) / "weights.safetensors")
    dice, rank = new_probe(run_plan, runs, tmp_path).measure(weights, torch.device("cpu"))
    assert with_probe.record["probe"]["points"][-1][1:] == [round(dice, 6), round(rank, 3)]


def new_probe(run_plan, runs, folder) -> Probe:
    """A probe of a planned run, with two training cases."""

    def volumes(cases):
        return preprocess_cases(run_plan.task, cases, run_plan.data.inventory.digests, runs / "cache")

    labelled, validation = volumes(run_plan.label_cases), volumes(run_plan.validation)
    return Probe(run_plan.config, run_plan.plugins, run_plan.task, labelled, validation, 5, folder / "probe.json")


def test_collapsed_features_are_named(thirty_cases, tmp_path, capsys, monkeypatch):
    request = request_for(thirty_cases, tmp_path, 2)
    run_plan = plan(request, *locate(request))
    method = run_plan.plugins.new_method(run_plan.config, 1)
    watch = new_probe(run_plan, tmp_path, tmp_path)
    watch(method, 0)
    watch(method, 1)  # not due
    # One direction is left of the deepest features: the last convolutions of the encoder repeat one output.
    flat = {
        key: value[:1].expand_as(value).clone() if key.startswith("down_4") and value.ndim == 5 else value
        for key, value in method.weights().items()
    }
    monkeypatch.setattr(type(method), "weights", lambda self: flat)
    watch(method, 2)
    said = capsys.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("probe at step")]) == 2
    assert "COLLAPSED" not in said[-2]
    assert said[-1].endswith("THE FEATURES HAVE COLLAPSED")
    assert watch.record()["collapsed"] == 2


def test_a_point_that_is_written_is_not_measured_again(thirty_cases, tmp_path, monkeypatch):
    request = request_for(thirty_cases, tmp_path, 2)
    run_plan = plan(request, *locate(request))
    watch = new_probe(run_plan, tmp_path, tmp_path)
    (tmp_path / "probe.json").write_text(json.dumps({"0": {"dice": 0.5, "rank": 3.0, "seconds": 1.0}}))
    monkeypatch.setattr(Probe, "measure", lambda *_: pytest.fail("measured again"))
    watch(run_plan.plugins.new_method(run_plan.config, 1), 0)
    assert watch.record() == {"points": [[0, 0.5, 3.0]], "collapsed": None, "seconds": 1.0}


class Given(torch.nn.Module):
    """An encoder that passes on two channels as they are."""

    channels, strides = (2,), ((1, 1, 1),)

    def encode(self, image):
        return [image]


def test_a_probe_is_fitted_until_features_that_hold_the_answer_give_it(registry, monkeypatch):
    task = registry.task("msd_hippocampus")
    generator = torch.Generator().manual_seed(0)
    crops = []
    for _ in range(2):
        target = torch.randint(0, 3, (1, 1, 8, 8, 8), generator=generator)
        # Far apart in scale and in mean, so that standardising matters.
        image = torch.cat([1000 * (target == 1) + 7e5, 0.001 * (target == 2)], dim=1).float()
        crops.append((image, target))
    monkeypatch.setattr(probe, "ITERATIONS", 40)
    layer = fit_probe(Given(), crops, task)
    assert isinstance(layer, LinearProbe)
    for image, target in crops:
        assert (layer(image).argmax(dim=1) == target[:, 0]).float().mean() > 0.99


def test_without_validation_cases_it_is_refused_before_training(hippocampus_phantom, tmp_path):
    with pytest.raises(UserError, match=r"pretrain\.probe_every needs validation cases, at most one in 20"):
        run(request_for(hippocampus_phantom, tmp_path, 2))


def test_probes_belong_to_the_identity_of_the_pre_training_only_if_they_are_asked_for(thirty_cases, tmp_path):
    def key(every, **changes):
        request = request_for(thirty_cases, tmp_path, every, **changes)
        return plan(request, *locate(request)).pretrain_key

    assert key(0) == key(0, label_fraction=0.5)
    assert len({key(0), key(2), key(3), key(2, label_fraction=0.5)}) == 4
    other = (*SETTINGS, "pretrain.probe_every=2", "evaluate.overlap=0.5")
    assert key(2) != key(2, settings=other) != key(2, settings=(*other, "finetune.crop=64,32,32"))
    request = request_for(thirty_cases, tmp_path, 0)
    assert replace(request, settings=SETTINGS) != request
    assert plan(replace(request, settings=SETTINGS), *locate(request)).pretrain_key == key(0)


@pytest.mark.parametrize(
    ("rank", "before", "is_collapsed"),
    [(1.0, 6.9, True), (1.9, 6.9, True), (2.1, 6.9, False), (2.9, 30.0, True), (3.1, 30.0, False), (1.2, 1.5, False)],
)
def test_collapse_is_one_direction_or_a_tenth_of_the_directions(rank, before, is_collapsed):
    assert has_collapsed(rank, before) == is_collapsed
