"""Swin UNETR's pretext tasks: turns are labelled right, boxes cover what they should, terms are those of a NumPy version."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.ndimage import label as components

from harness import UserError, any_box, random_integers
from methods.swinunetr_ssl import SwinUNETRSSL, plane, rotate
from tests.methods.parts import generator, images, swin, unet
from tests.methods.pretext import learn


def make(backbone=unet, **settings):
    made = SwinUNETRSSL(SwinUNETRSSL.Config(**settings), backbone())
    made.generator = generator()
    return made


def next_turns(made, number) -> np.ndarray:
    """The turns that the next forward draws, first of all."""
    state = made.generator.get_state()
    turns = random_integers(0, 3, (number,), torch.device("cpu"), made.generator)
    made.generator.set_state(state)
    return turns.numpy()


def turned(image: np.ndarray, turns: np.ndarray, axes=(1, 3)) -> np.ndarray:
    """The two views of each crop, one after the other, by NumPy. `axes` of (C, x, y, z)."""
    return np.stack([np.rot90(image[row // 2], number, axes) for row, number in enumerate(turns)])


# --- rotation


def test_rotation_is_the_labelled_number_of_quarter_turns():
    image = images(4, channels=2)
    views = rotate(image, torch.tensor([2, 0, 3, 1]))
    for row, number in enumerate((2, 0, 3, 1)):
        np.testing.assert_array_equal(views[row], np.rot90(image[row], number, (1, 3)))


@pytest.mark.parametrize(("crop", "axes"), [((32, 32, 64), (0, 1)), ((32, 64, 32), (0, 2)), ((64, 32, 32), (1, 2))])
def test_rotation_is_in_a_plane_of_equal_edges(crop, axes):
    assert plane(crop) == axes
    image = images(1, size=crop)
    wanted = np.rot90(image[0], 1, (axes[0] + 1, axes[1] + 1))
    np.testing.assert_array_equal(rotate(image, torch.tensor([1]))[0], wanted)


def test_a_cube_turns_about_the_last_axis_as_in_the_paper():
    assert plane((32, 32, 32)) == (0, 1)


def test_a_crop_of_three_edges_cannot_be_turned():
    with pytest.raises(UserError, match="two edges must be equal"):
        make().check((32, 64, 96), 2)


def test_every_number_of_turns_is_equally_likely():
    made, image = make(inpainting=0, contrastive=0), images(200, size=(32, 16, 16))
    kept: list[torch.Tensor] = []
    made.hide = lambda views: kept.append(views) or views
    made({"image": image})
    views = kept[0].numpy()
    labels = [
        [np.array_equal(view, np.rot90(image[row // 2], n, (2, 3))) for n in range(4)] for row, view in enumerate(views)
    ]
    counts = np.sum(labels, axis=0)
    assert counts.sum() == 400
    assert counts.min() > 70
    alike = np.mean([labels[2 * crop] == labels[2 * crop + 1] for crop in range(200)])
    assert 0.15 < alike < 0.35  # the two views of a crop have turns of their own


# --- boxes


def boxes_of(monkeypatch, extent, number=400, **settings) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First voxel and size of every box, (number, boxes, 3), and what is cut out, (number, x, y, z)."""
    drawn: list[np.ndarray] = []

    def keep(start, stop, extent):
        drawn.extend((start.numpy(), stop.numpy()))
        return any_box(start, stop, extent)

    monkeypatch.setattr("methods.swinunetr_ssl.any_box", keep)
    hidden = make(**settings).hide(torch.full((number, 1, *extent), 2.0))
    start, stop = drawn
    return start, stop - start, (hidden != 2).numpy()[:, 0]


def test_boxes_have_the_released_edges_and_lie_anywhere(monkeypatch):
    extent = (40, 60, 80)
    starts, sizes, _ = (values[:, 0] for values in boxes_of(monkeypatch, extent, boxes=1))
    for axis, length in enumerate(extent):
        low, high = length // 20, length // 4
        assert set(sizes[:, axis]) == set(range(low, high + 1))
        assert sizes[:, axis].mean() == pytest.approx((low + high) / 2, rel=0.08)
        place = (starts[:, axis] + sizes[:, axis] - 1) / (length + sizes[:, axis] - 2)  # from 0 to 1
        np.testing.assert_allclose(np.quantile(place, (0, 0.25, 0.5, 0.75, 1)), (0, 0.25, 0.5, 0.75, 1), atol=0.08)
        assert place.min() >= 0
        assert place.max() <= 1
    for a, b in pairwise(range(3)):
        assert abs(np.corrcoef(sizes[:, a], sizes[:, b])[0, 1]) < 0.2
        assert abs(np.corrcoef(starts[:, a], starts[:, b])[0, 1]) < 0.2


