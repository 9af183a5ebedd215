"""Checkpoints of nnssl: read by their plan, turned to our axes, refused where they do not fit.

The checkpoints here are made by hand, with every alias and a decoder that must not be loaded.
"""

import copy

import pytest
import torch

from backbones.nnunet import PlainUNet, ResEnc
from harness import UserError
from harness.api.nnssl import adaptation_plan, nnunet_weights, own_citations
from harness.api.settings import build
from harness.api.weight_files import read_weights_file
from harness.training.transfer import transfer
from methods.official import Official
from tests.harness.commands import fails, harness, record_of, short_run

SIZES = {"features": (4, 8, 8), "strides": "1;2,2,1;2", "kernels": "3,3,1;3;3"}
ARGUMENTS = {
    "features_per_stage": [4, 8, 8],
    "strides": [[1, 1, 1], [1, 2, 2], 2],
    "kernel_sizes": [[1, 3, 3], [3, 3, 3], 3],
}
PLANS = {
    "resenc": (
        "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
        {"n_blocks_per_stage": [1, 2, 1]},
    ),
    "plainunet": ("PlainConvUNet", {"n_conv_per_stage": [2, 2, 2]}),
}


def network(name="resenc", channels=1, **settings):
    cls = {"resenc": ResEnc, "plainunet": PlainUNet}[name]
    own = {"blocks": (1, 2, 1)} if name == "resenc" else {}
    torch.manual_seed(1)
    made = cls(build(cls.Config, SIZES | own | settings, "backbone"), channels)
    with torch.no_grad():
        for value in made.parameters():
            value.uniform_(-0.5, 0.5)
    return made


def checkpoint(made, prefix="", **changes):
    """A checkpoint of the weights of a network, in nnssl's names and axes."""
    tensors = {}
    for key, value in made.state_dict().items():
        turned = value.permute(0, 1, 4, 3, 2).clone() if value.ndim == 5 else value
        tensors[f"{prefix}{key}"] = turned
        if ".conv." in key:
            tensors[f"{prefix}{key}".replace(".conv.", ".all_modules.0.")] = turned
    architecture, own = PLANS[made.name]
    plan = {
        "architecture_plans": {
            "arch_class_name": architecture,
            "arch_kwargs": ARGUMENTS | own,
            "arch_kwargs_requiring_import": [],
        },
        "pretrain_plan": {"configurations": {"onemmiso": {"spacing": [1.5, 1.0, 0.5], "patch_size": [32, 32, 32]}}},
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": [32, 32, 32],
        "key_to_encoder": f"{prefix}encoder.stages",
        "key_to_stem": f"{prefix}encoder.stem" if made.name == "resenc" else f"{prefix}encoder.stages.0",
        "keys_to_in_proj": [],
        "key_to_lpe": None,
    }
    return {"network_weights": tensors, "nnssl_adaptation_plan": plan | changes, "trainer_name": "T"}


def official(content, tmp_path, backbone, **settings):
    torch.save(content, tmp_path / "w.pth")
    return Official(Official.Config(weights=tmp_path / "w.pth", **settings), backbone)


@pytest.mark.parametrize("prefix", ["", "student."])
@pytest.mark.parametrize("name", PLANS)
def test_encoder_and_stem_are_loaded_under_any_prefix_and_the_decoder_is_not(name, prefix, tmp_path):
    source = network(name)
    target = network(name)
    with torch.no_grad():
        for value in target.parameters():
            value.zero_()
    method = official(checkpoint(source, prefix), tmp_path, target)
    report = transfer(target, method.weights())
    assert report.encoder_fraction == 1
    assert not [key for key in report.loaded if not key.startswith("encoder.")]
    image = torch.rand(1, 1, 16, 8, 8)
    for level, expected in zip(target.encode(image), source.encode(image), strict=True):
        torch.testing.assert_close(level, expected, rtol=0, atol=0)
    assert method.expects() == {"normalisation": "ZScore", "spacing": (0.5, 1.0, 1.5)}


