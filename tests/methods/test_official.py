"""Published weights: every format's key names, what is refused, and nothing is loaded in silence."""

from itertools import combinations

import numpy as np
import pytest
import torch
from monai.networks.nets import UNETR as MonaiUNETR  # noqa: N811
from monai.networks.nets import BasicUNet, SegResNet, SwinUNETR
from safetensors.torch import save_file

from backbones import genesis_unet3d, segresnet, swinunetr, unet, unetr
from harness import UserError, inflate
from harness.training.transfer import transfer
from methods.official import Official


def genesis(channels=1, first=4):
    return genesis_unet3d.GenesisUNet3D(genesis_unet3d.GenesisUNet3D.Config(first=first), channels)


def swin(channels=1):
    return swinunetr.SwinUNETR(swinunetr.SwinUNETR.Config(feature_size=12), channels)


def published_genesis(first=4):
    """A state dict as the published 3D U-Net's checkpoint has it, head included."""
    network = genesis(first=first)
    network.set_head(1)
    return {f"module.{key}": torch.randn_like(value.float()) for key, value in network.state_dict().items()}


def load(backbone, content, tmp_path, **settings):
    path = tmp_path / "weights.pt"
    torch.save(content, path)
    method = Official(Official.Config(weights=path, **settings), backbone)
    return transfer(backbone, method.weights())


@pytest.mark.parametrize(
    "wrap",
    [
        lambda weights: weights,
        lambda weights: {"epoch": 3, "state_dict": weights},
        lambda weights: {"model": weights, "net": 1},
        lambda weights: {"model_state_dict": weights},
        lambda weights: {"epoch": 3, "network_weights": weights},
        lambda weights: {"net": {"step": 1, "state_dict": {"model": weights}}},
        lambda weights: {f"model.{key}": value for key, value in weights.items()},
        lambda weights: {f"module.backbone.{key}": value for key, value in weights.items()},
    ],
)
def test_a_published_unet3d_is_loaded_whole(wrap, tmp_path):
    """However a trainer wrapped the file or the network."""
    weights = published_genesis()
    backbone = genesis()
    report = load(backbone, wrap(weights), tmp_path)
    assert report.encoder_fraction == 1
    assert report.reinitialised == []
    assert report.skipped == ["out_tr.final_conv.bias", "out_tr.final_conv.weight"]
    assert all(
        torch.equal(value.float(), weights[f"module.{key}"].to(value.dtype).float())
        for key, value in backbone.state_dict().items()
    )


def test_transvws_checkpoint(tmp_path):
    """Its network has a classification head, and its checkpoint NumPy numbers and an optimizer's state."""
    network = genesis()
    weights = published_genesis() | {"module.clc_out.fc1.weight": torch.zeros(44, 1024)}
    optimizer = torch.optim.Adam(network.parameters())
    content = {"epoch": 3, "state_dict": weights, "best_loss": np.float64(0.25)}
    report = load(network, content | {"optimizer_state_dict": optimizer.state_dict()}, tmp_path)
    assert report.encoder_fraction == 1
    assert report.reinitialised == []
    assert "clc_out.fc1.weight" in report.skipped


@pytest.mark.parametrize("prefix", ["classficationNet.", "module.classficationNet.", "module."])
def test_transvws_published_key_names(prefix, tmp_path):
    """Its loading example strips `module.` and `classficationNet.` (so spelled), and leaves further heads out."""
    published = {key.replace("module.", prefix, 1): value for key, value in published_genesis().items()}
    heads = {f"module.{name}.weight": torch.zeros(3, 3) for name in ("projection_head.0", "prototypes")}
    backbone = genesis()
    report = load(backbone, {"epoch": 7, "state_dict": published | heads, "best_loss": np.float64(0.1)}, tmp_path)
    assert report.encoder_fraction == 1
    assert report.reinitialised == []
    assert {"projection_head.0.weight", "prototypes.weight", "out_tr.final_conv.weight"} <= set(report.skipped)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value.float(), published[prefix + key].to(value.dtype).float())


def test_a_random_stem_is_reported_as_such(tmp_path):
    """It has a small share of the parameters, which must not be rounded to all of them."""
    stem = "down_tr64.ops.0.conv1.weight"
    report = load(genesis(channels=4, first=16), published_genesis(first=16), tmp_path)
    assert 0.999 < report.encoder_fraction < 1
    assert report.random_stem == [stem]
    assert report.as_record()["random_stem"] == [stem]
    assert "99.9% of the encoder's parameters, but its first convolution is random" in str(report)
    assert stem in str(report).rsplit("random", 1)[1]
    whole = load(genesis(channels=4), published_genesis(), tmp_path, inflate_stem=True)
    assert whole.random_stem == []
    assert str(whole).endswith("100.0% of the encoder's parameters")


