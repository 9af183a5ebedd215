"""VoCo: overlaps are those of the crops, the teacher moves, the losses are those of a second implementation in NumPy."""

from collections import Counter
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import map_coordinates

from backbones.unet import UNet
from harness import UserError
from harness.conformance.fixture import PhantomVolume
from methods.voco import VoCo, WholeVolume, cosine, orthogonality, overlap_losses
from tests.methods.parts import generator, images, swin, unet

CELL = (16, 16, 32)  # of a crop of 32 x 64 x 32 in 2 x 4 x 1 cells


def make(backbone=unet, **settings):
    made = VoCo(VoCo.Config(**{"grid": (2, 4, 1), "projection": 32} | settings), backbone())
    made.generator = generator()
    return made


def owners(extent=(32, 64, 32), grid=(2, 4, 1)) -> np.ndarray:
    """The number of the base crop that each voxel lies in. The last axis of the grid counts fastest."""
    index = np.meshgrid(*(np.arange(n) // (n // k) for n, k in zip(extent, grid, strict=True)), indexing="ij")
    return (index[0] * grid[1] + index[1]) * grid[2] + index[2]


# --- base crops, random crops and their overlaps


@pytest.mark.parametrize("grid", [(2, 4, 1), (2, 2, 2), (1, 2, 4)])
def test_overlaps_are_counted_voxels(grid):
    made, image = make(crops=5, grid=grid), images()
    start, overlap = made.draw_crops(image)
    cell = [n // k for n, k in zip((32, 64, 32), grid, strict=True)]
    owner, number = owners(grid=grid), int(np.prod(grid))
    assert overlap.shape == (2, 5, number)
    for n, k in product(range(2), range(5)):
        spans = tuple(slice(int(a), int(a) + edge) for a, edge in zip(start[n, k], cell, strict=True))
        assert owner[spans].shape == tuple(cell)  # inside the image
        counted = np.bincount(owner[spans].ravel(), minlength=number) / np.prod(cell)
        np.testing.assert_allclose(overlap[n, k], counted, atol=1e-6)


def test_random_crops_start_everywhere_and_each_has_its_own_position():
    made, image = make(crops=3000, grid=(2, 4, 1)), images()
    start, _ = made.draw_crops(image)
    for axis, last in enumerate((16, 48, 0)):
        drawn = start[..., axis].flatten().numpy()
        assert set(drawn.tolist()) == set(range(last + 1))
        assert drawn.mean() == pytest.approx(last / 2, abs=1)
    assert not torch.equal(start[0], start[1])
    assert len(start[0].unique(dim=0)) > 100
    assert start.shape == (2, 3000, 3)


def test_views_hold_the_cells_that_overlaps_speak_of():
    """Channel c is 1 in base crop c only: the mean of a view's channels is its share in each base crop."""
    made = make(crops=6)
    image = torch.nn.functional.one_hot(torch.from_numpy(owners()), 8).movedim(-1, 0)[None].float()
    bases = made.cut(image, made._base_origins(image)).mean(dim=(3, 4, 5))
    torch.testing.assert_close(bases[0], torch.eye(8), atol=1e-5, rtol=0)
    start, overlap = made.draw_crops(image)
    shares = made.cut(image, start).mean(dim=(3, 4, 5))
    torch.testing.assert_close(shares, overlap.float(), atol=1e-5, rtol=0)


def test_a_view_at_its_own_size_is_the_crop_itself():
    made, image = make(view=CELL), images(2, channels=2)
    start, _ = made.draw_crops(image)
    views = made.cut(image, start)
    assert views.shape == (2, 2, 2, *CELL)
    for n, k in product(range(2), range(2)):
        x, y, z = (int(v) for v in start[n, k])
        torch.testing.assert_close(views[n, k], image[n, :, x : x + 16, y : y + 16, z : z + 32], atol=1e-5, rtol=0)


def test_a_resized_view_shows_the_whole_crop():
    """On an image of coordinates a view holds the positions of its voxel centres."""
    made = make(view=(32, 48, 16))
    axes = np.meshgrid(np.arange(32.0), np.arange(64.0), np.arange(32.0), indexing="ij")
    image = torch.from_numpy(np.stack(axes)[None]).float()
    view = made.cut(image, torch.tensor([[[8, 24, 0]]]))[0, 0].numpy()
    for axis, (first, edge, size) in enumerate(zip((8, 24, 0), CELL, (32, 48, 16), strict=True)):
        wanted = first - 0.5 + (np.arange(size) + 0.5) * edge / size
        measured = np.moveaxis(view[axis], axis, 0).reshape(size, -1).mean(axis=1)
        np.testing.assert_allclose(measured, np.clip(wanted, 0, (31, 63, 31)[axis]), atol=1e-3)


def test_view_is_the_cell_rounded_up_to_strides():
    assert make()._view((32, 64, 32)) == CELL
    assert make(swin)._view((32, 64, 32)) == (32, 32, 32)
    assert make(grid=(4, 4, 1))._view((96, 96, 96)) == (32, 32, 96)
    assert make(view=(64, 64, 64))._view((384, 384, 96)) == (64, 64, 64)


# --- the sample


def test_a_sample_is_the_whole_volume_resized():
    volume, size = PhantomVolume(0, 2, (20, 30, 24)), (32, 24, 24)
    source = WholeVolume(volume)
    image = source.sample(size, np.random.default_rng(0))["image"]
    np.testing.assert_array_equal(image, source.sample(size, np.random.default_rng(1))["image"])
    positions = np.meshgrid(
        *((np.arange(b) + 0.5) * a / b - 0.5 for a, b in zip(volume.shape, size, strict=True)), indexing="ij"
    )
    wanted = np.stack([map_coordinates(channel, positions, order=1, mode="nearest") for channel in volume.image])
    np.testing.assert_allclose(image, wanted, atol=1e-5)
    assert image.dtype == np.float32


def test_sources_are_whole_volumes_unless_crops_are_asked_for():
    volumes = [PhantomVolume(number, 1, (40, 72, 40)) for number in range(2)]
    assert make().prepare(volumes, None) == [WholeVolume(volume) for volume in volumes]
    assert make(volume="crop").prepare(volumes, None) is volumes


def test_presets_divide_the_volume_into_cubes_and_paper_is_as_released():
    for preset in ("demo", "small", "paper"):
        values = VoCo.presets[preset]
        grid = values.get("method.grid", VoCo.Config().grid)
        cell = {edge // number for edge, number in zip(values["pretrain.crop"], grid, strict=True)}
        assert len(cell) == 1, preset
    assert cell == {96}
    assert values["method.view"] == (64, 64, 64)
    config = VoCo.Config()
    assert (config.grid, config.crops, config.momentum, config.projection) == ((4, 4, 1), 2, 0.9, 2048)
    assert (config.volume, config.augment) == ("whole", True)


# --- the augmentation


def outcomes(view: np.ndarray) -> dict[bytes, float]:
    """Probability of each array that flips (0.2 per axis), then turns in xy (0.2, then 1 to 3 alike) make of a view."""
    chances: Counter[bytes] = Counter()
    for flips in product((False, True), repeat=3):
        flipped = np.flip(view, [axis for axis in range(3) if flips[axis]])
        for number in range(4):
            chance = np.prod([0.2 if flip else 0.8 for flip in flips]) * (0.8 if number == 0 else 0.2 / 3)
            chances[np.rot90(flipped, number, (0, 1)).astype(np.int16).tobytes()] += chance
    return chances


def test_flips_and_turns_have_the_released_distribution():
    view = np.arange(32, dtype=np.float32).reshape(4, 4, 2)
    views = torch.from_numpy(view).expand(40, 100, 1, 4, 4, 2)
    made = make()
    augmented = made.augment(views)
    # The shift of the intensities is taken off again.
    augmented = augmented - (augmented.mean(dim=(2, 3, 4, 5), keepdim=True) - view.mean())
    counted = Counter(np.round(one[0].numpy()).astype(np.int16).tobytes() for one in augmented.flatten(0, 1))
    chances = outcomes(view)
    assert set(counted) <= set(chances)
    for outcome, chance in chances.items():
        spread = np.sqrt(4000 * chance * (1 - chance))
        assert abs(counted[outcome] - 4000 * chance) < 4.5 * spread


def test_the_shift_of_intensities_has_the_released_distribution():
    shift = make().augment(torch.full((40, 100, 2, 4, 4, 2), 0.5)) - 0.5
    offsets = shift[:, :, 0, 0, 0, 0]
    torch.testing.assert_close(shift, offsets[..., None, None, None, None].expand_as(shift))
    drawn = offsets[offsets.abs() > 1e-6].numpy()
    assert len(drawn) / 4000 == pytest.approx(0.1, abs=0.02)
    assert np.abs(drawn).max() <= 0.1
    np.testing.assert_allclose(np.quantile(drawn, (0.1, 0.5, 0.9)), (-0.08, 0, 0.08), atol=0.02)


def test_crops_are_augmented_one_by_one_and_only_if_asked_for():
    made, views = make(), torch.rand(3, 50, 1, 4, 4, 2, generator=generator(1))
    changed = (made.augment(views) != views).flatten(2).any(dim=2)
    assert 0 < changed.float().mean() < 1
    assert not torch.equal(changed[0], changed[1])
    for augment in (True, False):
        made, image = make(augment=augment), images()
        seen = encoded(made)
        made({"image": image})
        plain = replay(made, image)[0]
        assert torch.allclose(seen[0], plain.flatten(0, 1)) is not augment


# --- the losses


def encoded(made) -> list[torch.Tensor]:
    """Collects what the student's and the teacher's networks are given, in the order of the calls."""
    seen: list[torch.Tensor] = []
    for network in (made.backbone, made.teacher_backbone):
        inner = network.encode
        network.encode = lambda image, inner=inner: seen.append(image) or inner(image)
    return seen


def replay(made, image):
    """The views without augmentation, and the overlaps, that `forward` draws first from a fresh generator."""
    made.generator = generator()
    start, overlap = made.draw_crops(image)
    views = torch.cat([made.cut(image, made._base_origins(image)), made.cut(image, start)], dim=1)
    return views, overlap.numpy()


def numpy_terms(student: np.ndarray, teacher: np.ndarray, overlap: np.ndarray, bases: int) -> dict[str, float]:
    """The three losses from codes (N, bases + crops, D) and overlaps, one pair at a time."""

    def likeness(a, b):
        return max(0.0, float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)))

    near, apart, orthogonal = [], [], []
    for n in range(len(student)):
        sums = np.zeros(4)
        for k, b in np.ndindex(overlap.shape[1:]):
            y = overlap[n, k, b]
            both = likeness(student[n, bases + k], teacher[n, b]) + likeness(teacher[n, bases + k], student[n, b])
            if y > 0:
                sums[:2] += -y * np.log(1 - abs(y - both / 2) + 1e-6), y
            else:
                sums[2:] += (both / 2) ** 2, 1
        near.append(sums[0] / sums[1])
        apart.append(sums[2] / sums[3])
        pairs = [likeness(student[n, i], student[n, j]) ** 2 for i in range(bases) for j in range(i)]
        orthogonal.append(np.mean(pairs))
    return {"overlap": np.mean(near), "apart": np.mean(apart), "orthogonal": np.mean(orthogonal)}


@pytest.mark.parametrize("backbone", [unet, swin])
def test_the_terms_are_those_of_a_second_implementation(backbone):
    made, image = make(backbone, augment=False), images(3)
    views, _ = replay(made, image)
    with torch.no_grad():
        # A teacher of its own, since at the start it is the student's copy; codes of mean 0, so that many cosines are negative.
        for parameter in (*made.teacher_backbone.parameters(), *made.teacher_projector.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator(2)))
        for projector, network in (
            (made.projector, made.backbone),
            (made.teacher_projector, made.teacher_backbone),
        ):
            projector[-1].bias.sub_(made._encode(views.flatten(0, 1), network, projector).mean(dim=0))
    made.generator = generator()
    terms = made({"image": image})
    views, overlap = replay(made, image)
    codes = []
    for network, projector in (
        (made.backbone, made.projector),
        (made.teacher_backbone, made.teacher_projector),
    ):
        pyramid = network.encode(views.flatten(0, 1))
        pooled = [features.flatten(2).mean(dim=2) for features in pyramid if features.shape[2:] != views.shape[3:]]
        codes.append(projector(torch.cat(pooled, dim=1)).detach().double().view(3, 10, -1).numpy())
    wanted = numpy_terms(*codes, overlap, 8)
    assert not np.allclose(*codes)
    assert set(terms) == set(wanted)
    for name, value in wanted.items():
        assert terms[name].item() == pytest.approx(value, rel=2e-3), name
    # The terms depend on the teacher and on the cut-off of negative cosines, so the comparison can fail.
    assert numpy_terms(codes[0], codes[0], overlap, 8)["overlap"] != pytest.approx(wanted["overlap"], rel=0.01)
    normed = codes[0] / np.linalg.norm(codes[0], axis=-1, keepdims=True)
    assert (normed[:, :8] @ normed[:, 8:].transpose(0, 2, 1)).min() < -0.3


def test_gradients_reach_random_and_base_crops_of_the_student(monkeypatch):
    """The gradient of the first two terms by every code, against finite differences of the second implementation."""
    made, image, rng = make(projection=4, augment=False), images(), np.random.default_rng(0)
    codes, others = rng.standard_normal((2, 2, 10, 4))
    student = torch.tensor(codes.reshape(20, 4), dtype=torch.float32, requires_grad=True)
    monkeypatch.setattr(made.projector, "forward", lambda pooled: student)
    monkeypatch.setattr(made.teacher_projector, "forward", lambda pooled: torch.tensor(others.reshape(20, 4)))
    terms = made({"image": image})
    (terms["overlap"] + terms["apart"]).backward()
    overlap = replay(made, image)[1]

    def loss(values):
        terms = numpy_terms(values, others, overlap, 8)
        return terms["overlap"] + terms["apart"]

    slopes = np.zeros_like(codes)
    for index in np.ndindex(codes.shape):
        step = np.zeros_like(codes)
        step[index] = 1e-4
        slopes[index] = (loss(codes + step) - loss(codes - step)) / 2e-4
    assert student.grad is not None
    np.testing.assert_allclose(student.grad.reshape(2, 10, 4), slopes, atol=2e-3)
    assert np.abs(slopes[:, :8]).max() > 0.02
    assert np.abs(slopes[:, 8:]).max() > 0.02


def test_cosine_is_normalised_and_keeps_its_sign():
    a, b = torch.randn(2, 3, 5, generator=generator()), torch.randn(2, 4, 5, generator=generator(1))
    wanted = np.einsum("nid,njd->nij", a, b)
    wanted /= np.linalg.norm(a, axis=2)[:, :, None] * np.linalg.norm(b, axis=2)[:, None]
    np.testing.assert_allclose(cosine(a, b), wanted, atol=1e-6)
    np.testing.assert_allclose(cosine(7 * a, b / 3), wanted, atol=1e-6)


@pytest.mark.parametrize("total", [1.0, 0.4, 2.5])
def test_losses_are_those_of_the_released_definition(total):
    """Overlaps that do not sum to 1, so that the division by their sum shows; samples that differ in it."""
    overlap = np.array([[[0.6, 0.4, 0.0, 0.0], [0.1, 0.0, 0.0, 0.2]], [[0.3, 0.2, 0.1, 0.4], [0.0, 0.0, 0.0, 0.5]]])
    overlap *= np.array([1.0, min(total, 1.0)])[:, None, None] * min(total, 1.0)
    likeness = np.random.default_rng(0).random((2, 2, 4))
    near, apart = overlap_losses(torch.from_numpy(overlap), torch.from_numpy(likeness))
    pairs = -overlap * np.log(1 - np.abs(overlap - likeness) + 1e-6)
    wanted = np.mean([pairs[n].sum() / (overlap[n].sum() + 1e-6) for n in range(2)])
    assert near.item() == pytest.approx(wanted, rel=1e-6)
    squares = [likeness[n][overlap[n] == 0] ** 2 for n in range(2)]
    assert apart.item() == pytest.approx(np.mean([values.mean() for values in squares]), rel=1e-5)


def test_losses_separate_overlaps():
    overlap = torch.tensor([[[0.75, 0.25, 0.0, 0.0]]])
    right, flat, wrong = overlap.clone(), torch.full_like(overlap, 0.25), overlap.flip(-1)
    losses = [sum(overlap_losses(overlap, likeness)).item() for likeness in (right, flat, wrong)]
    assert losses[0] == pytest.approx(0, abs=1e-4)
    assert losses[0] < losses[1] < losses[2]


def test_bases_are_pushed_apart():
    assert orthogonality(torch.eye(4)[None]).item() == pytest.approx(0, abs=1e-6)
    assert orthogonality(torch.ones(1, 4, 8)).item() == pytest.approx(1)
    opposed = torch.stack([torch.ones(8), -torch.ones(8)])[None]
    assert orthogonality(opposed).item() == 0
    halved = torch.tensor([[[1.0, 0.0], [1.0, 1.0], [0.0, 2.0]]])  # cosines sqrt(1/2), 0, sqrt(1/2)
    assert orthogonality(halved).item() == pytest.approx((0.5 + 0.5 + 0) / 3)
    assert orthogonality(torch.cat([halved, torch.ones(1, 3, 2)])).item() == pytest.approx((1 / 3 + 1) / 2)


def test_only_the_first_of_two_base_crops_gets_a_gradient_from_their_pair():
    """As released: the later one is detached, so the last one gets none."""
    bases = torch.rand(1, 3, 8, generator=generator()).requires_grad_()
    orthogonality(bases).backward()
    assert bases.grad is not None
    assert bases.grad[0, 2].abs().max() == 0
    alone = torch.stack([bases.detach()[0, 1], bases.detach()[0, 2]])[None].requires_grad_()
    orthogonality(alone).backward()
    assert alone.grad is not None
    # The middle one is first of one pair of three: its gradient is a third of that of this pair alone.
    torch.testing.assert_close(bases.grad[0, 1], alone.grad[0, 0] / 3)
    assert bases.grad[0, 0].any()


# --- the teacher


def test_the_teacher_starts_as_a_copy_and_forward_does_not_move_it():
    made = make()
    before = [parameter.clone() for parameter in made.teacher_projector.parameters()]
    made({"image": images()})
    for parameter, first, student in zip(
        made.teacher_projector.parameters(), before, made.projector.parameters(), strict=True
    ):
        assert torch.equal(parameter, first)
        assert torch.equal(parameter, student)
    encoder = dict(made.backbone.named_parameters())
    assert all(torch.equal(value, encoder[name]) for name, value in made.teacher_backbone.named_parameters())


@pytest.mark.parametrize("momentum", [0.9, 0.5])
def test_the_teacher_follows_the_student_with_momentum(momentum):
    """A port without a moving teacher has a flat loss (MIC-DKFZ/nnssl#22)."""
    made = make(momentum=momentum)
    made.backbone.register_buffer("statistic", torch.full((2,), 3.0))
    made.teacher_backbone.register_buffer("statistic", torch.zeros(2))
    encoder = dict(made.backbone.named_parameters())
    with torch.no_grad():
        for parameter in (*made.backbone.parameters(), *made.projector.parameters()):
            parameter.copy_(torch.randn(parameter.shape, generator=generator(3)))
    before = {name: value.clone() for name, value in made.teacher_backbone.named_parameters()}
    heads = [value.clone() for value in made.teacher_projector.parameters()]
    made.after_step(1)
    for name, value in made.teacher_backbone.named_parameters():
        torch.testing.assert_close(value, momentum * before[name] + (1 - momentum) * encoder[name])
    students = list(made.projector.parameters())
    for value, first, student in zip(made.teacher_projector.parameters(), heads, students, strict=True):
        torch.testing.assert_close(value, momentum * first + (1 - momentum) * student)
    assert torch.equal(made.teacher_backbone.get_buffer("statistic"), torch.full((2,), 3.0))


def test_the_teacher_gets_no_gradient_and_no_decoder():
    made = make()
    sum(made({"image": images()}).values()).backward()
    teacher = [p for name, p in made.named_parameters() if name.startswith("teacher")]
    assert teacher
    assert all(p.grad is None and not p.requires_grad for p in teacher)
    assert not any("upcat" in name for name, _ in made.teacher_backbone.named_parameters())
    trained = [*made.projector.parameters(), made.backbone.get_parameter("conv_0.conv_0.conv.weight")]
    assert all(p.grad is not None and p.grad.any() for p in trained)


def test_student_and_teacher_see_the_same_augmented_views():
    made = make()
    seen = encoded(made)
    made({"image": images()})
    student, teacher = seen
    assert torch.equal(student, teacher)
    assert len(student) == 2 * (8 + 2)


def test_dropout_that_the_user_sets_acts_in_the_student_only():
    torch.manual_seed(0)
    backbone = UNet(UNet.Config(features=(4, 4, 8, 8, 16), dropout=0.5), in_channels=1)
    made = VoCo(VoCo.Config(grid=(2, 4, 1), projection=32), backbone).train()
    views = images(2)
    differ = [
        not torch.equal(net.encode(views)[-1], net.encode(views)[-1]) for net in (backbone, made.teacher_backbone)
    ]
    assert differ == [True, False]


def test_codes_are_the_means_of_the_levels_that_are_coarser_than_the_image():
    made = make(swin)
    assert made.projector[0].in_features == 12 + 24 + 48 + 96 + 192
    made = make()
    assert made.projector[0].in_features == 4 + 8 + 8 + 16
    kinds = [type(layer).__name__ for layer in made.projector]
    assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear", "BatchNorm1d", "ReLU", "Linear"]
    norms = [layer for layer in made.projector if isinstance(layer, torch.nn.BatchNorm1d)]
    assert all(not norm.affine and not norm.track_running_stats for norm in norms)


# --- training and settings


def test_training_makes_likeness_follow_overlap():
    """On one fixed batch the overlap loss must come down from its start, or the task cannot be learned."""
    made, image = make(), images()
    optimizer = torch.optim.Adam([p for p in made.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(25):
        made.generator = generator()
        terms = made({"image": image})
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
        made.after_step(step)
        losses.append(terms["overlap"].item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("backbone", "settings", "says"),
    [
        (unet, {"grid": (3, 4, 1)}, "does not divide the crop"),
        (unet, {"grid": (1, 1, 1)}, "one base crop"),
        (unet, {"view": (16, 16, 24)}, "not a multiple of the deepest stride"),
        (unet, {"view": (16, 16, 16)}, "at least twice the stride"),
        (unet, {"view": (16, 32, 32)}, r"must be equal: set method\.view to such a size, or method\.augment=false"),
    ],
)
def test_settings_that_do_not_fit_are_refused(backbone, settings, says):
    with pytest.raises(UserError, match=says):
        make(backbone, **settings).check((32, 64, 32), 2)


def test_settings_that_fit_are_taken():
    make().check((32, 64, 32), 1)
    make(view=(16, 32, 32), augment=False).check((32, 64, 32), 2)
