"""Exports weights to nnU-Net: `harness export --format nnssl` and `--format nnunet`.

`nnssl` is the format that nnU-Net's fine-tuning of pre-trained encoders reads. `nnunet` has every key of nnU-Net's own network,
for `nnUNetv2_train -pretrained_weights`.
"""

import io
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from harness.api.nnssl import BACKBONES, NNSSL_NORMALISATION, adaptation_plan, nnunet_weights
from harness.api.registry import Registry
from harness.api.settings import build
from harness.runs.export import card, pipeline
from harness.runs.restore import Restored, read_run, restore
from harness.system.console import say
from harness.system.errors import UserError
from harness.system.files import write_atomic
from harness.training.lineage import Lineage, lineage_of, tensor_digests, write_lineage

STAGES = ("pretrain", "finetune")


def export_nnssl(run: Path, kind: str, stage: str, out: Path, plugins: tuple[str, ...] = ()) -> list[Path]:
    """Write the folder `out` with `checkpoint_final.pth` and the model card. Returns the paths of its files.

    Args:
        kind: "nnssl" for encoder and stem with a plan, "nnunet" for the whole network.
        stage: the weights "pretrain" or "finetune" left.

    Raises:
        UserError: the record cannot be used, `out` exists already, the network is not one of nnU-Net's, or the stage left
            no such weights.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give a new folder with --out")
    record = read_run(run)
    if record["backbone"] not in BACKBONES.values():
        names = ", ".join(sorted(set(BACKBONES.values())))
        raise UserError(
            f"--format {kind} is for backbones {names}; the run has {record['backbone']!r}: use another format"
        )
    if record["protocol"] == "linear" and stage == "finetune":
        raise UserError(f"--format {kind}: protocol linear leaves no network of nnU-Net: give --stage pretrain")
    registry = Registry(plugins)
    restored = restore(run, record, registry)
    weights, lineage = _weights(run, record, restored, stage)
    settings = record["config"]["backbone_settings"]
    backbone_class = registry.load("backbone", record["backbone"])
    backbone = backbone_class(build(backbone_class.Config, settings, "backbone"), _channels(weights))
    missing = [
        key for key in backbone.state_dict() if key not in weights and not (kind == "nnssl" and _is_decoder(key))
    ]
    if missing:
        raise UserError(
            f"the {stage} stage of {run.name} left no {missing[0]} ({len(missing)} tensors in all): "
            + ("use --format nnssl, which needs the encoder only" if kind != "nnssl" else "export the other --stage")
        )
    prepared = record["config"]["prepared"]
    if prepared["normalisation"] != NNSSL_NORMALISATION:
        say(
            f"these weights were trained on {prepared['normalisation']} intensities, nnU-Net gives them z-scores: pre-train with "
            "--set task.normalisation=zscore for a fair use there"
        )
    content: dict[str, Any] = {
        "network_weights": nnunet_weights(weights, everything=kind != "nnssl"),
        "nnssl_adaptation_plan": adaptation_plan(backbone, prepared["spacing"], record["config"][stage]["crop"]),
        "citations": [
            {"type": each["kind"], "name": each["name"], "bibtex_citations": [each["bibtex"]] if each["bibtex"] else []}
            for each in record.get("citations", [])
        ],
        "trainer_name": f"ssl-seg-harness_{record['method']}",
        "init_args": {},
    }
    return _write(content, card(record, _how(kind, stage), pipeline(record, restored), False, lineage), lineage, out)


def _weights(
    run: Path, record: dict[str, Any], restored: Restored, stage: str
) -> tuple[dict[str, Tensor], Lineage | None]:
    """The weights that a stage of the run left, and their lineage."""
    if stage == "finetune":
        return restored.network.cpu().state_dict(), restored.lineage
    name = record.get("pretrain_folder")
    if not name:
        raise UserError(
            f"{run.name} has no pre-training ({record['method']}), or is of a version that did not record where it lies: give "
            "--stage finetune"
        )
    path = run.resolve().parent / "cache" / "pretrain" / Path(name).name / "weights.safetensors"
    try:
        return load_file(path), lineage_of(path, path.parents[2])
    except (OSError, SafetensorError):
        raise UserError(
            f"{path}, the pre-training of {run.name}, cannot be read: keep the runs folder together, or give --stage finetune"
        ) from None


def _channels(weights: dict[str, Tensor]) -> int:
    """Number of channels of the images, by the first convolution."""
    first = next(value for key, value in weights.items() if key.startswith("encoder.") and value.ndim == 5)
    return int(first.shape[1])


def _is_decoder(key: str) -> bool:
    """Whether a key is not one of encoder and stem."""
    return not key.startswith("encoder.")


def _how(kind: str, stage: str) -> str:
    """How nnU-Net uses the file, and what it is of."""
    of_pretraining = (
        "\n\nThese are the weights that pre-training left. The steps and the results below are those of the network that was "
        "fine-tuned from them here."
    )
    return _use(kind) + of_pretraining * (stage == "pretrain")


def _use(kind: str) -> str:
    """How nnU-Net uses the file."""
    if kind == "nnssl":
        return (
            "nnU-Net (its main branch, from July 2026) fine-tunes from `checkpoint_final.pth`: `nnUNetv2_preprocess_like_nnssl "
            "-d D -n NAME -pc checkpoint_final.pth -am like_pretrained`, then `nnUNetv2_train_pretrained`. Encoder and stem are "
            "loaded, decoder and head are new."
        )
    return (
        "`nnUNetv2_train D 3d_fullres FOLD -p PLANS -pretrained_weights checkpoint_final.pth` loads everything but the head. The "
        "plans must describe this network: `nnssl_adaptation_plan.architecture_plans` in the file has its arguments."
    )


def _write(content: dict[str, Any], text: str, lineage: Lineage | None, out: Path) -> list[Path]:
    """Write checkpoint, its lineage and card to a new folder. Returns their paths."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        folder = Path(partial) / "export"
        checkpoint = folder / "checkpoint_final.pth"
        write_atomic(checkpoint, buffer.getbuffer())
        if lineage is not None:
            written = content["network_weights"]
            write_lineage(lineage, written, checkpoint, tensor_digests(written))
        write_atomic(folder / "README.md", text)
        shutil.move(folder, out)
    return sorted(out.iterdir())
