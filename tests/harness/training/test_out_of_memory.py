"""What would fit the memory is found by trying."""

import pytest
import torch
from torch import nn

from harness import UserError
from harness.api.global_batch import gather
from harness.compute.devices import new_accelerator
from harness.training.loop import train
from tests.harness.short_stage import stage_plan, training_settings


class Hungry(torch.nn.Module):
    """More than 1000 voxels at a time are too many."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, batch):
        if batch["image"].numel() > 1000:
            raise torch.OutOfMemoryError("out of memory")
        # As contrasts do: a single crop, or one part of a batch alone, has nothing to compare.
        if len(gather(batch["image"].flatten(1))) < 2:
            raise ValueError("no negatives")
        return {"fit": (self.weight - batch["image"].mean()).square().sum()}


@pytest.mark.parametrize(
    ("edge", "advice"),
    [
        (7, r"tried and found to fit: --micro-batches 2 \(the same result\)"),
        (9, r"tried and found to fit: --micro-batches 4 \(the same result\)"),
        (12, r"tried and found to fit: --set pretrain.crop=6,6,6 --set pretrain.batch_size=4"),
        (30, "nor with a single crop of half the edges: choose a smaller network"),
    ],
)
def test_what_would_fit_the_memory_is_tried(edge, advice, tmp_path):
    data, given = [{"image": torch.ones(1, edge, edge, edge)}] * 80, training_settings(crop=edge, batch_size=4)
    with pytest.raises(
        UserError, match=f"does not fit the memory of cpu with crops of {edge}x.*, 4 a step, in fp32.*{advice}"
    ):
        train(stage_plan(given), Hungry(), data, tmp_path / "history.jsonl", new_accelerator())


def test_micro_batches_are_no_advice_for_batch_norm(tmp_path):
    module, data = Hungry(), [{"image": torch.ones(1, 7, 7, 7)}] * 80
    module.norm = nn.BatchNorm3d(1, affine=False)
    with pytest.raises(UserError, match=r"found to fit: --set pretrain.batch_size=2"):
        train(
            stage_plan(training_settings(crop=7, batch_size=4)),
            module,
            data,
            tmp_path / "history.jsonl",
            new_accelerator(),
        )
