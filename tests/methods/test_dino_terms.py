"""DINO on real hippocampi: the teacher does not collapse (`pytest -m slow -s` prints the table)."""

import numpy as np
import pytest
import torch

from tests.methods.pretext import learn


@torch.no_grad()
def measure(made, held_out):
    """Entropies of the targets relative to log K, of each and of their mean; mean cosines within and between volumes.

    The code of a view is the teacher head's bottleneck, without the mean over the held-out views.
    """
    made.generator.manual_seed(0)
    targets, codes = [], []
    for batch in held_out:
        pooled = made.pooled(made.teacher_backbone, made.global_views(batch))
        outputs = made.teacher_head(pooled)
        targets.append(made.targets(outputs.unflatten(0, (-1, 2))).flatten(0, 1))
        codes.append(made.teacher_head.bottleneck(pooled))
    p, scale = torch.cat(targets).double(), np.log(made.config.prototypes)
    each = torch.special.entr(p).sum(dim=1).mean().item() / scale
    mean = torch.special.entr(p.mean(dim=0)).sum().item() / scale
    rows = torch.cat(codes)
    rows = torch.nn.functional.normalize(rows - rows.mean(dim=0), dim=1)
    likeness = rows @ rows.T
    number = torch.arange(len(rows))
    same = (number[:, None] ^ 1) == number
    other = ~same & (number[:, None] != number)
    return each, mean, likeness[same].mean().item(), likeness[other].mean().item()


LARGE = ("pretrain.batch_size=8", "method.prototypes=256", "pretrain.crop=32,32,32")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("backbone", "steps", "settings"), [("unet", 80, LARGE), ("unet", 200, ())], ids=["large", "demo"]
)
def test_the_teacher_does_not_collapse(backbone, steps, settings, real_hippocampus, tmp_path):
    """The entropy is neither 0 nor log K, crops use several prototypes, and two views of a volume are nearer than others."""
    learned = learn(real_hippocampus, tmp_path, "dino", backbone, steps, settings)
    each, mean, same, other = measure(learned.method, learned.crops)
    before, after = (sum(terms.values()) for terms in (learned.before, learned.after))
    scale = np.log(learned.method.config.prototypes)
    row = [scale, before, after, each, mean, same, other]
    print(f"\n| {backbone} | {steps} |", *(f"{value:.3f} |" for value in row))
    assert after < before
    assert after < scale
    assert 0.05 < each < 0.95
    assert mean > each + 0.05
    assert same > other + 0.1
