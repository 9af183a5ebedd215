"""What is known before a run starts: whether its parts fit each other and the memory."""

from types import SimpleNamespace

import psutil
import pytest

from backbones.unet import UNet
from harness import UserError
from harness.config.request import Request
from harness.config.resolve import resolve
from harness.training.compatibility import check_fit
from harness.training.models import Plugins
from tests.harness.commands import status_of


def fits(registry, method="scratch", backbone="unet", transfer="method", **settings):
    """`check_fit` under settings, with another class in the place of the backbone's where one is given."""
    cls = settings.pop("cls", registry.load("backbone", backbone))
    pairs = tuple(f"{key.replace('__', '.')}={value}" for key, value in settings.items())
    request = Request(method=method, task="msd_hippocampus", backbone=backbone, settings=pairs, transfer=transfer)
    config = resolve(request, registry, registry.task(request.task))
    check_fit(registry, config, Plugins(registry.load("method", method), cls), 1, 1)


@pytest.mark.parametrize(
    ("method", "backbone", "setting", "value"),
    [
        ("scratch", "unet", "backbone__features", "100000,100000,100000,100000,100000"),
        ("scratch", "genesis_unet3d", "backbone__first", "1" * 50),
        ("scratch", "segresnet", "backbone__init_filters", "1000000"),
        ("scratch", "swinunetr", "backbone__window_size", "1000"),
        ("scratch", "swinunetr", "backbone__window_size", "1" * 50),
        ("scratch", "unetr", "backbone__feature_size", "10000000000"),
        ("scratch", "unetr", "backbone__image_size", "10000000000"),
        ("hybridmim", "unet", "method__sub_volume", "1000000"),
        ("transvw", "unet", "method__words", "999999999999"),
        ("volume_fusion", "unet", "method__coefficients", "1" * 50),
        ("voco", "unet", "method__view", "3200000"),
        ("voco", "unet", "method__projection", "1000000"),
    ],
)
def test_weights_that_no_memory_holds_are_refused(registry, method, backbone, setting, value):
    with pytest.raises(UserError, match=f"{setting.replace('__', '[.]')}={value} do not fit"):
        fits(registry, method, backbone, **{setting: value})


def once(build):
    """Builds one thing, without values, to know its size; asked for another one it fails."""
    calls = []

    def checked(*arguments):
        calls.append(arguments)
        assert len(calls) == 1, "built although it does not fit"
        return build(*arguments)

    return checked


@pytest.mark.parametrize("backbone", ["genesis_unet3d", "segresnet", "swinunetr", "unet", "unetr"])
def test_nothing_is_made_that_does_not_fit(registry, backbone, monkeypatch):
    fits(registry, backbone=backbone)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=2**20))
    monkeypatch.setattr(Plugins, "new_backbone", once(Plugins.new_backbone))
    with pytest.raises(UserError, match=r"with these settings do not fit the 0\.0 GiB that are free"):
        fits(registry, backbone=backbone)


class Reads(UNet):
    """Needs values to be built."""

    def __init__(self, config, in_channels):
        super().__init__(config, in_channels)
        self.largest = max(value.max().item() for value in self.parameters())


class Broken(UNet):
    def __init__(self, config, in_channels):
        raise TypeError("a mistake in a plugin")


def test_what_a_plugin_does_while_it_is_built_is_its_own(registry):
    fits(registry, cls=Reads)
    with pytest.raises(TypeError, match="a mistake in a plugin"):
        fits(registry, cls=Broken)


@pytest.mark.parametrize(
    ("method", "backbone"), [("transvw", "unet"), ("simmim", "genesis_unet3d"), ("scratch", "genesis_unet3d")]
)
def test_micro_batches_of_batch_norm_are_refused_before_data_is_read(method, backbone, sixteen_cases, tmp_path, capsys):
    asked = ["run", "--method", method, "--backbone", backbone, "--task", "msd_hippocampus", "--data", sixteen_cases]
    assert status_of(*asked, "--runs", tmp_path / "runs", "--micro-batches", 2) == 2
    assert "batch norm needs the whole batch at once" in capsys.readouterr().err
    assert not (tmp_path / "runs" / "cache").exists()


def test_a_decoder_that_was_not_pretrained_is_not_transferred(registry):
    with pytest.raises(UserError, match="--transfer all: method 'simmim' pre-trains the encoder only"):
        fits(registry, "simmim", transfer="all")
    fits(registry, "simmim", transfer="encoder")
    fits(registry, "hybridmim", transfer="all")


@pytest.mark.parametrize("transfer", ["encoder", "all"])
def test_a_method_without_weights_has_nothing_to_transfer(registry, transfer):
    with pytest.raises(UserError, match=f"--transfer {transfer}: method 'scratch' has no pre-trained weights"):
        fits(registry, "scratch", transfer=transfer)


def test_a_plugins_features_are_compared_with_its_declarations(registry):
    class Narrow(UNet):
        def trunk(self, image):
            return super().trunk(image)[1:]

    with pytest.raises(
        UserError, match=r"backbone 'unet': trunk returned 4 levels, channels and strides declare 5: mend"
    ):
        fits(registry, cls=Narrow)