def test_a_named_network_is_the_default_one(tmp_path):
    content = checkpoint(network())
    content["nnssl_adaptation_plan"]["architecture_plans"] = {"arch_class_name": "ResEncL"}
    # Weights of another size than the default: nothing fits, and the general refusal names what does not.
    with pytest.raises(UserError, match="at least 50% are needed"):
        official(content, tmp_path, ResEnc(build(ResEnc.Config, {"features": (2, 4, 4)}, "backbone"), 1)).weights()


@pytest.mark.parametrize(
    ("entry", "value", "says"),
    [
        ("key_to_encoder", None, r"nnssl_adaptation_plan\.key_to_encoder: .*whole plan"),
        ("pretrain_plan", {}, r"nnssl_adaptation_plan\.pretrain_plan\.configurations"),
        ("pretrain_plan", {"configurations": {}}, r"nnssl_adaptation_plan\.pretrain_plan\.configurations"),
        ("architecture_plans", {"arch_class_name": "PrimusM"}, "'PrimusM', which no backbone here is"),
        ("architecture_plans", {"arch_class_name": "PlainConvUNet"}, "give --backbone plainunet"),
        ("key_to_encoder", "elsewhere", "at least 50% are needed"),
    ],
)
def test_a_plan_that_does_not_fit_is_named(entry, value, says, tmp_path):
    content = checkpoint(network())
    if value is None:
        del content["nnssl_adaptation_plan"][entry]
    else:
        content["nnssl_adaptation_plan"][entry] = value
    with pytest.raises(UserError, match=says):
        official(content, tmp_path, network()).weights()


def test_another_size_is_refused_with_the_settings_that_fit(tmp_path):
    content = checkpoint(network())
    with pytest.raises(UserError) as refused:
        official(content, tmp_path, network(strides="1;2;2", features=(4, 4, 4))).weights()
    words = str(refused.value).partition("give ")[2].split(" --set ")
    settings = {}
    for word in words:
        key, _, text = word.removeprefix("--set ").partition("=")
        settings[key.removeprefix("backbone.")] = text.strip("'")
    assert set(settings) == {"features", "strides"}
    fitting = network(**settings)
    assert transfer(fitting, official(content, tmp_path, fitting).weights()).encoder_fraction == 1


def test_one_channel_serves_several_only_when_asked(tmp_path):
    content = checkpoint(network())
    target = network(channels=3)
    assert "encoder.stem.convs.0.conv.weight" in transfer(target, official(content, tmp_path, target).weights()).skipped
    inflated = official(content, tmp_path, target, inflate_stem=True).weights()
    assert transfer(target, inflated).encoder_fraction == 1


def test_citations_are_read_and_other_forms_are_left_alone(tmp_path):
    entry = {"type": "Pretraining Method", "name": "MAE", "bibtex_citations": ["@misc{a,\n}", "@misc{b,\n}"]}
    for citations, number in (([entry, "text", {"name": 3}], 2), ("text", 0), (None, 0), ({"a": 1}, 0)):
        torch.save(checkpoint(network()) | {"citations": citations}, tmp_path / "w.pth")
        cited = own_citations(read_weights_file(tmp_path / "w.pth"))
        assert len(cited) == number
    torch.save(checkpoint(network()) | {"citations": [entry]}, tmp_path / "w.pth")
    (cited,) = own_citations(read_weights_file(tmp_path / "w.pth"))
    assert cited["name"] == "Pretraining Method: MAE"
    assert cited["bibtex"].count("@misc") == 2


