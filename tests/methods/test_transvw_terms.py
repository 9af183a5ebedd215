"""TransVW on real hippocampi: words depend on codes, and both terms are learned (`pytest -m slow -s` prints the tables)."""

import numpy as np
import pytest
import torch

from harness.api.settings import build
from harness.config.schema import Training
from harness.conformance.fixture import BUDGET, CPU
from harness.training.method_preparation import PreparationContext
from methods.transvw import Autoencoder, TransVW, origin_at
from tests.methods.parts import unet
from tests.methods.pretext import learn, real_volumes, row
from tests.methods.transvw_parts import discover

# On real data


def share_touched(volume, boxes):
    """Share of a volume's voxels that lie in at least one of the boxes, given as (origin, extent)."""
    touched = np.zeros(volume.shape, bool)
    for origin, extent in boxes:
        touched[tuple(slice(a, a + n) for a, n in zip(origin, extent, strict=True))] = True
    return touched.mean()


@pytest.mark.slow
def test_words_on_real_volumes_depend_on_codes_and_reach_all_of_a_volume(real_hippocampus, tmp_path, monkeypatch):
    """Prints how many of 44 words change when the codes are shuffled, and how much of a volume words touch."""
    volumes = real_volumes(real_hippocampus, tmp_path, 176)
    budget = build(Training, {**BUDGET, "crop": (64, 64, 64), "batch_size": 4}, "pretrain")
    preparation = PreparationContext(0, CPU, budget.crop, budget, ["words"], tmp_path)
    computed, compute = [], Autoencoder.codes
    monkeypatch.setattr(Autoencoder, "codes", lambda *arguments: computed.append(compute(*arguments)) or computed[0])
    made = TransVW(TransVW.Config(autoencoder_steps=60), unet())
    sources = made.prepare(volumes, preparation)
    (codes,), extent = computed, sources[0].extent
    shuffled = np.random.default_rng(1).permutation(codes)
    shapes = np.array([volume.shape for volume in volumes])
    print(f"\n{len(volumes)} hippocampi, {shapes.min(axis=0)} to {shapes.max(axis=0)} voxels; words of {extent}")
    for share in (1.0, 0.32):
        real, other = (discover(volumes, c, extent, words=44, instances=share) for c in (codes, shuffled))
        pairs = [(set(a["volumes"]), set(b["volumes"])) for a, b in zip(real, other, strict=True)]
        differ, common = sum(a != b for a, b in pairs), np.mean([len(a & b) for a, b in pairs])
        members = len(real[0]["volumes"])
        print(
            f"instances={share:g}: {members} volumes a word; with shuffled codes {differ} of {len(real)} words differ, "
        )
        print(f"  {common:.1f} of {members} volumes stay (by chance {members**2 / len(volumes):.1f})")
        assert len(real) == 44
        assert differ == (44 if share < 1 else 0)
        assert share == 1 or common < 0.6 * members
    assert {(s.word, s.position) for s in sources} == {(n, tuple(w["position"])) for n, w in enumerate(real)}
    smallest = shapes.min(axis=0)  # before version 2: from corner 0, and not beyond the end of the smallest volume
    before, after, possible = [], [], []
    for volume in volumes:
        possible.append(np.prod(smallest / volume.shape))
        before.append(share_touched(volume, [(origin_at(w["position"], smallest, extent), extent) for w in real]))
        after.append(share_touched(volume, [(origin_at(w["position"], volume.shape, extent), extent) for w in real]))
    print(f"before: words can touch {np.mean(possible):.1%} of a volume, 44 words touch {np.mean(before):.1%}")
    print(f"after: words can touch 100 % of a volume, 44 words touch {np.mean(after):.1%} (least {np.min(after):.1%})")
    assert np.mean(possible) < 0.6
    assert np.min(after) > 0.65


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("backbone", ["unet", "swinunetr"])
def test_both_terms_are_learned_on_real_crops(backbone, real_hippocampus, tmp_path):
    """On held-out volumes: words are told apart better than by chance, crops are restored better than by their input."""
    steps, weight = 400, TransVW.Config().classification
    # SwinUNETR's deepest features of 32^3 would be a single voxel.
    crop = "32,32,32" if backbone == "unet" else "32,64,32"
    settings = (f"pretrain.crop={crop}", "pretrain.batch_size=4", "method.words=12")
    learned = learn(real_hippocampus, tmp_path, "transvw", backbone, steps, settings)
    classes = learned.method.classify.linear.out_features
    images, targets, words = (torch.cat([batch[key] for batch in learned.crops]) for key in ("image", "target", "word"))
    with torch.no_grad():
        right = [
            learned.method.classify(learned.method.backbone.encode(batch["image"])[-1]).argmax(dim=1) == batch["word"]
            for batch in learned.crops
        ]
    accuracy = float(torch.cat(right).float().mean())
    guesses = (images, targets.mean(), targets.median())
    restoration = min(float((targets - guess).square().mean()) for guess in guesses)
    classification = weight * float(np.log(classes))
    print("\n" + row("transvw", backbone, steps, "accuracy", 1 / classes, float("nan"), accuracy))
    for term, prior in [("classification", classification), ("restoration", restoration)]:
        print(row("transvw", backbone, steps, term, prior, learned.before[term], learned.after[term]))
        assert learned.after[term] < 0.9 * prior
    assert len(words) == 64
    assert accuracy > 2.5 / classes
