"""DINO: what teacher and student see, the loss between them, centring, schedules; and that it does not collapse."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import erf

from harness import UserError
from harness.api.registry import Registry
from harness.conformance.consistency import check_micro_batches
from harness.conformance.fixture import MethodFixture
from methods.dino import DINO, Head, MultiCrop, distillation, sinkhorn, teacher_momentum
from tests.methods.parts import generator, images, swin, unet
from tests.methods.test_simclr import Ramp

SMALL = {"local_crops": 3, "hidden": 16, "bottleneck": 8, "prototypes": 12, "local_view": (16, 32, 16)}


OFF = {"flip": (0, 0, 0), "jitter": 0, "gamma": 0, "blur": (0, 0, 0)}


GLOBAL, LOCAL = (0.4, 1.0), (0.05, 0.4)


def make(backbone=unet, **settings):
    made = DINO(DINO.Config(**SMALL | settings), backbone())
    made.generator, made.steps = generator(), 100
    return made


def crops(n=2, local=3):
    batch = {"image": images(n), "second": images(n).flip(2) * 0.5}
    return batch | {"local": torch.rand(n, local, 1, 16, 32, 16, generator=generator(5))}


def softmax(values):
    values = np.exp(values - values.max(axis=-1, keepdims=True))
    return values / values.sum(axis=-1, keepdims=True)


def different(module, scale=0.3):
    """Give a module other weights."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator(7)))


def numpy_loss(targets, student, temperature):
    """Equation 3, pair by pair."""
    losses = []
    for n in range(len(targets)):
        for t in range(2):
            for v in range(student.shape[1]):
                if v != t:
                    losses.append(-(targets[n, t] * np.log(softmax(student[n, v] / temperature))).sum())
    return np.mean(losses)


@pytest.mark.parametrize("views", [2, 5])
@pytest.mark.parametrize("temperature", [0.1, 0.3])
def test_the_loss_is_equation_3(views, temperature):
    targets = torch.randn(3, 2, 6, generator=generator()).mul(2).softmax(dim=-1)
    student = torch.rand(3, views, 6, generator=generator(1)) * 2 - 1
    terms = distillation(targets, student, temperature)
    p = targets.double().numpy()
    entropy = -(p * np.log(p)).sum(axis=-1).mean()
    assert terms["entropy"].item() == pytest.approx(entropy, rel=1e-5)
    loss = numpy_loss(p, student.double().numpy(), temperature)
    assert sum(terms.values()).item() == pytest.approx(loss, rel=1e-5)


def test_the_same_crop_is_never_compared():
    """Whatever the student says of a crop, the teacher's word on that crop does not judge it."""
    targets = torch.tensor([[[1.0, 0, 0], [0, 1, 0]]])
    student = torch.zeros(1, 2, 3)
    student[0, 0, 1] = student[0, 1, 0] = 100  # each global crop agrees with the other
    assert sum(distillation(targets, student, 1.0).values()).item() == pytest.approx(0, abs=1e-5)
    assert sum(distillation(targets, student.flip(1), 1.0).values()).item() == pytest.approx(100, rel=1e-5)


def test_a_collapse_shows_in_the_terms():
    student = torch.zeros(4, 5, 8)
    one = torch.zeros(4, 2, 8)
    one[..., 3] = 1
    agreed = student.clone()
    agreed[..., 3] = 100
    for targets, outputs, entropy in ((one, agreed, 0), (torch.full((4, 2, 8), 1 / 8), student, np.log(8))):
        terms = distillation(targets, outputs, 0.1)
        assert terms["entropy"].item() == pytest.approx(entropy, abs=1e-5)
        assert terms["divergence"].item() == pytest.approx(0, abs=1e-5)


