"""Exports the weights of a finished run with a model card, for use elsewhere: `harness export`. Checks them first."""

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import monai.networks.nets
import torch
from safetensors.torch import save as serialise
from torch import Tensor, nn

from harness.api.registry import Registry
from harness.data.preprocessing import Z_LIMIT, steps_of
from harness.runs.restore import Restored, in_memory, read_run, restore
from harness.system.errors import UserError
from harness.system.files import write_atomic
from harness.training.lineage import Lineage, tensor_digests, write_lineage
from leaderboards.records import CONTROLS
from leaderboards.text import escape_markdown

FORMATS = ("monai", "safetensors", "onnx")
KINDS = {"Window": "window", "Percentiles": "percentiles", "ZScore": "zscore"}
"""Name of a normalisation in `pipeline.json`."""

SCRIPTS = {
    "monai": """    from monai.networks import nets
    from safetensors.torch import load_file

    described = json.loads((HERE / "network.json").read_text())
    network = getattr(nets, described["class"].rpartition(".")[2])(**described["arguments"]).eval()
    network.load_state_dict(load_file(HERE / "weights.safetensors"))
    return network""",
    "onnx": """    import onnxruntime

    session = onnxruntime.InferenceSession(HERE / "network.onnx", providers=["CPUExecutionProvider"])
    return lambda window: torch.from_numpy(session.run(None, {"image": window.float().numpy()})[0])""",
}
"""How the exported script gets the network, for the formats that need nothing of this package."""

EQUAL = 1e-4
"""Largest difference between two outputs that count as equal, relative to the largest output."""


def export(run: Path, kind: str, out: Path, plugins: tuple[str, ...] = ()) -> list[Path]:
    """Write the folder `out`: weights, a description of the network, and the model card. Returns the paths of its files.

    Raises:
        UserError: the record cannot be used, `out` exists already, or the network has no counterpart in this format.
    """
    if out.exists():
        raise UserError(f"{out} is there already: give a new folder with --out")
    record = read_run(run)
    restored = restore(run, record, Registry(plugins))
    network = restored.network.cpu().eval()
    with torch.inference_mode(), in_memory(run, restored.trained.crop):
        example = torch.rand(
            1, len(restored.task.channels), *restored.trained.crop, generator=torch.Generator().manual_seed(0)
        )
        expected = network(example)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        folder = Path(partial) / "export"
        folder.mkdir()
        how = {"monai": _monai, "safetensors": _safetensors, "onnx": _onnx}[kind](
            folder, record, restored, example, expected
        )
        steps = pipeline(record, restored)
        (folder / "pipeline.json").write_text(json.dumps(steps, indent=1), encoding="utf-8")
        if kind in SCRIPTS:
            (folder / "predict.py").write_text(_script(kind), encoding="utf-8")
        (folder / "README.md").write_text(card(record, how, steps, kind in SCRIPTS, restored.lineage), encoding="utf-8")
        shutil.move(folder, out)
    return sorted(path for path in out.iterdir())


def _monai(folder: Path, record: dict[str, Any], restored: Restored, example: Tensor, expected: Tensor) -> str:
    """Write weights with MONAI's keys, and the network's class and arguments as JSON. Returns how to use them."""
    counterpart = None
    if record["protocol"] != "linear":
        counterpart = restored.network.monai(restored.task.num_outputs)
    if counterpart is None:
        raise UserError(
            f"MONAI has no network for {record['backbone']!r} under protocol {record['protocol']!r}: use --format safetensors "
            "or onnx"
        )
    name, arguments = counterpart
    monai_network: nn.Module = getattr(monai.networks.nets, name)(**arguments).eval()
    own, monai_state = restored.network.state_dict(), monai_network.state_dict()
    if foreign := sorted(own.keys() - monai_state.keys()):
        raise RuntimeError(f"MONAI's {name} does not know {foreign[:4]}")
    # MONAI's UNETR has a norm layer that nothing uses; it keeps its initial values.
    monai_network.load_state_dict({**monai_state, **own})
    with torch.inference_mode():
        _check_equal(monai_network(example), expected)
    _save(monai_network, folder, record, restored.lineage)
    (folder / "network.json").write_text(
        json.dumps({"class": f"monai.networks.nets.{name}", "arguments": arguments}, indent=1)
    )
    return f"""```python
import json
from monai.networks import nets
from safetensors.torch import load_file

arguments = json.load(open("network.json"))["arguments"]
network = nets.{name}(**arguments)
network.load_state_dict(load_file("weights.safetensors"))
```"""


def _safetensors(folder: Path, record: dict[str, Any], restored: Restored, example: Tensor, expected: Tensor) -> str:
    """Write the weights with this harness's keys. Returns how to use them."""
    _save(restored.network, folder, record, restored.lineage)
    return (
        "The keys are those of this harness's backbone: `harness run --method official --set "
        f"method.weights=weights.safetensors --backbone {record['backbone']}` starts from them."
    )


