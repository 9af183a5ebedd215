"""Weights in a new network: every tensor is reported."""

import re

import pytest
import torch

from backbones.unet import UNet
from harness import UserError
from harness.training.transfer import select_parts, transfer
from leaderboards.records import load_run
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


def test_the_encoder_alone_is_transferred_on_request():
    backbone = unet()
    weights = backbone.part_weights(("encoder", "decoder"))
    encoder = backbone.part_weights(("encoder",))
    assert select_parts(backbone, weights, "encoder").keys() == encoder.keys() < weights.keys()
    assert select_parts(backbone, weights, "method").keys() == weights.keys()
    assert select_parts(backbone, weights, "all").keys() == weights.keys()
    with pytest.raises(UserError, match="leaves nothing to transfer"):
        select_parts(backbone, backbone.part_weights(("decoder",)), "encoder")
    with pytest.raises(UserError, match="leaves nothing to transfer"):
        select_parts(backbone, {}, "encoder")


@pytest.mark.parametrize(("requested", "decoder"), [("method", "equal"), ("all", "equal"), ("encoder", "other")])
def test_transfer_is_recorded_and_named_in_tables(requested, decoder, hippocampus_phantom, tmp_path):
    run = [*short_run("hybridmim", hippocampus_phantom, "msd_hippocampus"), "--runs", tmp_path]
    harness(*run, "--transfer", requested, "--set", "finetune.lr=1e-12")
    record = record_of(tmp_path, "hybridmim")
    moved = record["transfer"]
    assert moved["requested"] == requested
    assert any(key.startswith("upcat") for key in moved["reinitialised"]) == (decoder == "other")
    assert len(moved["first_gradient_norms"]) == record["config"]["finetune"]["steps"]
    assert all(norm > 0 for norm in moved["first_gradient_norms"])
    ranks = moved["effective_rank"]
    assert set(ranks) == {"initial", "transferred", "finetuned"}
    assert ranks["initial"] != ranks["transferred"]
    assert ranks["finetuned"] == pytest.approx(ranks["transferred"], abs=1e-2)  # the learning rate is next to nothing
    (run_folder,) = (path.parent for path in tmp_path.glob("*/record.json"))
    name = load_run(run_folder).method
    assert ("transfer=encoder" in name) == (requested == "encoder")


def test_one_channel_serves_four_and_says_so(data_folders, tmp_path, capsys):
    """As the paper does: pre-trained on CT, fine-tuned on BraTS' four modalities."""
    generic = ["--mode", "generic", "--corpus", data_folders / "scans"]
    harness(*short_run("simmim", data_folders / "brats", "brats"), *generic, "--runs", tmp_path)
    assert re.search(r"\(\d+ \(.*\) repeated from one channel\)", capsys.readouterr().err)
    transfer = record_of(tmp_path, "simmim")["transfer"]
    assert transfer["inflated"]
    assert transfer["skipped"] == []
    assert transfer["encoder_fraction"] == 1