def numpy_sinkhorn(outputs, temperature, iterations=3):
    """DINOv2's, with its constants: prototypes in rows, each of mass 1 / K; samples in columns, each of mass 1 / B."""
    weights = np.exp(outputs.astype(np.float64) / temperature).T
    weights /= weights.sum()
    k, b = weights.shape
    for _ in range(iterations):
        weights = weights / weights.sum(axis=1, keepdims=True) / k
        weights = weights / weights.sum(axis=0, keepdims=True) / b
    return (weights * b).T


def test_sinkhorn_is_that_of_dinov2():
    outputs = torch.rand(10, 6, generator=generator()) * 2 - 1
    for temperature in (0.04, 0.5):
        found = sinkhorn(outputs, temperature)
        np.testing.assert_allclose(found.numpy(), numpy_sinkhorn(outputs.numpy(), temperature), rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(found.sum(dim=1), torch.ones(10))
    balanced = sinkhorn(outputs, 0.5, iterations=100)
    torch.testing.assert_close(balanced.sum(dim=0), torch.full((6,), 10 / 6))


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_targets_are_centred_and_sharpened(centring):
    made = make(centring=centring)
    made.step.fill_(50)  # after the warm-up
    made.centre.copy_(torch.rand(12, generator=generator(2)))
    outputs = torch.rand(3, 2, 12, generator=generator(3)) * 2 - 1
    found = made.targets(outputs).numpy()
    if centring == "centre":
        expected = softmax((outputs.double().numpy() - made.centre.double().numpy()) / 0.07)
    else:
        expected = numpy_sinkhorn(outputs.flatten(0, 1).numpy(), 0.07).reshape(3, 2, 12)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)


def test_the_first_centre_is_zero():
    made = make(centring="centre")
    outputs = torch.rand(3, 2, 12, generator=generator(3)) * 2 - 1
    expected = softmax(outputs.double().numpy() / 0.04)
    np.testing.assert_allclose(made.targets(outputs).numpy(), expected, rtol=1e-3, atol=1e-5)


def test_the_centre_follows_the_batch_once_a_step():
    made, batch = make(centring="centre", centre_momentum=0.9, **OFF), crops()
    different(made.teacher_head)
    made.step.fill_(7)
    made.centre.fill_(0.5)
    for _ in range(3):  # micro-batches, say
        made(batch)
    assert (made.centre == 0.5).all()
    outputs = made.teacher_head(made.pooled(made.teacher_backbone, made.global_views(batch)))
    made.after_step(8)
    torch.testing.assert_close(made.centre, 0.9 * 0.5 + 0.1 * outputs.mean(dim=0))
    assert made.step == 8
    centre = made.centre.clone()
    made.after_step(9)  # no batch between
    assert torch.equal(made.centre, centre)
    made.teacher_mean = torch.full((12,), float("nan"))
    made.after_step(10)
    assert torch.equal(made.centre, centre)


