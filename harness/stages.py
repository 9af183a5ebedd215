"""The three stages of a run: pre-train, fine-tune, evaluate. Each takes prepared volumes and leaves files behind."""

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from harness import hardware, metrics, picture, protocols
from harness.config import Evaluate, RunConfig, Training
from harness.contracts import Backbone, Batch, Method, Source
from harness.crops import Augment, CropDataset
from harness.files import check_name, write_atomic
from harness.formats import write_label
from harness.images import load_label
from harness.layers import place
from harness.preparation import Workshop
from harness.progress import progress
from harness.task import Task
from harness.training import Trained, new_accelerator, train
from harness.transfer import transfer
from harness.volumes import Volume

Discovery = tuple[Any, Path]
"""What a method's preparation depends on, and the folder that keeps what it found."""


PICTURE = "restoration.png"
AVERAGED = {"dice": "dice", "hd95": "hd95_mm", "surface_dice": "surface_dice"}
"""What a summary averages, and the column of `cases.csv` that has it."""


@dataclass(frozen=True)
class Plugins:
    """The classes of a run, resolved."""

    method: type[Method]
    backbone: type[Backbone]

    def new_backbone(self, config: RunConfig, channels: int) -> Backbone:
        """A randomly initialised backbone for images of so many channels."""
        return self.backbone(config.backbone_settings, channels)


def seed_for(seed: int, purpose: str) -> int:
    """An independent seed for each use of randomness in a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed}:{purpose}".encode(), digest_size=4).digest(), "big") >> 1


def pretrain(
    config: RunConfig,
    plugins: Plugins,
    channels: int,
    volumes: Sequence[Volume],
    folder: Path,
    discovery: Discovery,
    title: str = "",
) -> dict[str, Any]:
    """Run the pretext task and leave `weights.safetensors`, `history.jsonl` and, last, `stage.json` in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "history.jsonl").unlink(missing_ok=True)
    accelerator = new_accelerator()
    method, sources, prepared = _prepared(config, plugins, channels, volumes, discovery, accelerator.device)
    # Dropout and masks differ between processes, as their crops do.
    rank = accelerator.process_index
    torch.manual_seed(seed_for(config.seed, f"pretrain dropout {rank}"))
    method.generator = torch.Generator(accelerator.device).manual_seed(seed_for(config.seed, f"pretrain method {rank}"))
    settings = config.pretrain
    steps, warmup = settings.schedule(len(volumes), accelerator.num_processes)
    length = steps * settings.batch_size * accelerator.num_processes
    data = pretrain_data(config, plugins, sources, length, seed_for(config.seed, "pretrain crops"))
    history = folder / "history.jsonl"
    trained = train(method, data, settings, steps, warmup, accelerator, history, "pretrain", method.after_step)
    save_file(method.weights(), folder / "weights.safetensors")
    stage = asdict(trained) | prepared | {"memory": hardware.memory(accelerator.device)}
    write_atomic(folder / "stage.json", json.dumps(stage))
    _show(method, data, config, accelerator.device, folder / PICTURE, title)
    return stage


def pretrain_data(
    config: RunConfig, plugins: Plugins, sources: Sequence[Source], length: int, seed: int
) -> CropDataset:
    """Crops as the method sees them."""
    transform = plugins.method.transform(config.method_settings)
    return CropDataset(sources, config.pretrain.crop, length, seed, transform)


def finetune_data(config: RunConfig, task: Task, volumes: Sequence[Volume], length: int, seed: int) -> CropDataset:
    """Labelled crops, augmented."""
    settings = config.finetune
    return CropDataset(volumes, settings.crop, length, seed, Augment(settings), task, settings.foreground)


@torch.inference_mode()
def _show(method: Method, data: CropDataset, config: RunConfig, device: torch.device, path: Path, title: str) -> None:
    """A picture of what the method sees and restores, where it has something to show."""
    assert method.generator is not None
    method.generator.manual_seed(seed_for(config.seed, "pretrain picture"))
    samples = [data[place] for place in range(max(2, min(3, config.pretrain.batch_size)))]
    batch = {name: torch.stack([torch.as_tensor(each[name]) for each in samples]).to(device) for name in samples[0]}
    shown = method.eval().show(batch)
    if shown:
        images = {name: value.float().clamp(0, 1).cpu().numpy() for name, value in shown.items()}
        picture.restoration(images, path, title)


