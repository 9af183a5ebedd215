"""Pre-training with the labels of all training cases: the control that shows how much there was to gain."""

from collections.abc import Sequence

from torch import Tensor, nn

from harness import Backbone, Batch, Method, Preparation, Settings, Source, VolumeSource, segmentation_loss


class Supervised(Method):
    """Segmentation with the labels of all training cases: the positive control of a comparison.

    Encoder and decoder are trained on the crops and with the augmentation of fine-tuning, and with its loss as it is without
    `finetune.dice_per_sample` and `finetune.dice_background`, for the steps of pre-training. Their labels are those of all
    training cases, also where fine-tuning may use few of them. Then it is fine-tuned like every method. Its difference from
    scratch is the headroom of a table: what a pre-training that knows the task could gain. Where the headroom is not above its
    interval, the table cannot show the benefit of any method. It uses labels that the others do not have, so it is never ranked.
    """

    name = "supervised"
    unit_range = False
    reference = "the positive control of every comparison"
    uses_labels = True

    def __init__(self, config: Settings, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.head: nn.Module | None = None  # `prepare` knows the number of outputs
        self.overlapping = False

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """The volumes. Makes the head for the targets of the task."""
        task = preparation.task
        if task is None:
            raise RuntimeError("supervised needs the task of the labels")
        self.head = nn.Conv3d(self.backbone.width, task.num_outputs, 1)
        self.overlapping = task.overlapping
        return volumes

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) and `target`, see `segmentation_loss` -> `dice` and `cross_entropy`."""
        return segmentation_loss(self.logits(batch["image"]), batch["target"], self.overlapping)

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The crop and, for each output, its probability."""
        logits = self.logits(batch["image"])
        probabilities = logits.sigmoid() if self.overlapping else logits.softmax(dim=1)
        return {"crop": batch["image"], **{f"output {n}": probabilities[:, [n]] for n in range(logits.shape[1])}}

    def logits(self, image: Tensor) -> Tensor:
        """(N, C, x, y, z) -> (N, outputs, x, y, z)."""
        if self.head is None:
            raise RuntimeError("supervised has no head before prepare: call it first")
        logits: Tensor = self.head(self.backbone.decode(self.backbone.encode(image)))
        return logits