def test_a_run_needs_z_scores_and_cites_the_file(two_phantoms, tmp_path, capsys):
    content = checkpoint(network()) | {
        "citations": [{"type": "Method", "name": "MAE", "bibtex_citations": ["@misc{x,\n}"]}]
    }
    torch.save(copy.deepcopy(content), tmp_path / "w.pth")
    data = two_phantoms / "msd_hippocampus"
    words = [
        *short_run("official", data)[:-2],
        "--runs",
        tmp_path / "runs",
        "--set",
        f"method.weights={tmp_path / 'w.pth'}",
    ]
    words[words.index("unet")] = "resenc"
    for setting in ("features=4,8,8", "strides=1;2,2,1;2", "kernels=3,3,1;3;3", "blocks=1,2,1"):
        words += ["--set", f"backbone.{setting}"]
    assert "give --set task.normalisation=zscore" in fails(capsys, *words)
    harness(*words, "--set", "task.normalisation=zscore")
    said = capsys.readouterr().err
    assert "--set task.spacing=0.5,1,1.5 gives the same" in said
    record = record_of(tmp_path / "runs", "official")
    assert record["data"]["n_test_seen"] is None
    assert record["transfer"]["encoder_fraction"] == 1
    assert "@misc{x," in next(each["bibtex"] for each in record["citations"] if each["name"] == "Method: MAE")


def test_kernels_are_turned_there_and_back():
    kernel = torch.arange(2 * 3 * 1 * 2 * 3.0).view(2, 3, 1, 2, 3)
    named = nnunet_weights(
        {"encoder.stem.convs.0.conv.weight": kernel, "decoder.x": kernel, "seg_layers.0": kernel}, False
    )
    assert set(named) == {"encoder.stem.convs.0.conv.weight", "encoder.stem.convs.0.all_modules.0.weight"}
    assert torch.equal(named["encoder.stem.convs.0.conv.weight"].permute(0, 1, 4, 3, 2), kernel)


def test_the_whole_network_has_every_name_that_nnunet_looks_for():
    value = torch.rand(3)
    named = nnunet_weights({"encoder.stages.0.norm.bias": value, "decoder.stages.0.convs.0.conv.bias": value}, True)
    assert set(named) == {
        *("encoder.stages.0.norm.bias", "encoder.stages.0.all_modules.1.bias"),
        *("decoder.encoder.stages.0.norm.bias", "decoder.encoder.stages.0.all_modules.1.bias"),
        *("decoder.stages.0.convs.0.conv.bias", "decoder.stages.0.convs.0.all_modules.0.bias"),
    }


def test_sizes_of_a_plan_are_in_the_other_order():
    plan = adaptation_plan(network(), (0.5, 1.0, 1.5), (16, 32, 64))
    assert plan["recommended_downstream_patchsize"] == [64, 32, 16]
    assert plan["pretrain_plan"]["configurations"]["harness"] == {
        "spacing": [1.5, 1.0, 0.5],
        "patch_size": [64, 32, 16],
    }
    arguments = plan["architecture_plans"]["arch_kwargs"]
    assert arguments["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    assert arguments["kernel_sizes"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert arguments["n_blocks_per_stage"] == [1, 2, 1]


@pytest.mark.parametrize("name", ["resenc", "plainunet"])
def test_one_number_stands_for_all_stages(name, tmp_path):
    sizes = {"features": (4, 4, 4), "kernels": "3;3;3"} | ({"blocks": (1, 1, 1)} if name == "resenc" else {})
    made = network(name, **sizes)
    file = checkpoint(made)
    arguments = {"features_per_stage": 4, "kernel_sizes": 3, "n_stages": 3}
    arguments |= {"n_blocks_per_stage": 1} if name == "resenc" else {"n_conv_per_stage": 2}
    file["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"] |= arguments
    assert transfer(network(name, **sizes), official(file, tmp_path, made).weights()).encoder_fraction == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_blocks_per_stage": []}, "n_blocks_per_stage"),
        ({"features_per_stage": "wide"}, "features_per_stage"),
        ({"strides": None, "kernel_sizes": {"a": 1}}, "kernel_sizes"),
        ({"n_conv_per_stage": [2, 2, 2]}, "convs, which this network does not have"),
    ],
)
def test_a_plan_of_anything_is_refused_in_words(change, says, tmp_path):
    file = checkpoint(network())
    file["nnssl_adaptation_plan"]["architecture_plans"]["arch_kwargs"] |= change
    with pytest.raises(UserError, match=says):
        official(file, tmp_path, network()).weights()
