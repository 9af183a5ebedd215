"""Methods that restore images learn it on real crops: on held-out ones they beat what needs no learning."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from harness import Batch, Method
from methods.models_genesis import ModelsGenesis
from tests.methods.pretext import learn, row

STEPS = {"models_genesis": 200, "mae": 100, "simmim": 100, "unetformer": 100}
# The demo's crop for the hippocampus. With patches of 8 there is more to restore.
CROP = ("pretrain.crop=32,64,32",)
PATCH = ("method.patch=8,8,8",)


@dataclass
class Restored:
    """Held-out crops and what the method makes of them, over the voxels that the loss counts.

    Attributes:
        target, restored, baseline: values of the counted voxels. `baseline` is the best guess from a crop without learning:
            the distorted input itself, or the mean of the visible voxels.
    """

    target: Tensor
    restored: Tensor
    baseline: Tensor

    def prior(self, power: int) -> float:
        """The least error of three guesses that need no learning: `baseline`, the targets' mean and their median."""
        guesses = (self.baseline, self.target.mean(), self.target.median())
        return min(float((self.target - guess).abs().pow(power).mean()) for guess in guesses)

    def correlation(self) -> float:
        """Pearson's correlation of restored and true intensities, without the padding around small volumes."""
        inside = self.target > 0
        return float(np.corrcoef(self.target[inside], self.restored[inside])[0, 1])


@torch.no_grad()
def restore(method: Method, crops: Sequence[Batch]) -> Restored:
    """What the method restores of held-out crops, with masks that are the same in every call."""
    method.generator.manual_seed(0)
    method.train()
    parts = []
    for batch in crops:
        image = batch["image"]
        if isinstance(method, ModelsGenesis):
            restored = method.restore(method.backbone.decode(method.backbone.encode(image))).sigmoid()
            counted, target, baseline = torch.ones_like(image, dtype=torch.bool), batch["target"], image
        else:
            mask, restored = method.restore(image)
            counted, target = mask.expand_as(image), image
            visible = (image * ~mask).sum(dim=(1, 2, 3, 4)) / (~mask).sum(dim=(1, 2, 3, 4))
            baseline = visible.view(-1, 1, 1, 1, 1).expand_as(image)
        parts.append([values[counted] for values in (target, restored, baseline)])
    return Restored(*(torch.cat(values) for values in zip(*parts, strict=True)))


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
@pytest.mark.parametrize("name", list(STEPS))
def test_restoration_is_learned_on_real_crops(name, backbone, real_hippocampus, tmp_path):
    settings = CROP if name == "models_genesis" else CROP + PATCH
    learned = learn(real_hippocampus, tmp_path, name, backbone, STEPS[name], settings)
    (term,) = learned.after
    restored = restore(learned.method, learned.crops)
    power = 1 if name in ("simmim", "unetformer") else 2
    prior, correlation = restored.prior(power), restored.correlation()
    error = float((restored.target - restored.restored).abs().pow(power).mean())
    print("\n" + row(name, backbone, STEPS[name], term, prior, learned.before[term], learned.after[term]))
    print(row(name, backbone, STEPS[name], "correlation", 0, float("nan"), correlation))
    # The same crops, masks and weights: the loss is the error that its name says.
    assert learned.after[term] == pytest.approx(error, rel=0.02)
    assert learned.after[term] < 0.95 * prior
    assert learned.after[term] < learned.before[term]
    assert correlation > 0.2