def test_what_is_cut_out_is_the_union_of_the_boxes(monkeypatch):
    starts, sizes, cut = boxes_of(monkeypatch, (32, 24, 40), 3)
    for view in range(3):
        painted = np.zeros((32, 24, 40), bool)
        for start, size in zip(starts[view], sizes[view], strict=True):
            painted[tuple(slice(max(0, a), max(0, a + s)) for a, s in zip(start, size, strict=True))] = True
        np.testing.assert_array_equal(cut[view], painted)
    shares = (sizes / (sizes + np.array([32, 24, 40]) - 1)).prod(axis=2)
    expected = 1 - np.cumprod(1 - shares, axis=1)
    for view in range(3):
        used = int((sizes[view] > 0).all(axis=1).sum())
        assert (sizes[view][:used] > 0).all()
        assert expected[view, used - 1] >= 0.3 > expected[view, used - 2]


def test_settings_change_the_edges(monkeypatch):
    _, sizes, _ = boxes_of(monkeypatch, (40, 40, 40), 100, boxes=1, shortest=0.5, longest=0.6)
    assert sizes.min() == 20
    assert sizes.max() == 24


@pytest.mark.parametrize(("share", "boxes"), [(0.3, 256), (0.1, 256), (0.6, 1000)])
def test_cut_out_covers_the_published_share(share, boxes):
    made, image = make(cut_out=share, boxes=boxes), images(48, size=(48, 48, 48))
    cut = (made.hide(image) != image).float()[:, 0]
    of_view = cut.flatten(1).mean(dim=1)
    assert of_view.mean() == pytest.approx(share, abs=0.01)
    assert 0 < of_view.std() < 0.03  # each view has its own boxes
    corner, middle = cut[:, :12, :12, :12].mean(), cut[:, 18:30, 18:30, 18:30].mean()
    assert corner == pytest.approx(share, abs=0.12)  # no part of a crop is spared
    assert middle == pytest.approx(share, abs=0.12)


def test_boxes_hold_uniform_noise_in_all_channels():
    image = torch.full((8, 2, 32, 32, 32), 2.0)
    hidden = make().hide(image)
    mask = hidden != 2
    assert torch.equal(mask[:, 0], mask[:, 1])
    noise = hidden[mask].numpy()
    np.testing.assert_allclose(np.quantile(noise, (0, 0.25, 0.5, 0.75, 1)), (0, 0.25, 0.5, 0.75, 1), atol=0.01)
    one, two = (hidden[:, channel][mask[:, 0]].numpy() for channel in range(2))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.05
    assert not torch.equal(mask[0], mask[1])


def test_several_boxes_are_cut_out():
    hidden = make().hide(torch.full((4, 1, 48, 48, 48), 2.0))
    # At most a quarter of each edge: 1/64 of the volume. So 30 % take at least 20 boxes, some of which touch.
    assert all(components((view[0] != 2).numpy())[1] >= 2 for view in hidden)
    assert (make(boxes=3).hide(torch.full((4, 1, 48, 48, 48), 2.0)) != 2).float().mean() <= 3 / 64


# --- terms


def info_nce(codes: np.ndarray, temperature: float) -> float:
    """Rows 2i and 2i + 1 are the views of crop i; all others are negatives."""
    normed = codes / np.linalg.norm(codes, axis=1, keepdims=True)
    likeness = np.exp(normed @ normed.T / temperature)
    losses = []
    for row in range(len(codes)):
        others = [other for other in range(len(codes)) if other != row]
        losses.append(-np.log(likeness[row, row ^ 1] / likeness[row, others].sum()))
    return float(np.mean(losses))


