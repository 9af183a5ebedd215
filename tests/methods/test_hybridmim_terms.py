"""HybridMIM on real hippocampi: each loss term is learned, and none drowns the others (`pytest -m slow -s` prints the tables)."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.methods.pretext import learn

pytestmark = pytest.mark.slow

STEPS = 500


def priors(crops):
    """What the best predictor that sees no image reaches, weighted. 7 of 16 patches are masked, 8 are in a sub-volume."""
    assert crops[0]["image"].shape[2:] == (32, 64, 32)
    ways = [math.comb(8, k) * math.comb(8, 7 - k) / math.comb(16, 7) for k in range(8)]
    share, rows = 7 / 16, 2 * len(crops[0]["image"])
    voxels = np.concatenate([crop["image"].numpy().ravel() for crop in crops])
    return {
        "reconstruction": float(voxels.var()),
        "number": -0.1 * sum(p * math.log(p) for p in ways if p),
        "location": -0.1 * 8 * (share * math.log(share) + (1 - share) * math.log(1 - share)),
        "contrastive": 0.1 * math.log(rows - 1),
    }


def gradient_norms(method, crops):
    """Norm of each weighted term's gradient on the encoder, averaged over three batches."""
    encoder = [p for key, p in method.backbone.named_parameters() if method.backbone.part_of(key) == "encoder"]
    norms = {}
    for batch in crops[:3]:
        for name, term in method.train()(batch).items():
            slopes = torch.autograd.grad(term, encoder, retain_graph=True, allow_unused=True)
            norm = math.sqrt(sum(float(slope.square().sum()) for slope in slopes if slope is not None))
            norms[name] = norms.get(name, 0) + norm / 3
    return norms


@torch.no_grad()
def cosines(method, crops):
    """Mean cosine of the codes of one sample, and of different samples, before projection."""
    same, different = [], []
    for batch in crops:
        codes = F.normalize(torch.cat(method.codes(*method.train().backbone.encode_twice(batch["image"]))), dim=1)
        similarity, number = codes @ codes.T, len(batch["image"])
        same += [float(similarity[i, i + number]) for i in range(number)]
        different += [float(similarity[i, j]) for i in range(number) for j in range(number) if i != j]
    return np.mean(same), np.mean(different)


def show(title, **columns):
    """Print a table: one row per term, one column per measurement."""
    print(f"\n{title}\n" + " ".join(f"{word:>14}" for word in ("term", *columns)))
    for term in columns["after"]:
        print(" ".join([f"{term:>14}", *(f"{c[term]:14.4f}" if term in c else f"{'-':>14}" for c in columns.values())]))


@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
def test_every_term_falls_below_its_prior(backbone, real_hippocampus, tmp_path):
    learned = learn(real_hippocampus, tmp_path, "hybridmim", backbone, STEPS)
    prior, norms = priors(learned.crops), gradient_norms(learned.method, learned.crops)
    show(f"hybridmim, {backbone}, mse", prior=prior, before=learned.before, after=learned.after, gradient=norms)
    print("cosine of positives {:.3f}, of negatives {:.3f}".format(*cosines(learned.method, learned.crops)))
    for term in ("reconstruction", "number", "location", "contrastive"):
        assert learned.after[term] < 0.97 * prior[term], term
    assert learned.after["consistency"] < learned.before["consistency"]
    assert norms["reconstruction"] < 20 * max(norms["number"], norms["location"])


def test_the_unsquared_norm_leaves_the_number_at_its_prior_on_the_unet(real_hippocampus, tmp_path):
    """Equation 1 to the letter: the reason why the squared error is the default."""
    learned = learn(real_hippocampus, tmp_path, "hybridmim", "unet", STEPS, ["method.distance=norm"])
    prior, norms = priors(learned.crops), gradient_norms(learned.method, learned.crops)
    del prior["reconstruction"]  # of the squared error
    show("hybridmim, unet, norm", prior=prior, before=learned.before, after=learned.after, gradient=norms)
    print("cosine of positives {:.3f}, of negatives {:.3f}".format(*cosines(learned.method, learned.crops)))
    assert norms["reconstruction"] > 100 * norms["number"]
    assert learned.after["number"] > 0.97 * prior["number"]


def test_codes_before_the_last_norm_tell_samples_apart(real_hippocampus, tmp_path):
    learned = learn(real_hippocampus, tmp_path, "hybridmim", "unet", STEPS, ["method.contrast_on=before-norm"])
    prior = priors(learned.crops)
    same, different = cosines(learned.method, learned.crops)
    show("hybridmim, unet, before-norm", prior=prior, before=learned.before, after=learned.after)
    print(f"cosine of positives {same:.3f}, of negatives {different:.3f}")
    assert learned.after["contrastive"] < 0.9 * prior["contrastive"]
    assert same - different > 0.1