def _onnx(folder: Path, record: dict[str, Any], restored: Restored, example: Tensor, expected: Tensor) -> str:
    """Write the network for crops of the training's extent and batches of any size. Returns how to use it."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(f"{error.name} is not installed: pip install onnx onnxscript") from None
    batch = torch.export.Dim("batch", min=1)
    torch.onnx.export(
        restored.network,
        (example,),
        folder / "network.onnx",
        input_names=["image"],
        output_names=["logits"],
        dynamic_shapes=({0: batch},),
        dynamo=True,
        external_data=False,
        verbose=False,
    )
    shape = ", ".join(map(str, (len(restored.task.channels), *restored.trained.crop)))
    return f"`network.onnx` takes `image` (batch, {shape}) and gives `logits`; slide it over larger images."


def _save(network: nn.Module, folder: Path, record: dict[str, Any], lineage: Lineage | None) -> None:
    """Write the weights of a network to `weights.safetensors`, with the id of the run and their lineage."""
    state = {key: value.detach().cpu().contiguous().clone() for key, value in network.state_dict().items()}
    metadata = {"run_id": record["run_id"], "format": "pt"}
    if lineage is not None:
        metadata |= write_lineage(lineage, state, folder / "weights.safetensors", tensor_digests(state))
    write_atomic(folder / "weights.safetensors", serialise(state, metadata))  # with the usual permissions


def _check_equal(output: Tensor, expected: Tensor) -> None:
    """Raises RuntimeError if two outputs differ by more than `EQUAL`."""
    difference = float((output - expected).abs().max())
    if difference > EQUAL * float(expected.abs().max()):
        raise RuntimeError(f"MONAI's network gives another output with these weights: they differ by {difference:g}")


def pipeline(record: dict[str, Any], restored: Restored) -> dict[str, Any]:
    """The numbers of the whole way from an image file to a label map, which `card` describes in words."""
    task, prepared = restored.task, record["config"]["prepared"]
    # Label values of the files that the run was trained with, which may number the same tissues otherwise than the task.
    own = {task_value: file_value for file_value, task_value in record["task_description"].get("numbering", [])}
    used = (record.get("computed_with") or {}).get("finetune") or {}
    return {
        "channels": list(task.channels),
        "spacing": prepared["spacing"],
        "intensities": {
            "kind": KINDS[prepared["normalisation"]],
            **{k: prepared[k] for k in ("low", "high") if k in prepared},
        },
        "steps": steps_of(task.normalisation),
        "limit": Z_LIMIT,
        "windows": {
            "extent": list(restored.trained.crop),
            "overlap": restored.evaluate.overlap,
            "mirror": restored.evaluate.mirror,
            "precision": used.get("precision", "fp32"),
        },
        "outputs_overlap": task.overlapping,
        "targets": {name: [own.get(value, value) for value in values] for name, values in task.targets.items()},
        "labels": [own.get(value, value) for value in task.labels],
    }


def _script(kind: str) -> str:
    """The text of `predict.py`, which needs nothing of this package."""
    template = jinja2.Environment(loader=jinja2.PackageLoader("harness.runs", "templates"), keep_trailing_newline=True)
    needs = "monai" if kind == "monai" else "monai and onnxruntime"
    return template.get_template("predict.py.txt").render(network=SCRIPTS[kind], needs=needs)


def card(record: dict[str, Any], how: str, steps: dict[str, Any], script: bool, lineage: Lineage | None = None) -> str:
    """The model card: data and its licence, protocol, results, preprocessing, and limits of use.

    Values from the record are escaped.

    Args:
        how: text on using the weights; it is not escaped, because the harness wrote it.
        steps: of the way from image to label map, as `pipeline` gives them.
        script: whether `predict.py` lies beside the card.
        lineage: of the weights; None where it is not known.
    """
    templates = jinja2.Environment(
        loader=jinja2.PackageLoader("harness.runs", "templates"),
        trim_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if value is how else escape_markdown(value),
    )
    data = record["data"]
    corpora = [f"{corpus['name']} ({corpus.get('licence', 'licence unknown')})" for corpus in data.get("corpora", [])]
    pretrained = ", ".join(corpora) or f"the task's own {len(data.get('pretrain') or [])} training cases"
    if not corpora and record.get("files"):
        pretrained = "what its weights were trained on, see Lineage"
    elif not corpora and record["method"] in CONTROLS:
        pretrained = "nothing"
    return templates.get_template("card.md").render(
        record=record,
        how=how,
        script=script,
        pretrained=pretrained,
        pipeline=steps,
        lineage=lineage,
        version=version("ssl-seg-harness"),
    )
