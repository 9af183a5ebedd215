"""Training stages made small: their settings, their plan, and augmentation that is off but for what is asked for."""

from harness.config.schema import Finetune, Training
from harness.training.augmentation import Augment
from harness.training.loop import StagePlan


def training_settings(**changed):
    """Twenty steps."""
    return Training(**{"steps": 20, "crop": 32, "batch_size": 2, "lr": 0.1, "weight_decay": 0.0} | changed)


def stage_plan(of=None):
    """A short pre-training."""
    return StagePlan("pretrain", of or training_settings(), steps=20, warmup=2)


def augment(**probabilities) -> Augment:
    """The augmentation of fine-tuning with these probabilities; the others are 0."""
    off = {"flip": 0, "rotate": 0, "scale": 0, "shift": 0}
    return Augment(Finetune(steps=1, crop=(8, 8, 8), batch_size=1, lr=1, weight_decay=0, **off | probabilities))
