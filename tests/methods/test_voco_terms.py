"""VoCo on real hippocampi: positions are learned (`pytest -m slow -s` prints the table)."""

import numpy as np
import pytest
import torch

from methods.voco import cosine
from tests.methods.parts import generator
from tests.methods.pretext import learn

# --- what is learned


def priors_of(overlap: np.ndarray, terms: dict[str, float]) -> dict[str, float]:
    """What predictors reach that ignore the image: they give one likeness c to all pairs.

    A larger c lowers the overlap term and raises the other one. So each term is compared with that of the c that is as good
    in the other term, and their sum with the least sum. Codes that ignore the image are all alike: the third term is 1.
    """
    y = overlap[overlap > 0]
    values = np.linspace(0, 1, 1001)
    near = np.array([(-y * np.log(1 - np.abs(y - c) + 1e-6)).sum() / y.sum() for c in values])
    falling = slice(0, int(np.argmin(near)) + 1)
    as_near = np.interp(-terms["overlap"], -near[falling], values[falling])
    return {
        "overlap": float(np.interp(np.sqrt(terms["apart"]), values, near)),
        "apart": float(as_near**2),
        "overlap + apart": float((near + values**2).min()),
        "orthogonal": 1.0,
    }


@torch.no_grad()
def pairs_on(method, crops) -> tuple[np.ndarray, np.ndarray]:
    """Overlap and similarity of every pair on held-out volumes, without augmentation."""
    number = int(np.prod(method.config.grid))
    rows = []
    for batch in crops:
        image = batch["image"]
        start, overlap = method.draw_crops(image)
        views = torch.cat([method.cut(image, method._base_origins(image)), method.cut(image, start)], dim=1)
        flat = views.flatten(0, 1)
        codes = method._encode(flat, method.backbone, method.projector).view(*views.shape[:2], -1)
        rows.append((overlap.numpy(), cosine(codes[:, number:], codes[:, :number]).relu().numpy()))
    overlaps, likenesses = zip(*rows, strict=True)
    return np.concatenate(overlaps), np.concatenate(likenesses)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two to four minutes on a core of its own
@pytest.mark.parametrize(("backbone", "steps"), [("unet", 200), ("swinunetr", 200)])
def test_the_position_of_crops_is_learned_on_real_volumes(real_hippocampus, tmp_path, backbone, steps):
    learned = learn(real_hippocampus, tmp_path, "voco", backbone, steps)
    learned.method.generator = generator()
    overlap, likeness = pairs_on(learned.method, learned.crops)
    before, after = (
        terms | {"overlap + apart": terms["overlap"] + terms["apart"]} for terms in (learned.before, learned.after)
    )
    priors = priors_of(overlap, after)
    correlation = np.corrcoef(overlap.ravel(), likeness.ravel())[0, 1]
    right = (likeness.argmax(axis=-1) == overlap.argmax(axis=-1)).mean()
    row = f"\n| voco | {backbone} | {steps} |"
    for term, prior in priors.items():
        print(f"{row} {term} | {prior:.4f} | {before[term]:.4f} | {after[term]:.4f} |", end="")
    print(f"{row} correlation | 0 | | {correlation:.3f} |", end="")
    print(f"{row} base crop with most overlap | {1 / overlap.shape[-1]:.3f} | | {right:.3f} |")
    for term, prior in priors.items():
        assert after[term] < prior, term
    assert correlation > 0.5
    assert right > 3 / overlap.shape[-1]
