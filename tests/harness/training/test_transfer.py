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


def test_every_tensor_is_in_one_list_and_keeps_or_changes_its_values_accordingly():
    torch.manual_seed(0)
    source, target = unet().state_dict(), unet()
    missing, other_shape = "down_2.convs.conv_0.conv.weight", "conv_0.conv_0.conv.weight"
    weights = {key: value for key, value in source.items() if key != missing} | {"more.weight": torch.zeros(3)}
    weights[other_shape] = torch.zeros(4, 2, 3, 3, 3)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    report = transfer(target, weights)
    assert report.skipped == [other_shape, "more.weight"]
    assert report.reinitialised == [other_shape, missing]
    assert report.loaded == sorted(set(source) - {missing, other_shape})
    for key, value in target.state_dict().items():
        assert torch.equal(value, (before if key in report.reinitialised else source)[key])
    # 27 weights for each pair of channels.
    whole = sum(
        27 * (given * made + made * made) + 2 * made + 4 * made
        for given, made in ((1, 4), (4, 4), (4, 8), (8, 8), (8, 16))
    )
    assert report.encoder_fraction == pytest.approx(1 - 27 * (4 * 1 + 8 * 4) / whole)
    assert report.random_stem == [other_shape]
    record = report.as_record()
    assert (record["loaded"], record["num_tensors"]) == (len(source) - 2, len(source))
    assert f"2 ({other_shape}, more.weight) skipped, 2 ({other_shape}, {missing}) re-initialised" in str(report)


def test_a_stem_is_repeated_only_if_asked():
    weights = unet().part_weights(("encoder",))
    stem = "conv_0.conv_0.conv.weight"
    four = UNet(UNet.Config(features=(4, 4, 8, 8, 16)), in_channels=4)
    report = transfer(four, weights)
    assert report.inflated == []
    assert stem in report.skipped
    assert report.random_stem == [stem]
    report = transfer(four, weights, repeat_stem=True)
    assert report.inflated == [stem]
    assert report.skipped == report.random_stem == []
    assert torch.equal(four.state_dict()[stem], weights[stem].expand(-1, 4, -1, -1, -1) / 4)
    assert transfer(unet(), weights, repeat_stem=True).inflated == []


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