@pytest.mark.parametrize("backbone", [unet, swin])
@pytest.mark.parametrize("codes", ["mean", "tokens"])
def test_the_terms_are_those_of_a_second_implementation(backbone, codes):
    made, image = make(backbone, inpainting=2, rotation=3, contrastive=5, temperature=0.3, codes=codes), images(3)
    turns = next_turns(made, 6)
    assert len(set(turns.tolist())) > 1
    views = turned(image.numpy(), turns)
    given: list[torch.Tensor] = []
    inner = made.backbone.encode
    made.backbone.encode = lambda seen: given.append(seen) or inner(seen)
    terms = made({"image": image})
    # The network sees the turned views, less than a third of whose voxels are changed.
    same = given[0].numpy() == views
    assert 0.6 < same.mean() < 0.85
    assert (same.reshape(6, -1).mean(axis=1) < 1).all()
    deepest = inner(given[0])[-1]
    restored = made.restore(deepest).detach().numpy()
    flat = deepest.detach().flatten(2).numpy()
    of_turn, of_contrast = (flat[..., 0], flat[..., 1]) if codes == "tokens" else (flat.mean(axis=2),) * 2
    logits = of_turn @ made.turn.weight.detach().numpy().T + made.turn.bias.detach().numpy()
    exponents = np.exp(logits)
    cross_entropy = -np.log(exponents[np.arange(6), turns] / exponents.sum(axis=1)).mean()
    projected = of_contrast @ made.project.weight.detach().numpy().T + made.project.bias.detach().numpy()
    wanted = {
        "inpainting": 2 * np.abs(restored - views).mean(),
        "rotation": 3 * cross_entropy,
        "contrastive": 5 * info_nce(projected, 0.3),
    }
    assert set(terms) == set(wanted)
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=1e-4), name


def test_restoration_is_compared_with_the_turned_view_in_every_voxel(monkeypatch):
    made, image = make(), images()
    views = turned(image.numpy(), next_turns(made, 4))
    assert not np.array_equal(views, image.repeat_interleave(2, dim=0).numpy())
    monkeypatch.setattr(made.restore, "forward", lambda deepest: torch.from_numpy(views))
    assert made({"image": image})["inpainting"].item() == 0
    made.generator = generator()
    monkeypatch.setattr(made.restore, "forward", lambda deepest: torch.from_numpy(views + 0.25))
    assert made({"image": image})["inpainting"].item() == pytest.approx(0.25)


def test_a_network_that_knows_the_turn_has_no_rotation_loss(monkeypatch):
    made = make()
    turns = torch.from_numpy(next_turns(made, 4))
    monkeypatch.setattr(made.turn, "forward", lambda codes: torch.nn.functional.one_hot(turns, 4).float() * 100)
    assert made({"image": images()})["rotation"].item() == pytest.approx(0, abs=1e-6)
    monkeypatch.setattr(made.turn, "forward", lambda codes: torch.zeros(4, 4))
    assert made({"image": images()})["rotation"].item() == pytest.approx(np.log(4))


def test_views_of_one_crop_attract_and_those_of_others_repel(monkeypatch):
    made = make()
    alike = torch.eye(2).repeat_interleave(2, dim=0)
    monkeypatch.setattr(made.project, "forward", lambda codes: alike)
    near = made({"image": images()})["contrastive"].item()
    assert near == pytest.approx(-np.log(np.exp(2) / (np.exp(2) + 2)))
    monkeypatch.setattr(made.project, "forward", lambda codes: torch.eye(2).repeat(2, 1))
    assert made({"image": images()})["contrastive"].item() > near + 1


@pytest.mark.parametrize("off", ["inpainting", "rotation", "contrastive"])
def test_every_term_can_be_switched_off_and_leaves_no_dead_parameters(off):
    made = make(swin, **{off: 0})
    terms = made({"image": images()})
    assert set(terms) == {"inpainting", "rotation", "contrastive"} - {off}
    sum(terms.values()).backward()
    assert all(p.grad is not None for n, p in made.named_parameters() if not n.startswith("backbone"))


@pytest.mark.parametrize("term", ["inpainting", "rotation", "contrastive"])
def test_every_term_alone_trains_the_encoder(term):
    made = make(**{other: 0 for other in ("inpainting", "rotation", "contrastive") if other != term})
    (value,) = made({"image": images()}).values()
    value.backward()
    weights = [
        p for name, p in made.backbone.named_parameters() if name.startswith("down_3") and name.endswith("weight")
    ]
    assert weights
    assert all(p.grad is not None and p.grad.any() for p in weights)


def test_both_views_get_a_gradient_from_the_contrast(monkeypatch):
    made = make(inpainting=0, rotation=0)
    codes = torch.randn(4, 8, generator=generator()).requires_grad_()
    monkeypatch.setattr(made.project, "forward", lambda read: codes)
    made({"image": images()})["contrastive"].backward()
    assert codes.grad is not None
    assert codes.grad.abs().amax(dim=1).min() > 0.01


def test_the_picture_shows_a_turned_view_its_boxes_and_what_is_restored():
    made, image = make(), images()
    turns = next_turns(made, 2)
    shown = made.show({"image": image})
    assert list(shown) == ["image", "what it sees", "what it restores"]
    np.testing.assert_array_equal(shown["image"], np.stack([np.rot90(image[n], turns[n], (1, 3)) for n in range(2)]))
    assert 0.2 < (shown["image"] != shown["what it sees"]).float().mean() < 0.4
    restored = made.restore(made.backbone.encode(shown["what it sees"])[-1])
    torch.testing.assert_close(shown["what it restores"], restored)
    assert list(make(inpainting=0).show({"image": image})) == ["image", "what it sees"]


