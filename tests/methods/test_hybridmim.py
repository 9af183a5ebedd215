"""HybridMIM against its paper: masks, labels, region, every term and its gradients."""

import math

import pytest
import torch
import torch.nn.functional as F

from backbones.swinunetr import SwinUNETR
from backbones.unet import UNet
from harness import UserError, to_voxels
from methods.hybridmim import HybridMIM, consistency_loss, contrastive_loss

TERMS = ("reconstruction", "number", "location", "consistency", "contrastive")


def unet(**settings) -> UNet:
    return UNet(UNet.Config(features=(4, 4, 8, 8, 16), **settings), in_channels=1)


def swin(**settings) -> SwinUNETR:
    config = SwinUNETR.Config(feature_size=12, window_size=4, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1), **settings)
    return SwinUNETR(config, in_channels=1)


def method(backbone=None, **settings) -> HybridMIM:
    made = HybridMIM(HybridMIM.Config(**settings), backbone or unet())
    made.generator = torch.Generator().manual_seed(0)
    return made


SMALL = {"sub_volume": (16, 16, 16), "patch": (8, 8, 8)}


def images(n=2, edge=48) -> torch.Tensor:
    return torch.rand(n, 1, edge, edge, edge, generator=torch.Generator().manual_seed(1)) * 0.999 + 0.001


def test_mask_has_the_published_number_of_patches_in_every_sample():
    mask = method().draw_mask(torch.zeros(6, 1, 96, 96, 96))
    assert mask.shape == (6, 6, 6, 6)
    assert mask.flatten(1).sum(dim=1).tolist() == [87] * 6
    assert len({tuple(sample.flatten().tolist()) for sample in mask}) == 6


@pytest.mark.parametrize(("ratio", "masked"), [(0.4, 4), (0.5, 4), (0.25, 2), (0.75, 6)])
def test_masked_number_follows_the_ratio(ratio, masked):
    mask = method(mask_ratio=ratio).draw_mask(torch.zeros(3, 1, 32, 32, 32))
    assert mask.flatten(1).sum(dim=1).tolist() == [masked] * 3


def test_masks_come_from_the_runs_generator():
    first, second = method(), method()
    torch.manual_seed(7)
    drawn = first.draw_mask(images())
    torch.manual_seed(8)
    assert torch.equal(drawn, second.draw_mask(images()))


