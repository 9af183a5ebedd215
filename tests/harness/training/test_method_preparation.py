"""What a method prepares is computed once for what it depends on, and costs what it cost."""

import json

import pytest
import torch
from torch import nn

from harness.config.schema import Training
from harness.system.errors import UserError
from harness.training.method_preparation import PreparationContext
from tests.harness.commands import harness, record_of, short_run

CPU = torch.device("cpu")
TEMPLATE = Training(steps=9, crop=8, batch_size=2, lr=0.1, weight_decay=0.1, precision="fp32")


def context(folder, seed=3, identity=("method", "1"), template=TEMPLATE):
    return PreparationContext(seed, CPU, (8, 8, 8), template, list(identity), folder)


class Counter:
    def __init__(self, value=None):
        self.calls, self.value = 0, value

    def __call__(self):
        self.calls += 1
        return self.value if self.value is not None else [float(torch.rand(()))]


def test_a_value_is_computed_once_for_what_it_depends_on(tmp_path):
    compute = Counter({"a": [1, 2.5], "b": None})
    for _ in range(2):
        assert context(tmp_path).remember("words", {"k": 4}, compute) == {"a": [1, 2.5], "b": None}
    assert compute.calls == 1
    bf16 = TEMPLATE.model_copy(update={"precision": "bf16"})
    others = [
        lambda: context(tmp_path).remember("words", {"k": 5}, compute),
        lambda: context(tmp_path).remember("other", {"k": 4}, compute),
        lambda: context(tmp_path, identity=("method", "2")).remember("words", {"k": 4}, compute),
        lambda: context(tmp_path, template=bf16).remember("words", {"k": 4}, compute),
    ]
    for number, other in enumerate(others, start=2):
        other()
        assert compute.calls == number
    more = TEMPLATE.model_copy(update={"workers": 2, "steps": 500})  # on which no value depends
    context(tmp_path, template=more).remember("words", {"k": 4}, compute)
    assert compute.calls == 5


def test_damage_is_computed_anew(tmp_path):
    compute = Counter([1])
    context(tmp_path).remember("words", {}, compute)
    (path,) = tmp_path.glob("words-*.json")
    for text in ("{", '{"value": 1}', "[]"):
        path.write_text(text)
        assert context(tmp_path).remember("words", {}, compute) == [1]
    assert compute.calls == 4


def test_draws_do_not_depend_on_whether_a_value_was_there(tmp_path):
    drawn = []
    for _ in range(2):
        torch.manual_seed(11)
        value = context(tmp_path).remember("words", {}, Counter())
        drawn.append((value, float(torch.rand(()))))
    assert drawn[0] == drawn[1]
    torch.manual_seed(11)
    assert drawn[0][1] == float(torch.rand(()))
    torch.manual_seed(12)
    assert context(tmp_path / "new").remember("words", {}, Counter()) == drawn[0][0]
    assert context(tmp_path / "new", seed=4, identity=("x",)).remember("words", {}, Counter()) != drawn[0][0]


class Prepares:
    """A method that remembers one value."""

    def prepare(self, volumes, preparation):
        preparation.remember("words", {}, Counter([1]))
        preparation.report("found 7 words", words=7)
        return list(reversed(volumes))


def test_a_remembered_value_costs_what_it_cost(tmp_path, capsys):
    first = context(tmp_path)
    assert first.prepare(Prepares(), [1, 2]) == [2, 1]
    assert first.values == {"words": 7}
    assert "found 7 words\n" in capsys.readouterr().err
    (path,) = tmp_path.glob("words-*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    again = context(tmp_path)
    again.prepare(Prepares(), [1, 2])
    assert again.seconds == pytest.approx(1000, abs=1)
    assert "it took 1000.0 s" in capsys.readouterr().err


class Fit(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return {"fit": (self.weight - batch["image"].mean()).square()}


class Ones:
    def __init__(self):
        self.sizes = []

    def sample(self, size, rng):
        self.sizes.append(size)
        return {"image": torch.ones(1, *size)}


def test_a_module_is_trained_by_the_loop_of_the_engine_and_leaves_no_files(tmp_path):
    preparation, module, source = context(tmp_path), Fit(), Ones()

    def compute():
        preparation.train(module, [source], size=(4, 6, 2), steps=30, batch_size=3, lr=0.1)
        return float(module.weight.detach())

    assert preparation.remember("model", {}, compute) == pytest.approx(1, abs=0.3)
    assert source.sizes == [(4, 6, 2)] * 90
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_transvw_reports_its_discovery(two_phantoms, tmp_path, capsys):
    words = [*short_run("transvw", two_phantoms / "msd_hippocampus"), "--runs", tmp_path]
    words += ["--set", "method.autoencoder_steps=2"]
    harness(*words)
    assert "words of 44 sought" in capsys.readouterr().err
    record = record_of(tmp_path, "transvw")
    assert record["method_prepare"]["words"] >= 2
    assert record["timing"]["seconds"]["method_prepare"] > 0
    # Longer pre-training needs no new discovery, and reports what the first one took.
    harness(*words, "--set", "pretrain.steps=3")
    assert "words found in" in capsys.readouterr().err


def test_a_training_that_is_not_remembered_is_refused(tmp_path):
    """Its checkpoints would be those of another run."""
    with pytest.raises(UserError, match=r"outside preparation\.remember"):
        context(tmp_path).train(Fit(), [Ones()], size=(4, 6, 2), steps=3, batch_size=3, lr=0.1)