def test_published_weights_and_sizes():
    config = SwinUNETRSSL.Config()
    assert (config.inpainting, config.rotation, config.contrastive, config.temperature) == (1, 1, 1, 0.5)
    assert (config.cut_out, config.shortest, config.longest, config.projection) == (0.3, 0.05, 0.25, 512)
    assert make().project.out_features == 512


@pytest.mark.parametrize(
    ("settings", "crop", "batch", "says"),
    [
        ({}, (32, 64, 32), 1, "no negatives"),
        ({"inpainting": 0, "rotation": 0, "contrastive": 0}, (32, 64, 32), 2, "every loss term switched off"),
        ({"codes": "tokens"}, (16, 16, 16), 2, "needs two tokens"),
        (
            {"cut_out": 0.6},
            (96, 96, 96),
            2,
            r"method\.boxes=256 is too few: about 4\d\d boxes cover method\.cut_out=0\.6",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, crop, batch, says):
    with pytest.raises(UserError, match=says):
        make(**settings).check(crop, batch)


def test_one_crop_is_enough_without_contrast():
    make(contrastive=0).check((32, 64, 32), 1)
    make(codes="tokens").check((16, 32, 16), 2)


# --- what is learned


# What was below its prior, or better than chance, after these few steps. docs/methods/swinunetr_ssl.md has the numbers.
LEARNED = {
    "unet": {"inpainting", "rotation", "rotation accuracy"},
    "swinunetr": {"rotation", "rotation accuracy", "contrastive", "retrieval accuracy"},
}


@torch.no_grad()
def measure(method, crops) -> dict[str, float]:
    """Rotation and retrieval accuracy on held-out crops, and the error of the median over all views at every voxel."""
    method.generator.manual_seed(0)
    all_views, hits, partners = [], [], []
    for batch in crops:
        twice = batch["image"].repeat_interleave(2, dim=0)
        turns = random_integers(0, 3, (len(twice),), twice.device, method.generator)
        views = rotate(twice, turns)
        of_turn, of_contrast = method.read_codes(method.backbone.encode(method.hide(views))[-1])
        hits.append((method.turn(of_turn).argmax(dim=1) == turns).float())
        normed = torch.nn.functional.normalize(method.project(of_contrast), dim=1)
        likeness = (normed @ normed.T).fill_diagonal_(-2)
        partners.append(
            (likeness.argmax(dim=1) == torch.arange(len(twice)) + 1 - 2 * (torch.arange(len(twice)) % 2)).float()
        )
        all_views.append(views)
    stacked = torch.cat(all_views)
    return {
        "rotation accuracy": float(torch.cat(hits).mean()),
        "retrieval accuracy": float(torch.cat(partners).mean()),
        "median": float((stacked - stacked.median(dim=0).values).abs().mean()),
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)  # four to six minutes on a core of its own
@pytest.mark.parametrize(("backbone", "steps"), [("unet", 600), ("swinunetr", 300)])
def test_the_three_tasks_are_learned_on_real_crops(real_hippocampus, tmp_path, backbone, steps):
    learned = learn(real_hippocampus, tmp_path, "swinunetr_ssl", backbone, steps)
    codes = 2 * len(learned.crops[0]["image"])
    measured = measure(learned.method, learned.crops)
    # What ignores the image reaches: the best fixed image, four turns alike, all other codes alike.
    priors = {"inpainting": measured["median"], "rotation": np.log(4), "contrastive": np.log(codes - 1)}
    chances = {"rotation accuracy": 1 / 4, "retrieval accuracy": 1 / (codes - 1)}
    row = f"\n| swinunetr_ssl | {backbone} | {steps} |"
    for term, prior in priors.items():
        print(f"{row} {term} | {prior:.4f} | {learned.before[term]:.4f} | {learned.after[term]:.4f} |", end="")
    for metric, chance in chances.items():
        print(f"{row} {metric} | {chance:.3f} | | {measured[metric]:.3f} |", end="")
    print()
    better = {term for term, prior in priors.items() if learned.after[term] < prior}
    better |= {metric for metric, chance in chances.items() if measured[metric] > chance + 0.1}
    assert better >= LEARNED[backbone]
    missing = sorted({*priors, *chances} - better)
    if missing:
        pytest.xfail(f"after {steps} steps on {backbone} no better than what ignores the image: {', '.join(missing)}")