def _prepared(
    config: RunConfig,
    plugins: Plugins,
    channels: int,
    volumes: Sequence[Volume],
    discovery: Discovery,
    device: torch.device,
) -> tuple[Method, Sequence[Source], dict[str, Any]]:
    """The method with what it froze and prepared, what to sample from, and what preparing cost and found."""
    torch.manual_seed(seed_for(config.seed, "pretrain init"))
    method = plugins.method(config.method_settings, plugins.new_backbone(config, channels))
    freeze(method)
    identity, kept = discovery
    seed = seed_for(config.seed, "method prepare")
    workshop = Workshop(seed, device, config.pretrain.crop, config.pretrain, identity, kept)
    torch.manual_seed(seed)
    began = time.perf_counter()
    sources = method.prepare(volumes, workshop)
    seconds = time.perf_counter() - began + workshop.remembered
    return method, sources, {"prepare_seconds": seconds, "prepared": workshop.values}


def freeze(method: Method) -> None:
    """Backbone parts that the method does not train get no gradient, and no optimizer state."""
    for key, parameter in method.backbone.named_parameters():
        parameter.requires_grad_(method.backbone.part_of(key) in method.trains)


class Segmenter(nn.Module):
    """A network under the Dice and cross-entropy losses.

    MONAI's DiceCELoss is not used because it takes a softmax cross-entropy over any number of channels, which is
    wrong for targets that overlap; those get the binary one. Its DiceLoss has the same values and reads the target on the
    host, which stops a GPU in every step.
    """

    def __init__(self, network: nn.Module, overlapping: bool, fixed: tuple[nn.Module, ...] = ()) -> None:
        super().__init__()
        self.network, self.overlapping, self.fixed = network, overlapping, fixed

    def train(self, mode: bool = True) -> "Segmenter":
        """Training mode for all but what is fixed."""
        super().train(mode)
        for module in self.fixed:
            module.eval()
        return self

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, ...), `target` (N, targets, ...) or class indices (N, 1, ...) -> two loss terms."""
        logits, target = self.network(batch["image"]).float(), batch["target"]
        if self.overlapping:
            entropy = F.binary_cross_entropy_with_logits(logits, target)
            return {"dice": dice_loss(logits.sigmoid(), target), "cross_entropy": entropy}
        classes = torch.arange(logits.shape[1], device=logits.device).view(1, -1, 1, 1, 1)
        entropy = F.cross_entropy(logits, target[:, 0])
        return {"dice": dice_loss(logits.softmax(dim=1), target == classes), "cross_entropy": entropy}


def dice_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Soft Dice loss (Milletari et al. 2016, without the squares), averaged over targets; MONAI's `DiceLoss(batch=True)`.

    Summed over the batch, so that a crop without a target does not count as a failure.

    Args:
        predicted: probabilities, (N, targets, x, y, z).
        target: 0 or 1, the same shape.
    """
    axes, smooth = (0, 2, 3, 4), 1e-5
    both = (predicted * target).sum(dim=axes)
    each = predicted.sum(dim=axes) + target.sum(dim=axes, dtype=predicted.dtype)
    return 1 - ((2 * both + smooth) / (each + smooth)).mean()


def finetune(
    config: RunConfig,
    plugins: Plugins,
    task: Task,
    volumes: Sequence[Volume],
    weights: Mapping[str, Tensor],
    folder: Path,
    repeat_stem: bool = False,
) -> tuple[nn.Module, Trained, dict[str, Any]]:
    """Fresh backbone, transfer, new head, supervised training; leaves `weights.safetensors` in `folder`.

    The initial values and the crops depend on the seed only, so that `scratch` is a matched control. What the protocol
    fixes is the same afterwards, by its digest.
    """
    accelerator = new_accelerator()
    torch.manual_seed(seed_for(config.seed, "finetune init"))
    backbone = plugins.new_backbone(config, len(task.channels))
    report = transfer(backbone, weights, repeat_stem)
    network = protocols.with_head(backbone, task.num_outputs, config.protocol)
    fixed = protocols.fixed(network, config.protocol)
    before = protocols.digest_modules(fixed)
    torch.manual_seed(seed_for(config.seed, f"finetune dropout {accelerator.process_index}"))
    settings = config.finetune
    steps, warmup = settings.schedule(len(volumes), accelerator.num_processes)
    length = steps * settings.batch_size * accelerator.num_processes
    data = finetune_data(config, task, volumes, length, seed_for(config.seed, "finetune crops"))
    segmenter = Segmenter(network, task.overlapping, fixed)
    trained = train(segmenter, data, settings, steps, warmup, accelerator, folder / "history.jsonl", "finetune")
    if protocols.digest_modules(fixed) != before:
        raise RuntimeError(f"protocol {config.protocol!r}: what is fixed was changed by training")
    state = network.state_dict()
    save_file({key: value.detach().cpu().contiguous() for key, value in state.items()}, folder / "weights.safetensors")
    frozen = {"digest": before, "tensors": sum(len(module.state_dict()) for module in fixed)} if fixed else None
    return network, trained, report.as_record() | {"text": str(report), "frozen": frozen}


