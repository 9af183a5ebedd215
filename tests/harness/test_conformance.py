"""The conformance kit: built-in methods pass it, and each kind of fault is found and named."""

import tomllib
from pathlib import Path

import pytest

from harness import UserError
from harness.api.registry import Registry
from harness.cli.main import main
from harness.conformance.checks import CHECKS
from harness.conformance.fixture import STEPS
from harness.conformance.suite import TWO, assert_conforms, check_method

METHODS = Registry().names("method")
BACKBONES = Registry().names("backbone")
QUICK = ["finite losses", "gradients", "weights"]


@pytest.mark.parametrize("method", METHODS)
def test_built_in_methods_pass_every_check_on_unet(method):
    assert_conforms(method, backbones=["unet"], checks=[check for check in CHECKS if check != "step time"])


@pytest.mark.parametrize("backbone", [name for name in BACKBONES if name != "unet"])
@pytest.mark.parametrize("method", METHODS)
def test_built_in_methods_serve_every_backbone(method, backbone):
    assert_conforms(method, backbones=[backbone], checks=QUICK)


@pytest.mark.parametrize("method", METHODS)
def test_built_in_methods_run_in_two_processes(method):
    assert_conforms(method, backbones=["unet"], checks=["weights", TWO])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_built_in_methods_pass_every_check_on_every_backbone(method):
    assert_conforms(method)


GOOD = '''
import os
from functools import partial

import numpy as np
import torch
from harness import Method, randn, Settings

class Noise(Settings):
    noise: float = 0.1

def shift_with(model, sample, rng):
    return sample

def unseeded(image):
    return torch.from_numpy(np.random.standard_normal(image.shape)).float()

def count(method):
    method.calls = getattr(method, "calls", 0) + 1
    return method.calls

@torch.no_grad()
def meddle(method, step):
    next(method.backbone.parameters()).add_(1)

def shift(sample, rng):
    return {**sample, "image": sample["image"] + rng.random()}

class Toy(Method):
    """Denoise."""
    name = "toy"
    Config = Noise

    def __init__(self, config, backbone):
        super().__init__(config, backbone)
        self.restore = torch.nn.Conv3d(backbone.width, backbone.in_channels, 1)

    @classmethod
    def transform(cls, config):
        return shift

    def forward(self, batch):
        image = batch["image"]
        noise = randn(image.shape, image.device, self.generator)
        features = self.backbone.decode(self.backbone.encode(image + noise))
        return {"denoise": (self.restore(features) - image).square().mean()}
'''
FAULTS = {
    "nan": (
        ".square().mean()}",
        ".square().mean() * float('nan')}",
        "finite losses",
        "is nan",
    ),
    "not a scalar": (
        ".square().mean()}",
        ".square()}",
        "finite losses",
        "not a scalar",
    ),
    "no gradient": (
        ".square().mean()}",
        ".square().mean().detach()}",
        "finite losses",
        "no term has a gradient",
    ),
    "dead head": (
        "1)\n\n    @",
        "1)\n        self.unused = torch.nn.Linear(2, 2)\n\n    @",
        "gradients",
        "no gradient reaches unused",
    ),
    "decoder not used": (
        "self.backbone.decode(self.backbone.encode(image + noise))",
        "self.backbone.encode(image + noise)[0]",
        "gradients",
        "no gradient reaches backbone.down_1",
    ),
    "frozen part trained": (
        'name = "toy"',
        'name = "toy"\n    trains = ("decoder",)\n    after_step = meddle',
        "gradients",
        "have changed",
    ),
    "does not learn": (
        "(self.restore(features) - image).square().mean()",
        "features.sum() * 0 + torch.rand(()) + self.restore(features).sum() * 0",
        f"loss falls, {STEPS} steps",
        "does not fall",
    ),
    "global randomness": (
        "randn(image.shape, image.device, self.generator)",
        "unseeded(image)",
        "same seed",
        "self.generator",
    ),
    "state outside": (
        ".square().mean()}",
        ".square().mean() * count(self)}",
        "state",
        "keep what counts",
    ),
    "state that a checkpoint lacks": (
        ".square().mean()}",
        ".square().mean() * count(self)}",
        "resume",
        "a resumed training ends with another",
    ),
    "draws for its own rows only": (
        "randn(image.shape, image.device, self.generator)",
        "torch.randn(image.shape, generator=self.generator)",
        "micro-batches",
        "draw with harness.rand or harness.randn",
    ),
    "counts its own rows only": (
        ".square().mean()}",
        ".square().sum() / (image > 0.5).sum()}",
        "micro-batches",
        "harness.gather and harness.total",
    ),
    "lambda": (
        "return shift",
        "return lambda sample, rng: sample",
        "transform",
        "cannot be pickled",
    ),
    "transform with a model": (
        "return shift",
        "return partial(shift_with, torch.nn.Linear(1, 1))",
        "transform",
        "holds a Linear",
    ),
    "worker": (
        "+ rng.random()",
        "+ os.getpid()",
        "loader worker",
        "gives another image",
    ),
    "one sample": (
        ".square().mean()}",
        ".square().mean() / (1 if len(image) > 1 else image[1])}",
        "batch sizes",
        "1: IndexError",
    ),
}


