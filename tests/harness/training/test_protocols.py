"""What is fixed stays fixed, to the bit; what a linear probe computes is one layer on the upsampled pyramid."""

import json

import pytest
import torch
import torch.nn.functional as F

from harness.api.registry import Registry
from harness.api.settings import build
from harness.cli.main import main
from harness.training.protocols import LinearProbe, digest_modules, fixed, with_head
from harness.training.segmenter import Segmenter
from tests.harness.commands import BUDGET, SMALL

BACKBONES = ("unet", "swinunetr", "segresnet", "unetr", "genesis_unet3d")


def small(name):
    backbone = Registry().load("backbone", name)
    preset = backbone.presets.get("check", backbone.presets.get("demo", {}))
    values = {key.partition(".")[2]: value for key, value in preset.items()}
    torch.manual_seed(0)
    return backbone(build(backbone.Config, values, "backbone"), 1)


def step(network, protocol, number=2):
    """Train as fine-tuning does; which parameters have moved."""
    segmenter = Segmenter(network, overlapping=False, fixed=fixed(network, protocol)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(number):
        image = torch.rand(2, 1, 64, 64, 64, generator=generator)[..., :32, :64, :32]
        target = torch.randint(0, 3, (2, 1, 32, 64, 32), generator=generator)
        loss = sum(segmenter({"image": image, "target": target}).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name for name, value in network.state_dict().items() if not torch.equal(value, before[name])}


@pytest.mark.parametrize("name", BACKBONES)
def test_frozen_trains_all_but_the_encoder_buffers_included(name):
    backbone = small(name)
    network = with_head(backbone, 3, "frozen")
    before = digest_modules(fixed(network, "frozen"))
    moved = step(network, "frozen")
    assert digest_modules(fixed(network, "frozen")) == before
    assert {backbone.part_of(key) for key in moved} == {"decoder", "head"}


@pytest.mark.parametrize("name", BACKBONES)
def test_linear_trains_one_layer(name):
    backbone = small(name)
    network = with_head(backbone, 3, "linear")
    before = digest_modules(fixed(network, "linear"))
    assert step(network, "linear") == {"probe.weight", "probe.bias"}
    assert digest_modules(fixed(network, "linear")) == before
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == 3 * (sum(backbone.channels) + 1)


def test_finetune_trains_everything():
    backbone = small("unet")
    network = with_head(backbone, 3, "finetune")
    assert fixed(network, "finetune") == ()
    assert {backbone.part_of(key) for key in step(network, "finetune")} == {"encoder", "decoder", "head"}


@pytest.mark.parametrize("name", BACKBONES)
def test_a_linear_probe_is_one_layer_on_the_upsampled_pyramid(name):
    network = with_head(small(name), 3, "linear").eval()
    assert isinstance(network, LinearProbe)
    image = torch.rand(2, 1, 32, 64, 32)
    with torch.no_grad():
        upsampled = [
            F.interpolate(level, image.shape[2:], mode="trilinear") for level in network.backbone.encode(image)
        ]
        torch.testing.assert_close(network(image), network.probe(torch.cat(upsampled, 1)), rtol=1e-4, atol=1e-4)


def test_the_digest_tells_any_change():
    module = torch.nn.BatchNorm3d(3)
    before = digest_modules([module])
    module.num_batches_tracked += 1
    assert digest_modules([module]) != before
    module.num_batches_tracked -= 1
    assert digest_modules([module]) == before


@pytest.mark.parametrize("protocol", ["frozen", "linear"])
def test_a_run_under_a_protocol(protocol, hippocampus_phantom, tmp_path, capsys):
    """It shares the pre-training, its record has the digest, its weights predict, and it has a table of its own."""
    words = ["run", "--method", "hybridmim", "--task", "msd_hippocampus", "--data", str(hippocampus_phantom)]
    words += [*BUDGET, *SMALL["unet"], "--runs", str(tmp_path)]
    assert main(words) == 0
    assert main([*words, "--protocol", protocol]) == 0
    assert "pre-training found in" in capsys.readouterr().err
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*/record.json")]
    frozen = {record["protocol"]: record["transfer"]["frozen"] for record in records}
    assert frozen["finetune"] is None
    assert len(frozen[protocol]["digest"]) == 32
    run = next(record["run_id"] for record in records if record["protocol"] == protocol)
    scan = next((hippocampus_phantom / "imagesTr").glob("*.nii.gz"))
    assert main(["predict", "--run", run, "--runs", str(tmp_path), str(scan), str(tmp_path / "out.nii.gz")]) == 0
    assert main(["leaderboard", "compare", *(r["run_id"] for r in records), "--runs", str(tmp_path)]) == 2
    assert "differ in protocol" in capsys.readouterr().err