@torch.inference_mode()
def evaluate(
    config: RunConfig,
    task: Task,
    network: nn.Module,
    volumes: Sequence[Volume],
    folder: Path,
    title: str,
    save_predictions: bool = False,
) -> dict[str, Any]:
    """Score every test case in its native grid; leaves `cases.csv` and `figures/segmentation.png` in `folder`.

    With `save_predictions`, also `predictions/CASE.nii.gz`: label maps on the native grid, in the numbering of the data.
    """
    rows: list[dict[str, Any]] = []
    panels: list[Any] = []
    unfinished = folder / f".predictions-{os.getpid()}"
    scoring = partial(_score, config, task, unfinished if save_predictions else None)
    # While one case is predicted, the one after it is read and the one before it is scored, never more: memory is that of
    # three cases, however many there are.
    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as scorer:
        upcoming = reader.submit(lambda: volumes[0].image)
        scored: list[Any] = []
        for number, volume in enumerate(progress(volumes, "evaluate"), start=1):
            image = upcoming.result()
            if number < len(volumes):
                upcoming = reader.submit(lambda following: following.image, volumes[number])
            probabilities = predict(task, network, image, config.finetune, config.evaluate)
            if scored:
                scored[-1].result()
            scored.append(scorer.submit(scoring, volume, probabilities))
        for found, panel in (each.result() for each in scored):
            rows += found
            panels.append(panel)
    with (folder / "cases.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    picture.segmentation(task, panels, folder / "figures" / "segmentation.png", title)
    if save_predictions:
        # By rename: where the folder is, all predictions are in it.
        shutil.rmtree(folder / "predictions", ignore_errors=True)
        unfinished.replace(folder / "predictions")
    return summarise(task, rows)


def _score(
    config: RunConfig, task: Task, predictions: Path | None, volume: Volume, probabilities: NDArray[np.float32]
) -> tuple[list[dict[str, Any]], Any]:
    """Rows of `cases.csv` and the panel of one case; its label map goes to `predictions` if that is given."""
    predicted = volume.geometry.decide(task, probabilities)
    label, affine, _ = load_label(task, volume.case)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    scores = metrics.score(predicted, task.masks(label), spacing, new_scoring(config.evaluate))
    rows = [{"case": volume.case.id, "target": t, **asdict(s)} for t, s in zip(task.targets, scores, strict=True)]
    if predictions is not None:
        composed = task.compose(predicted, volume.case.numbering)
        place = predictions / f"{check_name(volume.case.id)}.nii.gz"
        write_label(place, composed, np.asarray(volume.geometry.affine))
    return rows, picture.panel(task, volume, probabilities, [scored.dice for scored in scores])


def new_scoring(settings: Evaluate) -> metrics.Scoring:
    """What is scored, as the settings say."""
    return metrics.Scoring(hd95=settings.hd95, empty=settings.empty, tolerance=settings.tolerance)


@torch.inference_mode()
def predict(
    task: Task, network: nn.Module, image: NDArray[np.float32], trained: Training, settings: Evaluate
) -> NDArray[np.float32]:
    """A prepared image (C, x, y, z) -> probabilities (outputs, x, y, z) on the same grid, by sliding windows.

    Windows have the extent, precision and memory layout that the network was `trained` with.
    """
    device = next(network.parameters()).device
    bf16 = hardware.precision(trained.precision, device) == "bf16"
    layout = torch.channels_last_3d if trained.channels_last else torch.contiguous_format
    hardware.keep_memory()
    place(network.eval(), device, trained.channels_last)
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        logits = sliding_window_inference(
            torch.from_numpy(image)[None].to(device),
            roi_size=trained.crop,
            sw_batch_size=2,
            predictor=lambda window: network(window.to(memory_format=layout)).float(),
            overlap=settings.overlap,
            mode="gaussian",
        )
    assert isinstance(logits, Tensor)
    probabilities = logits.sigmoid() if task.overlapping else logits.softmax(dim=1)
    found: NDArray[np.float32] = probabilities[0].float().cpu().numpy()
    return found


def summarise(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Per-target means over the scored cases, and the average over targets; None where nothing can be averaged."""
    summary: dict[str, Any] = {}
    for target in task.targets:
        mine = [row for row in rows if row["target"] == target]
        values = {name: [row[key] for row in mine if row[key] is not None] for name, key in AVERAGED.items()}
        status = [row["status"] for row in mine]
        summary[target] = {
            **{name: float(np.mean(found)) if found else None for name, found in values.items()},
            "n_cases": len(values["dice"]),
            "n_missed": status.count("missed"),
            "n_spurious": status.count("spurious"),
            "n_empty": status.count("empty"),
        }
    average = {}
    for name in AVERAGED:
        found = [values[name] for values in summary.values() if values[name] is not None]
        average[name] = float(np.mean(found)) if found else None
    return {**summary, "average": average}