def test_one_renamed_key_is_named(tmp_path):
    weights = published_genesis()
    weights["module.down_tr128.ops.0.conv1.kernel"] = weights.pop("module.down_tr128.ops.0.conv1.weight")
    report = load(genesis(), weights, tmp_path)
    assert report.reinitialised == ["down_tr128.ops.0.conv1.weight"]
    assert "down_tr128.ops.0.conv1.kernel" in report.skipped
    assert "down_tr128.ops.0.conv1.weight" in str(report)
    assert 0.5 < report.encoder_fraction < 1


def test_half_missing_is_refused_with_the_first_keys(tmp_path):
    weights = published_genesis()
    kept = {key: value for key, value in weights.items() if "down_tr256" not in key and "down_tr512" not in key}
    with pytest.raises(UserError, match=r"at least 50% are needed: down_tr256\.ops\.0\.conv1\.weight is not there"):
        load(genesis(), kept, tmp_path)


@pytest.mark.parametrize("levels", [c for n in range(4) for c in combinations((64, 128, 256, 512), n)])
def test_it_refuses_what_gives_less_than_half_of_the_encoders_parameters(levels, tmp_path):
    """Counted by hand for 4 channels: convolutions of 27 weights with a bias and a norm. The decoder does not count."""
    numbers = {}
    for level, before, first in ((64, 1, 4), (128, 8, 8), (256, 16, 16), (512, 32, 32)):
        numbers[level] = 27 * first * (before + 2 * first) + 3 * (first + 2 * first)
    share = sum(numbers[level] for level in levels) / sum(numbers.values())
    names = [f"module.down_tr{level}." for level in levels] + ["module.up_"]
    weights = {key: value for key, value in published_genesis().items() if key.startswith(tuple(names))}
    if share < 0.5:
        with pytest.raises(UserError, match=f"gives {share:.0%} of the encoder of backbone 'genesis_unet3d'"):
            load(genesis(), weights, tmp_path)
    else:
        report = load(genesis(), weights, tmp_path)
        assert report.encoder_fraction == pytest.approx(share)
        assert not any(key.startswith("up_") for key in report.reinitialised)


def test_the_refusal_says_that_a_stem_could_be_repeated_only_where_it_could(tmp_path):
    weights = {key: value for key, value in published_genesis().items() if "down_tr512" not in key}
    with pytest.raises(UserError, match=r"needed.*method\.inflate_stem=true repeats a stem of one channel"):
        load(genesis(channels=4), weights, tmp_path)
    with pytest.raises(UserError) as refused:
        load(genesis(), weights, tmp_path)
    assert "inflate_stem" not in str(refused.value)


def test_weights_of_another_width_are_refused_with_both_shapes(tmp_path):
    with pytest.raises(UserError, match=r"is \(8, 1, 3, 3, 3\) there and \(4, 1, 3, 3, 3\) here"):
        load(genesis(), published_genesis(first=8), tmp_path)


@pytest.mark.parametrize(
    "spell",
    [
        lambda key: key,
        lambda key: f"module.{key}",
        lambda key: key.replace("swinViT.", "module.").replace("mlp.linear", "mlp.fc"),
        lambda key: key.replace("swinViT.", "swin_vit."),
        lambda key: key.replace("swinViT.", "module.swin_vit."),
        lambda key: (
            key.replace("swinViT.patch_embed", "encoder.patch_embed")
            .replace("swinViT.layers", "encoder.layers")
            .replace(".0.blocks", ".0.0.blocks")
            .replace(".0.downsample", ".0.0.downsample")
        ),
    ],
    ids=["own", "module", "ssl fc1", "swin_vit", "module.swin_vit", "disruptive autoencoder"],
)
def test_swinunetr_encoders_under_every_spelling(spell, tmp_path):
    network = SwinUNETR(in_channels=1, out_channels=3, feature_size=12)
    weights = {spell(key): value for key, value in network.state_dict().items() if key.startswith("swinViT")}
    extra = {"rotation_head.weight": torch.zeros(4, 192), "contrastive_head.bias": torch.zeros(512)}
    backbone = swin()
    report = load(backbone, {"state_dict": {**weights, **extra}}, tmp_path)
    assert report.encoder_fraction == 1
    assert report.skipped == ["contrastive_head.bias", "rotation_head.weight"]
    for key, value in network.swinViT.state_dict().items():
        assert torch.equal(backbone.swinViT.state_dict()[key], value)