@pytest.mark.parametrize(("sub", "patch"), [((32, 32, 32), (16, 16, 16)), ((64, 32, 32), (32, 16, 8))])
def test_one_masked_patch_is_its_bit_in_its_sub_volume(sub, patch):
    """The released code groups 8 consecutive patches in raster order, which are not one sub-volume."""
    made = method(sub_volume=sub, patch=patch)
    crop = (128, 96, 64)
    grid = [c // p for c, p in zip(crop, patch, strict=True)]
    per_sub = [s // p for s, p in zip(sub, patch, strict=True)]
    sub_grid = [c // s for c, s in zip(crop, sub, strict=True)]
    for place in [(0, 0, 0), (1, 0, 1), (3, 5, 2), tuple(n - 1 for n in grid)]:
        mask = torch.zeros(1, *grid, dtype=torch.bool)
        mask[(0, *place)] = True
        bits = made.bits(mask)
        assert bits.shape == (1, math.prod(sub_grid), math.prod(per_sub))
        region = [n // k for n, k in zip(place, per_sub, strict=True)]
        inner = [n % k for n, k in zip(place, per_sub, strict=True)]
        r = (region[0] * sub_grid[1] + region[1]) * sub_grid[2] + region[2]
        k = (inner[0] * per_sub[1] + inner[1]) * per_sub[2] + inner[2]
        assert bits.nonzero().tolist() == [[0, r, k]]


@pytest.mark.parametrize("backbone", [unet, swin])
def test_labels_and_features_speak_of_the_same_sub_volume(backbone):
    """A signal in one masked patch's sub-volume shows in exactly the features that its label is predicted from."""
    made = method(backbone())
    patch = (2, 1, 3)
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    mask[(0, *patch)] = True
    deepest = [64 // s for s in made.backbone.stride]
    signal = torch.zeros(1, made.backbone.channels[-1], *deepest)
    voxel = [p * 16 // s for p, s in zip(patch, made.backbone.stride, strict=True)]
    signal[(0, slice(None), *voxel)] = 1
    lit = made.region_features(signal)[0].sum(dim=1).nonzero().flatten()
    labelled = made.bits(mask)[0].any(dim=1).nonzero().flatten()
    assert lit.tolist() == labelled.tolist()


def test_number_label_counts_the_location_bits():
    made = method()
    mask = made.draw_mask(torch.zeros(4, 1, 64, 64, 64))
    assert made.bits(mask).sum().item() == mask.sum().item()


@pytest.mark.parametrize(
    ("backbone", "crop", "region", "origin", "size"),
    [
        (unet, 96, None, 0, 64),
        (unet, 128, None, 0, 96),
        (swin, 96, None, 0, 64),
        (swin, 128, None, 0, 96),
        (unet, 96, 96, 0, 96),
        (unet, 96, 32, 32, 32),
        (swin, 64, None, 0, 64),
        (unet, 64, None, 0, 48),
        (unet, 32, None, 0, 32),
        (unet, 128, 64, 32, 64),
        (unet, 128, 48, 32, 48),  # cuts sub-volumes, so the stride's grid holds
    ],
)
def test_region_is_central_on_the_grid_of_sub_volumes(backbone, crop, region, origin, size):
    made = method(backbone(), region=region and (region,) * 3)
    assert made._region((crop,) * 3) == ((origin,) * 3, (size,) * 3)


def test_decoder_sees_only_the_region(monkeypatch):
    made = method(**SMALL)
    seen = []
    decode = made.backbone.decode
    monkeypatch.setattr(made.backbone, "decode", lambda pyramid: seen.append(pyramid[0].shape[2:]) or decode(pyramid))
    made({"image": images()})
    assert seen == [torch.Size([32, 32, 32])]


@pytest.mark.parametrize("distance", ["norm", "mse"])
def test_reconstruction_counts_masked_voxels_of_the_region_only(distance):
    made = method(distance=distance, region=(32, 32, 32)).eval()
    image = images(1, 64)
    mask = made.draw_mask(image)
    pyramid = made.backbone.encode(image)
    before = made.reconstruction_loss(pyramid, image, mask)
    (start, *_), (size, *_) = made._region((64, 64, 64))
    hidden = to_voxels(mask, made.config.patch)
    inside = torch.zeros_like(hidden)
    inside[..., start : start + size, start : start + size, start : start + size] = True
    elsewhere = torch.where(hidden & inside, image, torch.rand_like(image))
    assert torch.equal(made.reconstruction_loss(pyramid, elsewhere, mask), before)
    changed = torch.where(hidden & inside, 1 - image, image)
    assert not torch.isclose(made.reconstruction_loss(pyramid, changed, mask), before)


def test_reconstruction_is_equation_1_for_a_region_off_the_sub_volume_grid():
    """Region 48 of 96 at stride 16 starts at 16: it cuts the 32-voxel sub-volumes."""
    made = method(region=(48, 48, 48), distance="norm").eval()
    image = images(1, 96)
    mask = made.draw_mask(image)
    pyramid = made.backbone.encode(image)
    got = made.reconstruction_loss(pyramid, image, mask)
    cropped = [
        level[..., 16 // s : 64 // s, 16 // s : 64 // s, 16 // s : 64 // s]
        for level, (s, *_) in zip(pyramid, made.backbone.strides, strict=True)
    ]
    restored = torch.sigmoid(made.reconstruct(made.backbone.decode(cropped)))[0, 0]
    hidden = to_voxels(mask, made.config.patch)[0, 0]
    norms = []
    for x in range(2):
        for y in range(2):
            for z in range(2):
                cell = [slice(max(16, 32 * n), min(64, 32 * n + 32)) for n in (x, y, z)]
                inside = [slice(s.start - 16, s.stop - 16) for s in cell]
                difference = (restored[tuple(inside)] - image[0, 0][tuple(cell)])[hidden[tuple(cell)]]
                norms.append(difference.norm())
    assert torch.isclose(got, torch.stack(norms).mean(), rtol=1e-4)


def test_nothing_masked_in_the_region_gives_zero_and_finite_gradients():
    made = method(region=(16, 16, 32))
    image = images(1, 64)
    mask = torch.zeros(1, 4, 4, 4, dtype=torch.bool)
    loss = made.reconstruction_loss(made.backbone.encode(image), image, mask)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in made.parameters() if p.grad is not None)


def test_losses_are_those_of_the_equations():
    made = method(**SMALL).eval()
    image = images()
    state = made.generator.get_state()
    mask = made.draw_mask(image)
    bits = made.bits(mask)
    made.generator.set_state(state)
    terms = made({"image": image})
    features = made.region_features(made.backbone.encode(image * ~to_voxels(mask, made.config.patch))[-1])
    u, p = made.count(features).softmax(-1), made.locate(features).sigmoid()
    number = -torch.log(u.gather(2, bits.sum(2, keepdim=True))).mean()
    location = -(torch.where(bits, p, 1 - p).log()).sum(2).mean()
    assert torch.isclose(terms["number"], 0.1 * number, rtol=1e-4)
    assert torch.isclose(terms["location"], 0.1 * location, rtol=1e-4)
    assert set(terms) == set(TERMS)


def gradients(made: HybridMIM, term: str) -> set[str]:
    made.zero_grad()
    made({"image": images()})[term].backward()
    return {
        name.removeprefix("backbone.").split(".")[0]
        for name, p in made.named_parameters()
        if p.grad is not None and p.grad.abs().sum() > 0
    }


ENCODER = {"conv_0", "down_1", "down_2", "down_3", "down_4"}
DECODER = {"upcat_4", "upcat_3", "upcat_2", "upcat_1"}


@pytest.mark.parametrize(
    ("term", "reached"),
    [
        ("reconstruction", ENCODER | DECODER | {"reconstruct"}),
        ("number", ENCODER | {"count"}),
        ("location", ENCODER | {"locate"}),
        ("consistency", ENCODER | {"count", "locate"}),
        ("contrastive", ENCODER | {"project"}),
    ],
)
def test_each_term_reaches_the_parameters_it_should(term, reached):
    assert gradients(method(**SMALL), term) == reached


def test_consistency_on_bits_leaves_the_location_head_without_gradient():
    assert "locate" not in gradients(method(consistency_on="bits", **SMALL), "consistency")


def test_consistency_is_zero_where_number_and_locations_agree():
    bits = torch.tensor([[[1.0, 0, 1, 0, 0, 0, 0, 1]]])
    locate = (bits - 0.5) * 200
    count = F.one_hot(torch.tensor([[3]]), 9).float() * 200
    assert consistency_loss(count, locate).item() == pytest.approx(0, abs=1e-6)
    wrong = F.one_hot(torch.tensor([[5]]), 9).float() * 200
    assert consistency_loss(wrong, locate).item() == pytest.approx((200 + 4) / 2)


def test_consistency_trains_the_location_head_through_probabilities():
    count, locate = torch.zeros(1, 1, 9), torch.full((1, 1, 8), 2.0, requires_grad=True)
    consistency_loss(count, locate).backward()
    assert (locate.grad > 0).all()  # argmax says 0 are masked, so every probability must fall


@pytest.mark.parametrize("off", TERMS)
def test_every_term_can_be_switched_off_and_leaves_no_dead_parameters(off):
    made = method(**{off: 0}, **SMALL)
    terms = made({"image": images()})
    assert set(terms) == set(TERMS) - {off}
    sum(terms.values()).backward()
    handed_over = [
        n
        for n, p in made.named_parameters()
        if not n.startswith("backbone") or made.backbone.part_of(n[9:]) in made.trains
    ]
    dead = {name for name, p in made.named_parameters() if p.grad is None and name in handed_over}
    assert not dead
    assert made.trains == (("encoder",) if off == "reconstruction" else ("encoder", "decoder"))


def test_the_rows_of_table_4_are_configurations():
    row = {}
    for number in range(1, 6):
        row = {term: (1.0 if term in TERMS[:number] else 0) for term in TERMS}
        assert set(method(**row, **SMALL)({"image": images()})) == set(TERMS[:number])


@pytest.mark.parametrize("settings", [{"dropout": 0.1}, {"block_dropout": 0.1}])
def test_the_second_encoding_differs_under_dropout_and_not_in_evaluation(settings):
    backbone = unet(**settings)
    first, second = backbone.encode_twice(images())
    assert not torch.equal(first[-1], second[-1])
    backbone.eval()
    first, second = backbone.encode_twice(images())
    torch.testing.assert_close(first[-1], second[-1])


@pytest.mark.parametrize(("settings", "passes"), [({"dropout": 0.1}, [2]), ({"block_dropout": 0.1}, [4])])
def test_two_encodings_cost_one_pass_where_dropout_comes_after_the_trunk(settings, passes):
    backbone = unet(**settings)
    seen = []
    backbone.conv_0.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    backbone.encode_twice(images(2))
    assert seen == passes


def test_contrast_is_finite_symmetric_and_equal_to_its_equation():
    a, b = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).double(), torch.randn(3, 8).double()
    got = contrastive_loss(a, b, 0.5)
    assert torch.isclose(got, contrastive_loss(b, a, 0.5))
    codes = [F.normalize(code, dim=0) for code in torch.cat([a, b]).float()]
    expected = 0.0
    for i in range(6):
        j = (i + 3) % 6
        others = sum(math.exp(float(codes[i] @ codes[k]) / 0.5) for k in range(6) if k != i)
        expected -= math.log(math.exp(float(codes[i] @ codes[j]) / 0.5) / others)
    assert got.item() == pytest.approx(expected / 6, rel=1e-5)


def test_contrast_has_gradients_in_both_views_and_refuses_one_sample():
    a, b = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    contrastive_loss(a, b, 0.5).backward()
    assert a.grad.abs().sum() > 0
    assert b.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="no negatives"):
        contrastive_loss(a[:1], b[:1], 0.5)


@pytest.mark.parametrize(
    ("settings", "crop", "batch", "words"),
    [
        ({}, (48, 64, 64), 2, "does not divide the crop"),
        ({"patch": (12, 16, 16)}, (64, 64, 64), 2, "must divide method.sub_volume"),
        ({"patch": (32, 32, 32)}, (64, 64, 64), 2, "at least two"),
        ({"sub_volume": (8, 8, 8), "patch": (4, 4, 4)}, (64, 64, 64), 2, "deepest stride"),
        ({"region": (40, 40, 40)}, (64, 64, 64), 2, "multiple of the deepest stride"),
        ({"region": (16, 16, 16)}, (64, 64, 64), 2, "single voxel"),
        ({"region": (96, 96, 96)}, (64, 64, 64), 2, "fit the crop"),
        ({}, (64, 64, 64), 1, "no negatives in a batch of 1"),
        (dict.fromkeys(TERMS, 0), (64, 64, 64), 2, "every loss term switched off"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, crop, batch, words):
    with pytest.raises(UserError, match=words):
        method(**settings).check(crop, batch)


def test_contrast_without_dropout_is_refused():
    with pytest.raises(UserError, match="needs dropout"):
        method(dropout=0).check((64, 64, 64), 2)


@pytest.mark.parametrize(
    ("sub", "patch", "region"), [(64, 32, 128), (64, 16, 96), (32, 16, 96), (32, 8, 128), (32, 16, 64)]
)
def test_the_settings_of_figure_6_are_accepted_at_128(sub, patch, region):
    for backbone in (unet, swin):
        made = method(backbone(), sub_volume=(sub,) * 3, patch=(patch,) * 3, region=(region,) * 3)
        made.check((128, 128, 128), 2)
        assert made.count.out_features == (sub // patch) ** 3 + 1
        assert made.locate.out_features == (sub // patch) ** 3


@pytest.mark.parametrize("backbone", [unet, swin])
def test_loss_falls(backbone):
    torch.manual_seed(0)
    made = method(backbone(), sub_volume=(32, 32, 32), patch=(16, 16, 16))
    optimizer = torch.optim.AdamW(made.parameters(), lr=3e-3)
    batch = {"image": 0.2 * F.interpolate(images(2, 8), (64, 32, 32), mode="trilinear")}
    losses = []
    for _ in range(12):
        loss = sum(made(batch).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