def write(tmp_path, old="", new=""):
    plugin = tmp_path / "toy.py"
    assert old in GOOD
    plugin.write_text(GOOD.replace(old, new, 1) if old else GOOD)
    return str(plugin)


def test_a_good_plugin_passes(tmp_path):
    results = check_method("toy", [write(tmp_path)], ["unet"])
    assert {result.status for result in results} == {"pass"}
    assert {result.check for result in results} == {*CHECKS, TWO}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_found_and_named(fault, tmp_path):
    old, new, check, says = FAULTS[fault]
    (result,) = check_method("toy", [write(tmp_path, old, new)], ["unet"], checks=[check])
    assert result.status == "FAIL", result
    assert says in result.detail


def test_weights_that_part_between_processes_are_found(tmp_path):
    old = "def forward"
    new = """def after_step(self, step):
        with torch.no_grad():
            next(self.backbone.parameters()).add_(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)

    def forward"""
    (result,) = check_method("toy", [write(tmp_path, old, new)], ["unet"], checks=[TWO])
    assert (result.status, "other weights" in result.detail) == ("FAIL", True)


def test_the_command_reports_a_table_and_its_status(tmp_path, capsys):
    plugin = write(tmp_path, *FAULTS["nan"][:2])
    assert main(["check-method", plugin, "--backbone", "unet"]) == 2
    out, err = capsys.readouterr()
    assert "finite losses" in out
    assert "FAIL    finite losses (unet): term 'denoise' is nan" in out
    assert "toy: not every check passes" in err


def test_needs_that_nothing_meets_are_refused(tmp_path, capsys):
    plugin = write(tmp_path, 'name = "toy"', 'name = "toy"\n    needs = frozenset({"tokens"})')
    results = check_method("toy", [plugin], ["unet"])
    assert [(result.status, result.detail) for result in results] == [("refused", "it needs tokens")]
    with pytest.raises(AssertionError, match="no backbone can serve"):
        assert_conforms("toy", [plugin], ["unet"])
    assert main(["check-method", plugin, "--backbone", "unet"]) == 2
    assert main(["run", "--method", "toy", "--plugin", plugin, "--task", "brats", "--dry-run"]) == 2
    assert "'unet' has no optional ability: choose --backbone from swinunetr, unetr" in capsys.readouterr().err


@pytest.mark.parametrize(
    "where", ["__init__(self)", "check(self, crop, batch_size)", "prepare(self, volumes, preparation)"]
)
def test_a_plugin_that_raises_while_it_is_built_fails_in_words(where, tmp_path, capsys):
    raising = f'name = "toy"\n    def {where}:\n        raise RuntimeError("boom")\n'
    text = GOOD.replace('name = "toy"', raising).replace(
        "def __init__(self, config", "def _unused(self, config", "(self)" in where
    )
    plugin = tmp_path / "toy.py"
    plugin.write_text(text)
    assert main(["check-method", str(plugin), "--backbone", "unet"]) == 2
    out, err = capsys.readouterr()
    assert "FAIL    builds (unet)" in out
    assert "Traceback" not in err


def test_a_name_that_is_no_string_is_refused(tmp_path, capsys):
    assert main(["check-method", write(tmp_path, 'name = "toy"', "name = 3")]) == 2
    assert "Toy.name = 3 is no name" in capsys.readouterr().err


def test_unknown_names_are_answered_in_words(tmp_path):
    with pytest.raises(UserError, match="did you mean 'simmim'"):
        check_method("simim")
    assert main(["check-method", "simim"]) == 2
    assert main(["check-method", "simmim", "--backbone", "unt"]) == 2
    assert main(["check-method", "simmim", "--set", "backbone.features=1"]) == 2
    empty = tmp_path / "empty.py"
    empty.write_text("x = 1")
    assert main(["check-method", str(empty)]) == 2


EXAMPLE = Path(__file__).parents[2] / "examples" / "denoise"


def test_the_example_package_keeps_the_contract_and_declares_its_method():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    module, name = project["project"]["entry-points"]["harness.methods"]["denoise"].split(":")
    plugin = str(EXAMPLE / f"{module}.py")
    assert Registry([plugin]).load("method", "denoise").__name__ == name
    assert_conforms("denoise", [plugin], ["unet"])
    lines = sum(len(path.read_text().splitlines()) for path in (EXAMPLE / f"{module}.py", EXAMPLE / "pyproject.toml"))
    assert lines < 60
