"""The validated settings of a run: training budgets, fine-tuning, evaluation, and the complete configuration."""

from typing import Any, ClassVar, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, SerializeAsAny, model_validator

from harness.api.settings import Settings, Size3
from harness.api.task import SPACINGS, Window
from harness.config.request import FinetuneProtocol, Mode, TransferParts
from harness.system.errors import UserError

Definition = Literal["max-directed", "pooled", "area-weighted"]
Empty = Literal["worst", "skipped", "perfect"]


class Training(Settings):
    """Budget and optimizer of a training stage; by default AdamW, a linear warm-up and a cosine schedule (section IV-C).

    Attributes:
        stage: its name, with which its settings begin.
    """

    stage: ClassVar[str] = "training"
    steps: PositiveInt | None = Field(None, description="optimizer steps; give steps or epochs")
    epochs: PositiveInt | None = Field(None, description="passes over the training cases; give steps or epochs")
    crop: Size3 = Field(description="extent of a training crop in voxels")
    batch_size: PositiveInt = Field(description="global batch: crops per step, over all processes and micro-batches")
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="sgd: with Nesterov's momentum, as in nnU-Net")
    lr: float = Field(gt=0, description="peak learning rate")
    weight_decay: float = Field(ge=0, description="of AdamW without biases and norms; of SGD for all parameters")
    momentum: float = Field(0.99, ge=0, lt=1, description="of SGD; AdamW does not use it")
    lr_schedule: Literal["cosine", "poly"] = Field(
        "cosine", description="of the learning rate after the warm-up; poly: (1 - step / steps)^0.9, as in nnU-Net"
    )
    warmup_steps: NonNegativeInt = Field(0, description="linear warm-up in steps")
    warmup_epochs: NonNegativeInt = Field(0, description="linear warm-up in passes over the training cases")
    clip_norm: float = Field(0.0, ge=0, description="largest gradient norm; 0 does not clip, as in the paper")
    workers: NonNegativeInt = Field(0, description="loader processes; 0 loads in the main process")
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 where the hardware computes in it"
    )
    channels_last: bool = Field(True, description="channels-last memory layout of the network")
    compile: bool = Field(False, description="torch.compile for the backbone; needs a C++ compiler on a CPU")

    @model_validator(mode="after")
    def _one_budget(self) -> "Training":
        """Exactly one of `steps` and `epochs` must be given."""
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs, and set the other to none")
        return self

    @model_validator(mode="after")
    def _momentum_of_sgd(self) -> "Training":
        """AdamW must not be given a momentum, which it would not use."""
        if self.optimizer == "adamw" and self.momentum != type(self).model_fields["momentum"].default:
            raise ValueError("momentum is a setting of the optimizer sgd: leave it out, or set optimizer to sgd")
        return self

    def rows(self, processes: int, micro_batches: int) -> int:
        """Number of crops in each part of a batch: those of one micro-batch of one process.

        Raises:
            UserError: the batch cannot be divided evenly.
        """
        num_parts = processes * micro_batches
        if self.batch_size % num_parts:
            raise UserError(
                f"a batch of {self.batch_size} crops cannot be dealt out evenly over {processes} processes with "
                f"{micro_batches} micro-batches each: set pretrain.batch_size and finetune.batch_size to multiples of "
                f"{num_parts}, or take fewer"
            )
        return self.batch_size // num_parts

    def schedule(self, num_cases: int) -> tuple[int, int]:
        """Number of optimizer steps, and number of warm-up steps among them, for `num_cases` training cases.

        Raises:
            UserError: the warm-up is as long as the training, or longer.
        """
        per_epoch = -(-num_cases // self.batch_size)
        steps = self.steps if self.steps is not None else (self.epochs or 0) * per_epoch
        warmup = self.warmup_steps + self.warmup_epochs * per_epoch
        if warmup >= steps:
            raise UserError(
                f"{self.stage}: a warm-up of {warmup} steps does not fit {steps} training steps ({num_cases} cases, "
                f"{per_epoch} steps an epoch): set fewer {self.stage}.warmup_steps or {self.stage}.warmup_epochs, or more steps"
            )
        return steps, warmup


class Pretrain(Training):
    """Pre-training."""

    stage = "pretrain"

    probe_every: NonNegativeInt = Field(
        0, description="steps between two linear probes of the features on validation cases; 0: none"
    )


class Finetune(Training):
    """Fine-tuning with the sum of soft Dice and cross-entropy, and the paper's light augmentation (section IV-C)."""

    stage = "finetune"

    validation: NonNegativeInt = Field(
        4,
        description="training cases that are held out to watch fine-tuning, at most one in twenty, and to choose settings "
        "(--tune), at most one in five; 0: none; here",
    )
    layer_decay: float = Field(
        1.0, gt=0, le=1, description="factor on the learning rate of the decoder; its square on the encoder's"
    )
    foreground: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of crops centred on a labelled voxel; not in the paper, which says random crops",
    )
    exact_foreground: bool = Field(
        False,
        description="nnU-Net's rule: of a batch of B, the crops from number round(B x (1 - share)) on are centred on a label",
    )
    flip: float = Field(0.2, ge=0, le=1, description="probability of a flip, per axis; section IV-C")
    rotate: float = Field(0.2, ge=0, le=1, description="probability of a rotation by 90 degrees; section IV-C")
    scale: float = Field(0.1, ge=0, le=1, description="probability of an intensity scaling by 0.9..1.1; section IV-C")
    shift: float = Field(0.1, ge=0, le=1, description="probability of an intensity shift by -0.1..0.1; section IV-C")
    nnunet_augmentation: float = Field(
        0.0,
        ge=0,
        le=1,
        description="factor on the probabilities of nnU-Net's augmentation, which comes before the four above; 0: none of it",
    )
    dice_per_sample: bool = Field(
        False, description="the Dice loss divides the sums of each sample, as nnU-Net's; else those of the batch"
    )
    dice_background: bool = Field(
        True, description="the Dice loss counts the background as a target; nnU-Net's does not"
    )