@pytest.mark.parametrize(
    ("network", "backbone"),
    [
        (lambda: SwinUNETR(in_channels=1, out_channels=3, feature_size=12), swin),
        (
            lambda: BasicUNet(in_channels=1, out_channels=3, features=(4, 4, 8, 8, 16, 4)),
            lambda: unet.UNet(unet.UNet.Config(features=(4, 4, 8, 8, 16)), 1),
        ),
        (
            lambda: SegResNet(init_filters=8, in_channels=1, out_channels=3),
            lambda: segresnet.SegResNet(segresnet.SegResNet.Config(init_filters=8), 1),
        ),
        (
            lambda: MonaiUNETR(1, 3, (32, 32, 32), feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3),
            lambda: unetr.UNETR(
                unetr.UNETR.Config(image_size=32, feature_size=4, hidden_size=24, mlp_dim=48, num_heads=3), 1
            ),
        ),
    ],
    ids=["swinunetr", "unet", "segresnet", "unetr"],
)
def test_whole_networks_of_monai(network, backbone, tmp_path):
    report = load(backbone(), {"model": network().state_dict()}, tmp_path)
    assert report.encoder_fraction == 1
    assert report.reinitialised == []
    assert all(
        key.startswith(("out.", "final_conv.", "conv_final.")) or "norm_cross_attn" in key for key in report.skipped
    )


def test_our_own_exports(tmp_path):
    source, target = swin(), swin()
    path = tmp_path / "weights.safetensors"
    save_file(source.part_weights(("encoder", "decoder")), path)
    report = transfer(target, Official(Official.Config(weights=path), target).weights())
    assert (report.skipped, report.reinitialised, report.encoder_fraction) == ([], [], 1)


def test_a_stem_is_inflated_only_when_asked(tmp_path):
    weights = published_genesis()
    report = load(genesis(channels=4), weights, tmp_path)
    stem = "down_tr64.ops.0.conv1.weight"
    assert stem in report.skipped
    backbone = genesis(channels=4)
    report = load(backbone, weights, tmp_path, inflate_stem=True)
    assert report.encoder_fraction == 1
    one, many = weights[f"module.{stem}"], backbone.state_dict()[stem]
    image = torch.rand(1, 1, 8, 8, 8)
    torch.testing.assert_close(
        torch.conv3d(image.expand(-1, 4, -1, -1, -1), many), torch.conv3d(image, one), atol=1e-5, rtol=1e-5
    )
    wide = torch.zeros(8, 3, 3, 3, 3)
    assert inflate(wide, torch.Size((8, 4, 3, 3, 3))) is wide


def test_weights_that_are_not_finite_are_refused(tmp_path):
    weights = published_genesis()
    weights["module.up_tr64.ops.0.bn1.weight"][0] = float("nan")
    with pytest.raises(UserError, match=r"up_tr64\.ops\.0\.bn1\.weight is not finite"):
        load(genesis(), weights, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        torch.Tensor.to_sparse,
        lambda value: value.to("meta"),
        lambda value: torch.nested.nested_tensor([value, value[:1]]),
    ],
)
def test_tensors_of_other_kinds_are_not_there(change, tmp_path):
    weights = published_genesis()
    weights["module.down_tr64.ops.0.bn1.weight"] = change(weights["module.down_tr64.ops.0.bn1.weight"])
    assert "down_tr64.ops.0.bn1.weight" in load(genesis(), weights, tmp_path).reinitialised


@pytest.mark.timeout(20)
def test_a_key_of_many_prefixes_is_not_there(tmp_path):
    weights = published_genesis()
    weights["module." * 200_000 + "x"] = torch.zeros(1)
    assert load(genesis(), weights, tmp_path).skipped == ["out_tr.final_conv.bias", "out_tr.final_conv.weight"]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_quantised_weights_are_refused_since_their_scale_is_elsewhere(dtype, tmp_path):
    weights = published_genesis()
    weights["module.down_tr64.ops.0.conv1.weight"] = weights["module.down_tr64.ops.0.conv1.weight"].to(dtype)
    said = rf"conv1\.weight is {str(dtype)[6:]} \(1 tensors\), which is quantised: give weights in float32"
    with pytest.raises(UserError, match=said):
        load(genesis(), weights, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precisions_are_loaded(dtype, tmp_path):
    weights = {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in published_genesis().items()
    }
    assert not load(genesis(), weights, tmp_path).reinitialised