def test_momentum_is_a_cosine_of_the_step():
    steps = 40
    expected = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * np.arange(steps) / steps))
    found = [teacher_momentum(step, steps, 0.996, 1.0) for step in range(1, steps + 1)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert found[0] == 0.996
    assert teacher_momentum(21, 40, 0.5, 0.9) == pytest.approx(0.7)
    assert teacher_momentum(99, 40, 0.5, 0.9) == pytest.approx(0.9)


def test_the_teachers_temperature_rises_then_stays():
    made = make()
    found = []
    for step in (0, 15, 30, 90):
        made.step.fill_(step)
        found.append(made.temperature().item())
    np.testing.assert_allclose(found, [0.04, 0.055, 0.07, 0.07], rtol=1e-5)
    constant = make(temperature_warmup=0)
    constant.step.fill_(1)
    assert constant.temperature().item() == pytest.approx(0.07)


def test_the_step_and_the_centre_are_in_the_state():
    made, other = make(), make()
    made(crops())
    made.after_step(4)
    other.load_state_dict(made.state_dict())
    assert other.step == 4
    assert torch.equal(other.centre, made.centre)
    assert other.centre.any()
    different(made.backbone)
    assert any(key.startswith("teacher_backbone") for key in made.state_dict())


def test_the_head_is_the_published_one():
    torch.manual_seed(0)
    head = Head(5, 7, 4, 6)
    assert all(layer.weight.abs().max() < 0.2 for layer in head.layers)
    assert all((layer.bias == 0).all() for layer in head.layers)
    different(head)
    x = torch.randn(3, 5, generator=generator())
    z = x.double().numpy()
    for number, layer in enumerate(head.layers):
        z = z @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
        if number < 2:
            z = z * (1 + erf(z / np.sqrt(2))) / 2
    z /= np.sqrt((z**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(head.bottleneck(x).detach().numpy(), z, rtol=1e-3, atol=1e-5)
    prototypes = head.prototypes.detach().double().numpy()
    prototypes /= np.sqrt((prototypes**2).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(head(x).detach().numpy(), z @ prototypes.T, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("local", "batch_norm"), [(0, True), (3, True), (3, False)])
def test_terms_are_those_of_teacher_and_student(local, batch_norm):
    """The whole step again: the student sees all crops, the teacher the global ones, and both their own weights."""
    made, batch = make(local_crops=local, batch_norm=batch_norm, centring="centre", **OFF), crops(3)
    different(made.teacher_head)
    different(made.teacher_backbone, 0.05)
    made.step.fill_(20)
    made.centre.copy_(torch.rand(12, generator=generator(2)) * 0.2)
    terms = made(batch)

    def outputs(backbone, head, *kinds):
        """Crops of one kind, normalised together -> outputs (N, crops, K)."""
        codes = [torch.cat([level.mean(dim=(2, 3, 4)) for level in backbone.trunk(x)[1:]], dim=1) for x in kinds]
        rows = torch.stack(codes, dim=1).detach().double().numpy()
        if batch_norm:
            rows = (rows - rows.mean(axis=(0, 1))) / np.sqrt(rows.var(axis=(0, 1)) + 1e-5)
        return head(torch.from_numpy(rows).float()).detach().double().numpy()

    teacher = outputs(made.teacher_backbone, made.teacher_head, batch["image"], batch["second"])
    student = outputs(made.backbone, made.head, batch["image"], batch["second"])
    if local:
        small = outputs(made.backbone, made.head, *(batch["local"][:, k] for k in range(local)))
        student = np.concatenate([student, small], axis=1)
    targets = softmax((teacher - made.centre.double().numpy()) / 0.06)
    assert terms["entropy"].item() == pytest.approx(-(targets * np.log(targets)).sum(axis=-1).mean(), rel=1e-3)
    assert sum(terms.values()).item() == pytest.approx(numpy_loss(targets, student, 0.1), rel=1e-3)


def test_teacher_and_student_see_the_same_global_views():
    made, batch, seen = make(), crops(), {"student": [], "teacher": []}
    for name, backbone in (("student", made.backbone), ("teacher", made.teacher_backbone)):
        encode = backbone.encode
        backbone.encode = lambda views, encode=encode, name=name: seen[name].append(views) or encode(views)
    made(batch)
    assert [len(views) for views in seen["teacher"]] == [4]
    assert [len(views) for views in seen["student"]] == [4, 6]
    assert torch.equal(seen["teacher"][0], seen["student"][0])
    assert not torch.equal(seen["teacher"][0][0::2], batch["image"])


def test_crops_of_a_volume_are_adjacent_rows():
    made, batch = make(**OFF), crops()
    views, local = made.global_views(batch), made.local_views(batch)
    assert torch.equal(views[0::2], batch["image"])
    assert torch.equal(views[1::2], batch["second"])
    assert torch.equal(local[:3], batch["local"][0])
    assert torch.equal(local[3:], batch["local"][1])


def test_blur_depends_on_the_crop():
    """Always for the first global crop, rarely for the second, for half of the local ones."""
    made = make(**OFF | {"blur": (1.0, 0.1, 0.5), "sigma_range": (1.0, 2.0)})
    batch = {"image": images(300, size=(8, 8, 8)), "second": images(300, size=(8, 8, 8))}
    batch["local"] = torch.rand(300, 3, 1, 8, 8, 8, generator=generator(5))
    views, local = made.global_views(batch), made.local_views(batch)

    def changed(found, given):
        return (found != given).flatten(1).any(dim=1).float().mean().item()

    assert changed(views[0::2], batch["image"]) == 1
    assert changed(views[1::2], batch["second"]) == pytest.approx(0.1, abs=0.05)
    assert changed(local, batch["local"].flatten(0, 1)) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("setting", [{"flip": (1, 1, 1)}, {"jitter": 1}, {"gamma": 1, "gamma_range": (2.0, 2.0)}])
def test_every_setting_switches_its_own_distortion(setting):
    made, batch = make(**OFF | setting), crops()
    plain = make(**OFF)
    for found, given in (
        (made.global_views(batch), plain.global_views(batch)),
        (made.local_views(batch), plain.local_views(batch)),
    ):
        if "flip" in setting:
            assert torch.equal(found, given.flip((2, 3, 4)))
        elif "gamma" in setting:
            torch.testing.assert_close(found, given**2)
        else:
            assert all(not torch.equal(a, b) for a, b in zip(found, given, strict=True))


def test_the_teacher_follows_the_student_and_gets_no_gradient():
    made = make(momentum=0.9)
    sum(made(crops()).values()).backward()
    teacher = [p for name, p in made.named_parameters() if name.startswith("teacher")]
    assert teacher
    assert all(p.grad is None and not p.requires_grad for p in teacher)
    student = [p for name, p in made.named_parameters() if name.startswith("head")]
    assert all(p.grad is not None and p.grad.any() for p in student)
    assert not any("upcat" in name for name, _ in made.teacher_backbone.named_parameters())
    key = "conv_0.conv_0.conv.weight"
    pairs = [
        (made.teacher_backbone.get_parameter(key), made.backbone.get_parameter(key)),
        (made.teacher_head.layers[1].weight, made.head.layers[1].weight),
        (made.teacher_head.prototypes, made.head.prototypes),
    ]
    before = []
    for follower, leader in pairs:
        assert torch.equal(follower, leader)
        before.append(follower.clone())
        with torch.no_grad():
            leader.add_(1.0)
    made.after_step(1)
    for (follower, _), start in zip(pairs, before, strict=True):
        torch.testing.assert_close(follower, start + 0.1)
    made.after_step(101)
    for (follower, _), start in zip(pairs, before, strict=True):
        torch.testing.assert_close(follower, start + 0.1)  # the momentum has come to 1


def test_a_gradient_reaches_each_crop_of_the_student():
    made, pooled = make(**OFF), []
    original = made.pooled

    def keep(backbone, views):
        result = original(backbone, views)
        if backbone is made.backbone:
            result.retain_grad()
            pooled.append(result)
        else:
            assert not result.requires_grad
        return result

    made.pooled = keep
    sum(made(crops()).values()).backward()
    for rows in pooled:
        assert (rows.grad.abs().sum(dim=1) > 0).all()


def test_all_levels_but_the_images_own_are_averaged():
    for backbone in (unet, swin):
        made = make(backbone, batch_norm=False)
        views = images(2)
        levels = made.backbone.trunk(views)
        found = made.pooled(made.backbone, views)
        torch.testing.assert_close(found, torch.cat([level.mean(dim=(2, 3, 4)) for level in levels[1:]], dim=1))
        deepest = make(backbone, pool="deepest", batch_norm=False)
        torch.testing.assert_close(deepest.pooled(made.backbone, views), levels[-1].mean(dim=(2, 3, 4)))
        assert deepest.head.layers[0].in_features == made.backbone.channels[-1]


def source(shape=(60, 70, 50), local=5, view=(12, 16, 8)):
    return MultiCrop(Ramp(shape), GLOBAL, LOCAL, 4 / 3, local, view)


def test_crops_show_their_boxes():
    """In a volume of coordinates, a resized crop is a ramp from the first to the last voxel of its box."""
    drawer, size = source(), (24, 32, 16)
    for seed in range(10):
        sample = drawer.sample(size, np.random.default_rng(seed))
        boxes = drawer.draw(size, np.random.default_rng(seed))
        assert sample["local"].shape == (5, 3, 12, 16, 8)
        found = [(sample["image"], size), (sample["second"], size), *((crop, (12, 16, 8)) for crop in sample["local"])]
        for (crop, view), (origin, edges) in zip(found, boxes, strict=True):
            for axis in range(3):
                line = np.moveaxis(crop[axis], axis, 0)[:, 0, 0]
                centres = (np.arange(view[axis]) + 0.5) * edges[axis] / view[axis] - 0.5
                np.testing.assert_allclose(line, origin[axis] + np.clip(centres, 0, edges[axis] - 1), atol=1e-3)
    assert set(source(local=0).sample(size, np.random.default_rng(0))) == {"image", "second"}


def test_boxes_have_the_published_sizes_and_lie_in_one_region():
    size, shape = np.array([40, 48, 32]), np.array([60, 70, 50])
    boxes = np.array([source().draw(tuple(size), np.random.default_rng(seed)) for seed in range(300)])
    origins, edges = boxes[:, :, 0], boxes[:, :, 1]
    share = (edges / size).prod(axis=2)
    for part, (low, high) in ((share[:, :2], GLOBAL), (share[:, 2:], LOCAL)):
        assert low - 0.04 < part.min() < low + 0.04
        assert high - 0.08 < part.max() < high + 0.04
        middle = np.median(part)
        assert middle == pytest.approx((low + high) / 2, abs=0.05)
    assert (origins >= 0).all()
    assert (origins + edges <= shape).all()
    spread = (origins + edges).max(axis=1) - origins.min(axis=1)
    assert (spread <= size).all()
    reach = origins.reshape(-1, 3)
    assert (reach.min(axis=0) <= 2).all()
    assert ((origins + edges).reshape(-1, 3).max(axis=0) >= shape - 2).all()
    assert len(np.unique(origins[0], axis=0)) > 3


def test_a_small_volume_is_in_every_crop():
    """Along an axis on which the volume is shorter than a crop, the crop has all of it; else it lies in the volume."""
    shape = np.array([20, 70, 12])
    for seed in range(50):
        for origin, edges in source(tuple(shape)).draw((32, 32, 32), np.random.default_rng(seed)):
            low, high = np.array(origin), np.array(origin) + edges
            around, inside = (low <= 0) & (high >= shape), (low >= 0) & (high <= shape)
            assert (around | inside).all()


def test_prepare_makes_sources_and_knows_the_schedule():
    volumes, said = [SimpleNamespace(shape=(9, 9, 9)) for _ in range(3)], []
    preparation = SimpleNamespace(
        steps=77, crop=(64, 64, 64), report=lambda text, **values: said.append((text, values))
    )
    made = make(momentum=0.9, local_view=None, aspect=1.2, global_share=(0.5, 0.9), local_share=(0.1, 0.2))
    expected = [MultiCrop(volume, (0.5, 0.9), (0.1, 0.2), 1.2, 3, (32, 32, 32)) for volume in volumes]
    assert made.prepare(volumes, preparation) == expected
    assert made.steps == 77
    assert not said
    make(momentum=0.996).prepare(volumes, preparation)
    ((text, values),) = said
    assert "86%" in text
    assert values["teacher_keeps"] == pytest.approx(0.86, abs=0.01)


def test_schedules_need_prepare():
    made = DINO(DINO.Config(**SMALL), unet())
    made.generator = generator()
    with pytest.raises(RuntimeError, match="prepare"):
        made(crops())


def test_local_views_are_half_of_the_crop_in_whole_strides():
    assert make(local_view=None)._local_view((96, 64, 96)) == (48, 32, 48)
    assert make(swin, local_view=None)._local_view((96, 64, 96)) == (64, 32, 64)
    assert make(local_view=None)._local_view((32, 32, 32)) == (32, 32, 32)
    assert make(local_view=None)._local_view((32, 64, 32)) == (16, 32, 16)


@pytest.mark.parametrize("centring", ["centre", "sinkhorn"])
def test_the_batch_may_be_divided(centring, tmp_path):
    registry, settings = Registry(), {"centring": centring}
    fixture = MethodFixture(registry.load("method", "dino"), registry.load("backbone", "unet"), tmp_path, settings)
    assert "within" in check_micro_batches(fixture)


def test_the_teachers_or_the_students_encoder_is_handed_over():
    for transfer, name in (("teacher", "teacher_backbone"), ("student", "backbone")):
        made = make(transfer=transfer)
        different(made.backbone)
        weights = made.weights()
        key = "conv_0.conv_0.conv.weight"
        assert torch.equal(weights[key], getattr(made, name).get_parameter(key))
        assert {made.backbone.part_of(key) for key in weights} == {"encoder"}
        assert set(weights) == set(made.backbone.part_weights(("encoder",)))
    assert DINO.Config().transfer == "teacher"


def test_published_defaults():
    config = DINO.Config()
    assert (config.student_temperature, config.first_temperature, config.teacher_temperature) == (0.1, 0.04, 0.07)
    assert (config.momentum, config.last_momentum, config.centre_momentum) == (0.996, 1.0, 0.9)
    assert (config.hidden, config.bottleneck, config.prototypes, config.local_crops) == (2048, 256, 256, 8)
    assert (config.global_share, config.local_share) == (GLOBAL, LOCAL)
    assert (config.flip, config.jitter, config.strength, config.blur) == ((0.5, 0, 0), 0.8, 0.4, (1.0, 0.1, 0.5))
    assert (config.centring, config.pool, config.temperature_warmup) == ("sinkhorn", "all", 0.3)
    assert config.batch_norm
    assert config.aspect == pytest.approx(4 / 3)


def test_the_picture_shows_crops_and_views():
    made, batch = make(**OFF | {"flip": (1, 1, 1)}), crops()
    shown = made.show(batch)
    assert torch.equal(shown["first crop"], batch["image"])
    assert torch.equal(shown["second crop"], batch["second"])
    assert torch.equal(shown["first view"], batch["image"].flip((2, 3, 4)))
    assert torch.equal(shown["second view"], batch["second"].flip((2, 3, 4)))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"global_share": (0.9, 0.4)}, "global_share=0.9,0.4 is no range"),
        ({"local_share": (0.0, 0.4)}, "local_share=0,0.4 is no range"),
        ({"global_share": (0.4, 1.5)}, "global_share ends with 1.5"),
        ({"gamma_range": (2.0, 0.5)}, "gamma_range=2,0.5 is no range"),
        ({"flip": (0.5, 1.5, 0)}, "flip=0.5,1.5,0 must be three probabilities"),
        ({"blur": (1.0, 2.0, 0.5)}, "blur=1,2,0.5 must be three probabilities"),
        ({"momentum": 0.9, "last_momentum": 0.8}, "must not exceed method.last_momentum"),
        ({"local_view": (16, 16, 24)}, "local_view=16,16,24 is not a multiple of the deepest stride"),
        ({"local_view": (64, 64, 32)}, "exceeds the crop 32,64,32: set it to at most the crop"),
        ({"local_view": (16, 16, 16)}, "at least twice the stride"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, says):
    with pytest.raises(UserError, match=says):
        make(**settings).check((32, 64, 32), 2)


def test_batch_norm_needs_two_volumes():
    with pytest.raises(UserError, match="one volume only in a batch of 1"):
        make().check((32, 64, 32), 1)
    make().check((32, 64, 32), 2)
    make(batch_norm=False).check((32, 64, 32), 1)