class Evaluate(Settings):
    """Sliding-window inference and the definitions of the metrics."""

    overlap: float = Field(0.5, ge=0, lt=1, description="of neighbouring windows, as a share of the window")
    mirror: bool = Field(
        False,
        description="average the logits of each window over its 8 mirror images, as nnU-Net; takes 8 times as long",
    )
    hd95: Definition = Field(
        "max-directed",
        description="definition of HD95: MONAI's, medpy's or surface-distance's (harness/evaluation/metrics.py)",
    )
    empty: Empty = Field("worst", description="policy for empty masks (harness/evaluation/metrics.py)")
    tolerance: float = Field(1.0, ge=0, description="of surface Dice, in mm")


class TaskSettings(Settings):
    """The settings of a task that `--set task.FIELD` can change."""

    spacing: tuple[float, float, float] | None = Field(None, description="of the prepared volumes in mm")
    window: tuple[float, float] | None = Field(None, description="intensities that are told apart, in Hounsfield units")
    normalisation: Literal["zscore"] | None = Field(
        None,
        description="zscore: mean 0 and deviation 1 over the cropped image, as nnU-Net's weights expect; none: the task's own",
    )

    @model_validator(mode="after")
    def _in_order(self) -> "TaskSettings":
        """The spacing must be in range, and the window in ascending order and representable in float32."""
        if self.spacing is not None and not all(SPACINGS[0] <= edge <= SPACINGS[1] for edge in self.spacing):
            raise ValueError(f"each spacing must be more than 0 mm, within {SPACINGS[0]:g} to {SPACINGS[1]:g} mm")
        if self.window is not None and self.normalisation is not None:
            raise ValueError("give a window or a normalisation, not both")
        if self.window is not None and self.window[0] >= self.window[1]:
            raise ValueError("give the lower end of the window first, for instance -175,250")
        if self.window is not None and not Window(*self.window).usable:
            raise ValueError("float32 must hold both ends of the window and tell them apart, for instance -175,250")
        return self


class RunConfig(Settings):
    """Everything that determines the result of a run, except for the data itself."""

    method: str
    backbone: str
    task: str
    mode: Mode = "task-specific"
    corpora: tuple[str, ...] = ()
    split: str = "fixed"
    prepared: dict[str, Any] = Field(default_factory=dict, description="spacing and intensities of the task's volumes")
    protocol: FinetuneProtocol = "finetune"
    transfer: TransferParts = "method"
    preset: str
    overrides: dict[str, str]
    tune: str = Field("", description="grid of fine-tuning settings that are tried, see `harness.config.grid`")
    label_fraction: float = Field(1.0, gt=0, le=1, description="share of the training cases whose labels are used")
    label_seed: int | None = Field(
        None, ge=0, le=2**63 - 1, description="of the draw of the labelled cases; none: the run's seed"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="of all randomness in the run")
    method_settings: SerializeAsAny[Settings]
    backbone_settings: SerializeAsAny[Settings]
    pretrain: Pretrain
    finetune: Finetune
    evaluate: Evaluate
