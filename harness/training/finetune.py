"""Fine-tuning: pre-trained weights in a new network with a new head, trained with labels."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from harness.api.task import Task
from harness.compute.devices import new_accelerator
from harness.compute.memory import peak_memory
from harness.config.schema import Finetune, RunConfig, Training
from harness.data.crops import CropDataset
from harness.data.volumes import Volume
from harness.system.files import digest_file, write_atomic
from harness.training import protocols
from harness.training.augmentation import Augment, warp_drawer
from harness.training.effective_rank import effective_ranks
from harness.training.lineage import tensor_digests
from harness.training.loop import StageContext, StagePlan, train
from harness.training.models import Plugins, new_network, seed_for
from harness.training.segmenter import Segmenter
from harness.training.stage_files import assert_unchanged, final_soft_dice, first_gradient_norms, write_weights
from harness.training.transfer import select_parts, transfer

PROBES = 2
"""Number of fine-tuning crops on which the effective rank of the features is measured."""


def finetune_data(config: RunConfig, task: Task, volumes: Sequence[Volume], length: int, seed: int) -> CropDataset:
    """`length` augmented crops with labels."""
    return labelled_crops(config.finetune, config.finetune, task, volumes, length, seed)


def labelled_crops(
    settings: Finetune, stage: Training, task: Task, volumes: Sequence[Any], length: int, seed: int
) -> CropDataset:
    """`length` labelled crops of a training stage, drawn and augmented as fine-tuning's `settings` say."""
    exact_batch = stage.batch_size if settings.exact_foreground else 0
    return CropDataset(
        volumes,
        stage.crop,
        length,
        seed,
        Augment(settings),
        task,
        settings.foreground,
        exact_batch,
        warp_drawer(settings),
    )


def finetune(
    config: RunConfig,
    plugins: Plugins,
    task: Task,
    volumes: Sequence[Volume],
    weights: Mapping[str, Tensor],
    folder: Path,
    context: StageContext,
    repeat_stem: bool = False,
    pretraining_history: str = "",
) -> None:
    """Train with labels; write `weights.safetensors`, `history.jsonl` and, last, `finetune.json` in `folder`.

    A new backbone gets the pre-trained `weights` and a new head. Its initial values and the crops depend on the seed only,
    so that `scratch` is a matched control. An interrupted fine-tuning in `folder` goes on from its last checkpoint.

    Args:
        repeat_stem: whether to repeat weights for one channel over the channels of the task.
        pretraining_history: lines of the pre-training, which the history begins with.

    Raises:
        UserError, Interrupted: as `harness.training.loop.train`.
        RuntimeError: training changed weights that the protocol fixes.
    """
    accelerator, settings = new_accelerator(context.execution.micro_batches), config.finetune
    steps, warmup = settings.schedule(len(volumes))
    data = finetune_data(config, task, volumes, steps * settings.batch_size, seed_for(config.seed, "finetune crops"))
    probes = [torch.as_tensor(data[index]["image"]) for index in range(min(PROBES, len(data)))]
    torch.manual_seed(seed_for(config.seed, "finetune init"))
    backbone = plugins.new_backbone(config, len(task.channels)).to(accelerator.device)
    ranks = {"initial": effective_ranks(backbone, probes)}
    transferred = transfer(backbone, select_parts(backbone, weights, config.transfer), repeat_stem)
    ranks["transferred"] = effective_ranks(backbone, probes)
    network = new_network(backbone, task, config.protocol)
    start = tensor_digests(network.state_dict())
    fixed = protocols.fixed(network, config.protocol)
    before = protocols.digest_modules(fixed)
    plan = StagePlan("finetune", settings, steps, warmup, seed_for(config.seed, "finetune steps"), pretraining_history)
    segmenter = Segmenter(network, task.overlapping, fixed, settings.dice_per_sample, settings.dice_background)
    report = train(plan, segmenter, data, folder / "history.jsonl", accelerator, context)
    if protocols.digest_modules(fixed) != before:
        raise RuntimeError(f"protocol {config.protocol!r}: what is fixed was changed by training")
    frozen = {"digest": before, "tensors": sum(len(module.state_dict()) for module in fixed)} if fixed else None

    def finish() -> None:
        """Write the weights and, last, the report of the stage."""
        context.check()
        assert_unchanged(volumes, folder)
        path = folder / "weights.safetensors"
        write_weights(network.state_dict(), path, context.lineage, start)
        ranks["finetuned"] = effective_ranks(backbone, probes)
        moved = {
            "requested": config.transfer,
            "text": str(transferred),
            "frozen": frozen,
            "effective_rank": {state: [round(rank, 3) for rank in levels] for state, levels in ranks.items()},
            "first_gradient_norms": first_gradient_norms(folder / "history.jsonl", "finetune"),
        }
        stage = {
            "trained": asdict(report),
            "transfer": transferred.as_record() | moved,
            # Per sample, a crop without a target counts as 0, which says nothing about convergence.
            "final_soft_dice": None if settings.dice_per_sample else final_soft_dice(folder / "history.jsonl"),
            "memory": peak_memory(accelerator.device),
            "weights": digest_file(path),
        }
        write_atomic(folder / "finetune.json", json.dumps(stage))

    context.processes.decide(finish)
