"""Built-in methods, the example and a good plugin pass every check."""

import tomllib
from pathlib import Path

import pytest

from harness.api.registry import Registry
from harness.cli.main import main
from harness.conformance.checks import CHECKS
from harness.conformance.suite import FEATURES, TWO, assert_conforms, check_method
from tests.harness.toy_method import write_toy

METHODS = Registry().names("method")
BACKBONES = Registry().names("backbone")
QUICK = ["finite losses", "gradients", "weights"]


# What is left to `-m slow` so that the quick tests stay quick: every check of most methods, and most methods on most networks.
# A method sees a network through the contract of backbones only. So three methods of different kinds try each network (SparK is
# refused where a network lacks what it needs), and most methods try one network whose blocks are not convolutions.
WITH_EVERY_CHECK = ("hybridmim", "scratch", "official")
LATER = ("dino", "mae", "simclr", "simmim", "supervised", "swinunetr_ssl", "volume_fusion")
ON_EVERY_NETWORK = ("hybridmim", "spark", "transvw")


def quick_or_slow(*values, quick):
    return pytest.param(*values, marks=[] if quick else pytest.mark.slow)


@pytest.mark.parametrize("method", [quick_or_slow(name, quick=name in WITH_EVERY_CHECK) for name in METHODS])
def test_built_in_methods_pass_every_check_on_unet(method):
    assert_conforms(method, backbones=["unet"], checks=[check for check in CHECKS if check != "step time"])


@pytest.mark.parametrize(
    ("method", "backbone"),
    [
        quick_or_slow(
            method, backbone, quick=method in ON_EVERY_NETWORK or (backbone == "swinunetr" and method not in LATER)
        )
        for method in METHODS
        for backbone in BACKBONES
        if backbone != "unet"
    ],
)
def test_built_in_methods_serve_every_backbone(method, backbone):
    lacking = Registry().load("method", method).needs - Registry().load("backbone", backbone).abilities
    if lacking:
        (result,) = check_method(method, backbones=[backbone], checks=QUICK)
        assert (result.status, result.detail) == ("refused", f"it needs {', '.join(sorted(lacking))}")
        return
    assert_conforms(method, backbones=[backbone], checks=QUICK)


@pytest.mark.parametrize("method", [quick_or_slow(name, quick=name in WITH_EVERY_CHECK) for name in METHODS])
def test_built_in_methods_run_in_two_processes(method):
    assert_conforms(method, backbones=["unet"], checks=["weights", TWO])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("method", METHODS)
def test_built_in_methods_pass_every_check_on_every_backbone(method):
    assert_conforms(method)


@pytest.mark.slow
def test_a_good_plugin_passes(tmp_path):
    results = check_method("toy", [write_toy(tmp_path)], ["unet"])
    assert {result.status for result in results} == {"pass"}
    assert {result.check for result in results} == {*CHECKS, TWO}


def test_needs_that_nothing_meets_are_refused(tmp_path, capsys):
    plugin = write_toy(tmp_path, 'name = "toy"', 'name = "toy"\n    needs = frozenset({"tokens"})')
    results = check_method("toy", [plugin], ["unet"])
    assert [(result.status, result.detail) for result in results] == [("refused", "it needs tokens")]
    with pytest.raises(AssertionError, match="no backbone can serve"):
        assert_conforms("toy", [plugin], ["unet"])
    assert main(["check-method", plugin, "--backbone", "unet"]) == 2
    assert main(["run", "--method", "toy", "--plugin", plugin, "--task", "brats", "--dry-run"]) == 2
    assert (
        "the ability 'tokens', which 'unet' does not have: choose --backbone from swinunetr, unetr"
        in capsys.readouterr().err
    )


EXAMPLE = Path(__file__).parents[3] / "examples" / "denoise"


@pytest.mark.slow
def test_the_example_package_keeps_the_contract_and_declares_its_method():
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    module, name = project["project"]["entry-points"]["harness.methods"]["denoise"].split(":")
    plugin = str(EXAMPLE / f"{module}.py")
    assert Registry([plugin]).load("method", "denoise").__name__ == name
    assert_conforms("denoise", [plugin], ["unet"])
    lines = sum(len(path.read_text().splitlines()) for path in (EXAMPLE / f"{module}.py", EXAMPLE / "pyproject.toml"))
    assert lines < 60


REVERSED = """
from backbones.unet import UNet
class Reversed(UNet):
    name = "reversed_unet"
    def trunk(self, image):
        return super().trunk(image)[::-1]
"""


@pytest.mark.parametrize("method", ["scratch", "hybridmim"])
def test_a_backbone_with_other_features_than_declared_is_one_failure(method, tmp_path):
    (tmp_path / "reversed.py").write_text(REVERSED)
    (only,) = check_method(method, [str(tmp_path / "reversed.py")], ["reversed_unet"])
    assert (only.status, only.check) == ("FAIL", FEATURES)
    assert "level 0 of trunk is" in only.detail


def test_a_method_that_trains_nothing_says_what_it_checked():
    results = {result.check: result for result in check_method("scratch", backbones=["unet"])}
    assert (results[FEATURES].status, results["gradients"].status) == ("pass", "n/a")
    assert "take a method that trains" in results[FEATURES].detail


DRAWS = """
from torch import nn
from backbones.unet import UNet
class Draws(UNet):
    name = "draws"
    def __init__(self, *arguments, **more):
        super().__init__(*arguments, **more)
        self.drop = nn.Dropout(0.5)
    def trunk(self, image):
        return [self.drop(level) for level in super().trunk(image)]
"""


def test_pytorchs_dropout_in_a_backbone_is_named(tmp_path):
    (tmp_path / "draws.py").write_text(DRAWS)
    (only,) = check_method("simmim", [str(tmp_path / "draws.py")], ["draws"], checks=["micro-batches"])
    assert only.status == "FAIL"
    assert only.detail.endswith("; drop of the backbone is PyTorch's dropout: take harness.Dropout")
    # harness.Dropout instead mends it.
    (tmp_path / "mended.py").write_text(
        DRAWS.replace("nn.Dropout", "harness.Dropout").replace("from torch import nn", "import harness")
    )
    (only,) = check_method("simmim", [str(tmp_path / "mended.py")], ["draws"], checks=["micro-batches"])
    assert only.status == "pass", only.detail


def test_after_a_failure_that_stops_all_nothing_else_is_run_and_the_line_is_named(tmp_path):
    file = write_toy(tmp_path, "image = batch", "image = batch['x'], batch")
    results = check_method("toy", [file], ["unet"])
    failed = [(result.check, result.detail) for result in results if result.status == "FAIL"]
    assert [check for check, _ in failed] == ["finite losses"]
    assert failed[0][1].startswith(f"plugin {file}, line ")
    assert "in forward: KeyError: 'x'" in failed[0][1]
    assert {result.detail for result in results if result.status == "n/a"} == {"not run: finite losses failed"}
