"""Weights go to nnU-Net and come back: every name, the right axes, a plan that is read, and the lineage."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file

from harness import UserError
from harness.api.nnssl import from_nnssl, read_plan
from harness.api.registry import Registry
from harness.api.settings import build
from harness.api.weight_files import read_weights_file
from harness.runs.export_nnssl import export_nnssl
from harness.training.lineage import read_lineage
from tests.harness.commands import fails, folder_of, harness, short_run

SIZES = {
    "resenc": ["features=4,8,8", "strides=1;2,2,1;2", "kernels=3,3,1;3;3", "blocks=1,2,1"],
    "plainunet": ["features=4,8,8", "strides=1;2,2,1;2", "kernels=3,3,1;3;3"],
}


@pytest.fixture(scope="module")
def runs(two_phantoms, tmp_path_factory):
    """A runs folder with hybridmim on resenc, and simmim on plainunet, which pre-trains the encoder only."""
    folder = tmp_path_factory.mktemp("runs")
    for method, backbone in (("hybridmim", "resenc"), ("simmim", "plainunet")):
        words = [*short_run(method, two_phantoms / "msd_hippocampus")[:-2], "--runs", folder]
        words[words.index("unet")] = backbone
        for setting in SIZES[backbone]:
            words += ["--set", f"backbone.{setting}"]
        harness(*words, "--set", "task.normalisation=zscore", "--set", "task.spacing=1,1.5,2")
    return folder


def exported(runs, method, out, kind="nnssl", stage="pretrain"):
    harness("export", "--run", folder_of(runs, method), "--format", kind, "--stage", stage, "--out", out)
    return read_weights_file(out / "checkpoint_final.pth")


def backbone_of(runs, method):
    config = json.loads((folder_of(runs, method) / "record.json").read_text())["config"]
    cls = Registry().load("backbone", config["backbone"])
    return cls(build(cls.Config, config["backbone_settings"], "backbone"), 1)


@pytest.mark.parametrize("method", ["hybridmim", "simmim"])
def test_a_checkpoint_comes_back_as_it_went(method, runs, tmp_path):
    file = exported(runs, method, tmp_path / "out")
    backbone = backbone_of(runs, method)
    plan = read_plan(file)
    assert plan.spacing == (1, 1.5, 2)
    again = from_nnssl(file, plan, backbone)
    (pretrained,) = runs.glob(f"cache/pretrain/{method}-*/weights.safetensors")
    own = {key: value for key, value in load_file(pretrained).items() if key.startswith("encoder.")}
    assert again.keys() == own.keys()
    assert all(torch.equal(again[key], own[key]) for key in own)
    lineage = read_lineage(file.path, file.tensors, "0" * 32, tmp_path / "cache")
    assert lineage.is_complete
    assert [each.stage for each in lineage.generations] == ["pretrain"]


def test_every_tensor_has_all_its_names_and_is_stored_once(runs, tmp_path):
    file = exported(runs, "hybridmim", tmp_path / "part")
    assert {key.partition(".")[0] for key in file.tensors} == {"encoder"}
    whole = exported(runs, "hybridmim", tmp_path / "whole", "nnunet", "finetune")
    for key in ("encoder.stem.convs.0.conv.weight", "decoder.stages.0.convs.0.norm.bias"):
        alias = key.replace(".conv.", ".all_modules.0.").replace(".norm.", ".all_modules.1.")
        names = [key, alias] + [f"decoder.{name}" for name in (key, alias)] * key.startswith("encoder")
        assert len({whole.tensors[name].data_ptr() for name in names}) == 1
    assert not [key for key in whole.tensors if "seg_layers" in key]
    assert "decoder.transpconvs.0.weight" in whole.tensors
    # A strided kernel of the first stage that is (3, 3, 1) along x, y, z is (1, 3, 3) there.
    assert tuple(whole.tensors["encoder.stem.convs.0.conv.weight"].shape[2:]) == (1, 3, 3)
    assert whole.path.stat().st_size < 1.6 * (folder_of(runs, "hybridmim") / "weights.safetensors").stat().st_size


def test_nnunets_own_network_takes_all_of_it(runs, tmp_path):
    """Where the package is installed; otherwise `tests/backbones/nnunet.json` stands for it."""
    networks = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    whole = exported(runs, "hybridmim", tmp_path / "whole", "nnunet", "finetune")
    arguments = whole.adaptation["architecture_plans"]["arch_kwargs"]
    kinds = {name: eval_class(arguments[name]) for name in ("conv_op", "norm_op", "nonlin")}
    theirs = networks.ResidualEncoderUNet(input_channels=1, num_classes=3, **arguments | kinds)
    outcome = theirs.load_state_dict(whole.tensors, strict=False)
    assert {key.split(".")[1] for key in outcome.missing_keys} == {"seg_layers"}
    assert not outcome.unexpected_keys
    ours = backbone_of(runs, "hybridmim")
    state = load_file(folder_of(runs, "hybridmim") / "weights.safetensors")
    ours.load_state_dict({key: value for key, value in state.items() if "seg_layers" not in key})
    image = torch.rand(1, 1, 16, 24, 8)
    for level, expected in zip(theirs.encoder(image.permute(0, 1, 4, 3, 2)), ours.encode(image), strict=True):
        torch.testing.assert_close(level.permute(0, 1, 4, 3, 2), expected, rtol=1e-5, atol=1e-5)


def eval_class(name):
    """The class of torch with this dotted name."""
    module, _, last = name.rpartition(".")
    return getattr(sys.modules[module], last)


def test_a_plan_has_every_entry_that_nnunet_reads(runs, tmp_path):
    """The list is that of the facts: each entry was removed in turn, and nnU-Net refused the file."""
    file = exported(runs, "simmim", tmp_path / "out")
    plan = file.adaptation
    assert set(plan) >= {
        *("architecture_plans", "pretrain_plan", "pretrain_num_input_channels", "recommended_downstream_patchsize"),
        *("key_to_encoder", "key_to_stem", "keys_to_in_proj", "key_to_lpe"),
    }
    assert set(plan["architecture_plans"]) == {"arch_class_name", "arch_kwargs", "arch_kwargs_requiring_import"}
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration == {"spacing": [2, 1.5, 1], "patch_size": [64, 32, 32]}
    assert all(f"{key}.weight" in file.tensors for key in plan["keys_to_in_proj"])
    assert plan["architecture_plans"]["arch_kwargs"]["n_conv_per_stage"] == [2, 2, 2]
    assert plan["architecture_plans"]["arch_kwargs"]["strides"] == [[1, 1, 1], [1, 2, 2], [2, 2, 2]]
    citations = torch.load(file.path, weights_only=True)["citations"]
    assert [each["name"] for each in citations if each["type"] == "method"] == ["simmim"]
    assert citations[0]["bibtex_citations"][0].startswith("@")


def test_what_does_not_fit_is_refused_in_words(runs, finished_runs, tmp_path, capsys):
    out = tmp_path / "out"
    simmim, unet = folder_of(runs, "simmim"), folder_of(finished_runs, "hybridmim")
    assert "left no decoder" in fails(capsys, "export", "--run", simmim, "--format", "nnunet", "--out", out)
    assert "is for backbones plainunet, resenc" in fails(
        capsys, "export", "--run", unet, "--format", "nnssl", "--out", out
    )
    record = json.loads((simmim / "record.json").read_text())
    record["pretrain_folder"] = None
    broken = tmp_path / "runs" / simmim.name
    broken.mkdir(parents=True)
    for name in ("cases.csv", "weights.safetensors"):
        (broken / name).write_bytes((simmim / name).read_bytes())
    (broken / "record.json").write_text(json.dumps(record))
    assert "give --stage finetune" in fails(capsys, "export", "--run", broken, "--format", "nnssl", "--out", out)
    record["pretrain_folder"] = "simmim-0"
    (broken / "record.json").write_text(json.dumps(record))
    assert "keep the runs folder together" in fails(
        capsys, "export", "--run", broken, "--format", "nnssl", "--out", out
    )
    assert not out.exists()
    with pytest.raises(UserError, match="is there already"):
        export_nnssl(simmim, "nnssl", "pretrain", tmp_path)
