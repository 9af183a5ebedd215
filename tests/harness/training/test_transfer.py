"""Weights in a new network: every tensor is reported."""

import re

import torch

from backbones.unet import UNet
from harness.training.transfer import transfer
from tests.harness.commands import harness, record_of, short_run


def unet(first=4):
    return UNet(UNet.Config(features=(first, 4, 8, 8, 16)), in_channels=1)


def test_transfer_reports_every_tensor():
    source, target = unet(), unet()
    weights = source.part_weights(("encoder", "decoder"))
    report = transfer(target, weights)
    assert (len(report.loaded), report.skipped, report.reinitialised) == (len(weights), [], [])
    assert report.encoder_fraction == 1
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


def test_transfer_of_a_part_and_of_other_shapes_says_so():
    encoder = unet().part_weights(("encoder",))
    report = transfer(unet(), encoder)
    assert report.encoder_fraction == 1
    assert all(key.startswith("upcat") for key in report.reinitialised)
    other = transfer(unet(first=8), encoder | {"foreign.weight": torch.zeros(1)})
    assert "foreign.weight" in other.skipped
    assert "conv_0.conv_0.conv.weight" in other.skipped
    assert 0 < other.encoder_fraction < 1


def test_one_channel_serves_four_and_says_so(data_folders, tmp_path, capsys):
    """As the paper does: pre-trained on CT, fine-tuned on BraTS' four modalities."""
    generic = ["--mode", "generic", "--corpus", data_folders / "scans"]
    harness(*short_run("simmim", data_folders / "brats", "brats"), *generic, "--runs", tmp_path)
    assert re.search(r"\(\d+ \(.*\) repeated from one channel\)", capsys.readouterr().err)
    transfer = record_of(tmp_path, "simmim")["transfer"]
    assert transfer["inflated"]
    assert transfer["skipped"] == []
    assert transfer["encoder_fraction"] == 1
