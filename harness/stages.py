"""The training stages of a run: pre-train and fine-tune. Each takes prepared volumes and leaves files behind."""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor, nn

from harness import hardware, picture, protocols
from harness.checkpoints import Checkpoints
from harness.config import RunConfig
from harness.contracts import Backbone, Batch, Method, Source
from harness.crops import Augment, CropDataset
from harness.errors import UserError
from harness.execution import Execution
from harness.files import digest_file, write_atomic
from harness.fitting import is_out_of_memory
from harness.loop import train
from harness.parts import total
from harness.preparation import Workshop
from harness.progress import say
from harness.task import Task
from harness.team import Carried
from harness.training import Trained, new_accelerator
from harness.transfer import transfer
from harness.volumes import Volume, verified

Discovery = tuple[Any, Path]
"""What a method's preparation depends on, and the folder that keeps what it found."""


PICTURE = "restoration.png"


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
    carried: Carried,
    title: str = "",
) -> None:
    """Run the pretext task and leave `weights.safetensors`, `history.jsonl` and, last, `stage.json` in `folder`.

    What was begun there goes on from its last checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    say(f"pre-training into {folder}")
    team, accelerator = carried.team, new_accelerator(carried.how.micro_batches)
    method, sources, prepared = team.first(
        lambda: _prepared(config, plugins, channels, volumes, discovery, accelerator.device, carried.how)
    )
    method.generator = torch.Generator(accelerator.device)
    settings = config.pretrain
    steps, warmup = settings.schedule(len(volumes))
    data = pretrain_data(config, plugins, sources, steps * settings.batch_size, seed_for(config.seed, "pretrain crops"))
    seed, history = seed_for(config.seed, "pretrain steps"), folder / "history.jsonl"
    trained = train(
        *(method, data, settings, steps, warmup, accelerator, history, "pretrain"),
        after_step=method.after_step,
        seed=seed,
        carried=carried,
    )
    team.decide(partial(_finish_pretraining, config, method, data, volumes, trained, prepared, folder, title, carried))


def _finish_pretraining(
    config: RunConfig,
    method: Method,
    data: CropDataset,
    volumes: Sequence[Volume],
    trained: Trained,
    prepared: dict[str, Any],
    folder: Path,
    title: str,
    carried: Carried,
) -> None:
    carried.check()
    device = next(method.parameters()).device
    assert_unchanged(volumes, folder)
    weights = folder / "weights.safetensors"
    write_weights(method.weights(), weights)
    stage = asdict(trained) | prepared | {"memory": hardware.memory(device), "weights": digest_file(weights)}
    _show(method, data, config, device, folder / PICTURE, title)
    write_atomic(folder / "stage.json", json.dumps(stage))


def write_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """By rename, as all that others read. Raises OSError where the disk cannot hold them."""
    whole = {key: value.detach().cpu().contiguous() for key, value in weights.items()}
    write_atomic(path, serialise(whole))


def assert_unchanged(volumes: Sequence[Volume], folder: Path) -> None:
    """Whether the prepared volumes still are what they were; what was trained on others is dropped.

    Raises:
        UserError: some are not.
    """
    changed = [volume for volume, whole in zip(volumes, verified(volumes), strict=True) if not whole]
    if changed:
        Checkpoints(folder / "checkpoints", 0).clear()
        raise UserError(
            f"{len(changed)} prepared volumes were changed or removed during training, {changed[0].stem} among them: "
            "what was trained on them is dropped; ask again, and they are prepared again"
        )


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
    try:
        shown = method.eval().show(batch)
    except RuntimeError as error:
        # Whole crops in fp32 may need more than the steps did, which were computed in parts or in bf16.
        if not is_out_of_memory(error):
            raise
        say(f"no {path.name}: its crops do not fit the memory of {device}; the training is not touched by it")
        return
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
    how: Execution,
) -> tuple[Method, Sequence[Source], dict[str, Any]]:
    """The method with what it froze and prepared, what to sample from, and what preparing cost and found."""
    torch.manual_seed(seed_for(config.seed, "pretrain init"))
    method = plugins.method(config.method_settings, plugins.new_backbone(config, channels))
    freeze(method)
    identity, kept = discovery
    seed = seed_for(config.seed, "method prepare")
    workshop = Workshop(seed, device, config.pretrain.crop, config.pretrain, identity, kept, how=how)
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
    sums = [(predicted * target).sum(dim=axes), predicted.sum(dim=axes) + target.sum(dim=axes, dtype=predicted.dtype)]
    both, each = total(torch.stack(sums))
    return 1 - ((2 * both + smooth) / (each + smooth)).mean()


def finetune(
    config: RunConfig,
    plugins: Plugins,
    task: Task,
    volumes: Sequence[Volume],
    weights: Mapping[str, Tensor],
    folder: Path,
    carried: Carried,
    repeat_stem: bool = False,
    head: str = "",
) -> None:
    """Fresh backbone, transfer, new head, supervised training; leaves `weights.safetensors` and, last, `finetune.json`.

    The initial values and the crops depend on the seed only, so that `scratch` is a matched control. What the protocol
    fixes is the same afterwards, by its digest. What was begun in `folder` goes on from its last checkpoint; `head` is what
    the history begins with.
    """
    accelerator = new_accelerator(carried.how.micro_batches)
    torch.manual_seed(seed_for(config.seed, "finetune init"))
    backbone = plugins.new_backbone(config, len(task.channels))
    report = transfer(backbone, weights, repeat_stem)
    network = protocols.with_head(backbone, task.num_outputs, config.protocol)
    fixed = protocols.fixed(network, config.protocol)
    before = protocols.digest_modules(fixed)
    settings = config.finetune
    steps, warmup = settings.schedule(len(volumes))
    length, seed = steps * settings.batch_size, seed_for(config.seed, "finetune crops")
    data = finetune_data(config, task, volumes, length, seed)
    segmenter = Segmenter(network, task.overlapping, fixed)
    trained = train(
        *(segmenter, data, settings, steps, warmup, accelerator, folder / "history.jsonl", "finetune"),
        seed=seed_for(config.seed, "finetune steps"),
        carried=carried,
        head=head,
    )
    if protocols.digest_modules(fixed) != before:
        raise RuntimeError(f"protocol {config.protocol!r}: what is fixed was changed by training")
    frozen = {"digest": before, "tensors": sum(len(module.state_dict()) for module in fixed)} if fixed else None

    def finish() -> None:
        carried.check()
        assert_unchanged(volumes, folder)
        path = folder / "weights.safetensors"
        write_weights(network.state_dict(), path)
        transferred = report.as_record() | {"text": str(report), "frozen": frozen}
        found = {"memory": hardware.memory(accelerator.device), "weights": digest_file(path)}
        stage = {"trained": asdict(trained), "transfer": transferred, **found}
        write_atomic(folder / "finetune.json", json.dumps(stage))

    carried.team.decide(finish)


def load_network(config: RunConfig, plugins: Plugins, task: Task, folder: Path) -> nn.Module:
    """The fine-tuned network of a run's folder, where it is computed."""
    backbone = plugins.new_backbone(config, len(task.channels))
    network = protocols.with_head(backbone, task.num_outputs, config.protocol)
    network.load_state_dict(load_file(folder / "weights.safetensors"))
    return network.to(new_accelerator().device)
