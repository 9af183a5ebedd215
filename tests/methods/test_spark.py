"""SparK: nothing leaks from masked voxels, norms see visible ones only, every level is filled, the loss is NumPy's."""

import copy
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from backbones.genesis_unet3d import GenesisUNet3D
from backbones.segresnet import SegResNet
from backbones.unet import UNet
from harness import UserError
from harness.cli.main import main
from harness.compute.layers import prepare_module
from harness.training.models import new_method
from methods import spark
from methods.spark import LightDecoder, Spark, SparseEncoder, at_resolution, normalised, to_patches
from tests.methods.parts import generator, images, swin, unet
from tests.methods.spark_parts import numpy_norm, voxels


def segresnet(channels=1) -> SegResNet:
    torch.manual_seed(0)
    return SegResNet(SegResNet.Config(init_filters=8), in_channels=channels)


def genesis(channels=1) -> GenesisUNet3D:
    torch.manual_seed(0)
    return GenesisUNet3D(GenesisUNet3D.Config(first=4), in_channels=channels)


def narrow() -> UNet:
    return UNet(UNet.Config(features=(4, 4, 4, 4, 8)), in_channels=1)


CUBE = (32, 32, 32)


BACKBONES = [unet, segresnet, genesis]


DECODERS = ["light", "backbone"]


def make(backbone=unet, channels=1, **settings) -> Spark:
    """The method as a run builds it, with norms and biases that are not those of a new network."""
    made = new_method(Spark, Spark.Config(**settings), backbone(channels))
    made.generator = generator()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator(3))
    return made


# Sparse


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_nothing_leaks_from_masked_voxels(backbone, decoder):
    """Whatever lies under the mask, the features of every level and the prediction are the same to the last bit."""
    made, image = make(backbone, decoder=decoder), images(size=CUBE)
    hidden = made.draw_mask(image)
    mask = voxels(hidden, image)
    other = torch.where(mask, 100 * torch.rand_like(image) - 50, image)
    for training in (False, True):
        made.train(training)
        pairs = zip(made.encoder.encode(image, hidden), made.encoder.encode(other, hidden), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
        assert torch.equal(made.restore(image, hidden), made.restore(other, hidden))
    nudged = torch.where(mask, image, image * 0.9 + 0.1 * torch.rand_like(image))
    for a, b in zip(made.encoder.encode(image, hidden), made.encoder.encode(nudged, hidden), strict=True):
        assert not torch.equal(a, b)
    assert not torch.equal(made.restore(image, hidden), made.restore(nudged, hidden))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_masked_positions_are_zero_at_every_level_and_visible_ones_are_not(backbone):
    made, image = make(backbone), images()
    hidden = made.draw_mask(image)
    pyramid = made.encoder.encode(image, hidden)
    assert [tuple(i // f for i, f in zip(image.shape[2:], level.shape[2:], strict=True)) for level in pyramid] == list(
        made.backbone.strides
    )
    for features in pyramid:
        mask = voxels(hidden, features)
        assert not features[mask].any()
        assert (features[~mask] != 0).float().mean() > 0.3
    assert hidden.sum() == voxels(hidden, pyramid[-1])[:, 0].sum(), "a patch is one voxel of the deepest level"


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_layer_of_the_encoder_sees_or_gives_anything_at_a_masked_position(backbone):
    """Not only the levels: the inputs and outputs of every convolution, norm, activation and pooling are 0 there."""
    made, image = make(backbone), images(1)
    hidden, seen = made.draw_mask(image), 0

    def look(layer, inputs, output):
        nonlocal seen
        for features in (*inputs, output):
            seen += 1
            assert not features[voxels(hidden, features)].any(), layer

    for child in made.backbone.parts["encoder"]:
        for layer in getattr(made.backbone, child).modules():
            if not list(layer.children()):
                layer.register_forward_hook(look)
    made.encoder.encode(image, hidden)
    assert seen > 20


def test_with_kernels_of_one_voxel_visible_features_are_those_of_the_dense_network():
    """Convolutions that see nothing around a voxel and no norms: masks make no difference to what is visible."""
    backbone = unet()
    for layer in backbone.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data[:] *= F.pad(torch.ones(1, 1, 1), (1,) * 6) if layer.kernel_size == (3, 3, 3) else 1
        if isinstance(layer, nn.InstanceNorm3d):
            layer.forward = lambda features: features
    image = images(1)
    hidden = torch.zeros(1, 2, 4, 2, dtype=torch.bool)
    hidden[0, 1, 2:, 0] = True
    encoder = SparseEncoder(backbone)
    encoder.forwards = [
        (layer, forward) for layer, forward in encoder.forwards if not isinstance(layer, nn.InstanceNorm3d)
    ]
    for sparse, dense in zip(encoder.encode(image, hidden), backbone.encode(image), strict=True):
        mask = voxels(hidden, sparse)
        torch.testing.assert_close(sparse[~mask], dense[~mask], rtol=1e-6, atol=1e-7)
        assert not sparse[mask].any()


def test_the_encoder_is_a_second_implementation_that_gathers_visible_voxels():
    """Genesis: convolve, drop masked positions, normalise the rest of the batch as a list, put it back, rectify, pool."""
    made, image = make(genesis), images()
    hidden = made.draw_mask(image)
    features, due = image.double().masked_fill(voxels(hidden, image), 0), []
    for level, down in enumerate(made.backbone.double().get_submodule(name) for name in made.backbone.parts["encoder"]):
        if level:
            features = F.max_pool3d(features, 2)
        for unit in down.ops:
            features = F.conv3d(features, unit.conv1.weight, unit.conv1.bias, padding=1)
            index = (~voxels(hidden, features)[:, 0]).nonzero(as_tuple=True)
            rows = features.movedim(1, -1)[index]
            rows = (rows - rows.mean(dim=0)) / (rows.var(dim=0, unbiased=False) + unit.bn1.eps).sqrt()
            filled = torch.zeros_like(features.movedim(1, -1))
            filled[index] = rows * unit.bn1.weight + unit.bn1.bias
            features = filled.movedim(-1, 1).relu()
        due.append(features)
    for found, wanted in zip(made.encoder.encode(image.double(), hidden), due, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_a_sample_does_not_depend_on_the_others_of_its_batch():
    for decoder in DECODERS:
        made, image = make(decoder=decoder), images(3)
        hidden = made.draw_mask(image)
        torch.testing.assert_close(made.restore(image, hidden)[1:2], made.restore(image[1:2], hidden[1:2]))


def test_poolings_whose_windows_reach_over_borders_do_not_let_the_mask_shrink():
    backbone = unet()
    backbone.conv_0 = nn.Sequential(
        backbone.conv_0, nn.MaxPool3d(3, stride=1, padding=1), nn.AvgPool3d(3, 1, padding=1)
    )
    hidden = torch.rand(2, 2, 4, 2, generator=generator()) < 0.5
    for features in SparseEncoder(backbone).encode(images(), hidden):
        assert not features[voxels(hidden, features)].any()


# Loss


@pytest.mark.parametrize(("channels", "patch"), [(1, None), (2, None), (2, (16, 32, 16))])
def test_the_loss_is_numpys(channels, patch):
    """Each patch, all of its channels together, is standardised with the unbiased variance. Masked patches alone count."""
    made, image = make(channels=channels, patch=patch), images(2, channels=channels)
    hidden = made.draw_mask(image)
    restored = made.restore(image, hidden).detach().numpy().astype(np.float64)
    made.generator.manual_seed(0)
    terms = made({"image": image})
    errors, (a, b, c) = [], made.patch
    for n, x, y, z in np.argwhere(hidden.numpy()):
        region = (n, slice(None), slice(a * x, a * x + a), slice(b * y, b * y + b), slice(c * z, c * z + c))
        true = image.numpy().astype(np.float64)[region]
        errors.append(np.mean((restored[region] - (true - true.mean()) / np.sqrt(true.var(ddof=1) + 1e-6)) ** 2))
    assert set(terms) == {"reconstruction"}
    assert terms["reconstruction"].item() == pytest.approx(np.mean(errors), rel=1e-5)


def test_the_loss_depends_on_the_prediction_of_masked_voxels_only(monkeypatch):
    made, image = make(), images()
    hidden = made.draw_mask(image)
    made.generator.manual_seed(0)
    prediction = torch.randn(image.shape, generator=generator(5)).requires_grad_()
    monkeypatch.setattr(made, "restore", lambda image, mask: prediction)
    made({"image": image})["reconstruction"].backward()
    assert torch.equal(prediction.grad != 0, voxels(hidden, image))


def test_a_prediction_of_zero_costs_one_and_the_target_itself_nothing(monkeypatch):
    made, image = make(), images()
    monkeypatch.setattr(made, "restore", lambda image, mask: torch.zeros_like(image))
    assert made({"image": image})["reconstruction"].item() == pytest.approx(1, abs=1e-3)
    assert made({"image": torch.full_like(image, 0.7)})["reconstruction"].item() == pytest.approx(0, abs=1e-6)
    target = spark.from_patches(normalised(to_patches(image, made.patch))[0], made.patch, 1)
    monkeypatch.setattr(made, "restore", lambda image, mask: target)
    assert made({"image": image})["reconstruction"].item() == 0


def test_a_new_network_starts_at_the_prior():
    """The light decoder's last layer is drawn small, as in the released code."""
    method = new_method(Spark, Spark.Config(), unet())
    method.generator = generator()
    assert method({"image": images()})["reconstruction"].item() == pytest.approx(1, abs=0.01)


# Masks


def test_six_tenths_of_the_patches_are_masked_in_each_sample_on_its_own():
    for backbone, number, masked in ((unet, 16, 10), (segresnet, 128, 77)):
        made = make(backbone)
        assert made.config.mask_ratio == 0.6
        hidden = made.draw_mask(images(3))
        assert hidden[0].numel() == number
        assert (hidden.flatten(1).sum(dim=1) == masked).all()
        assert not torch.equal(hidden[0], hidden[1])
        assert not torch.equal(hidden, made.draw_mask(images(3)))


def test_masks_come_from_the_methods_own_generator():
    made, image = make(), images()
    losses = []
    for seed in (1, 1, 2):
        made.generator.manual_seed(seed)
        losses.append(made({"image": image})["reconstruction"].item())
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize(
    ("backbone", "settings", "crop", "says"),
    [
        (unet, {"patch": (8, 16, 16)}, (32, 64, 32), "patch=8,16,16 is not a multiple of the deepest stride 16,16,16"),
        (segresnet, {"patch": 12}, (48, 48, 48), "patch=12,12,12 is not a multiple of the deepest stride 8,8,8"),
        (unet, {}, (32, 64, 40), "patch=16,16,16 does not divide the crop 32,64,40"),
        (unet, {"mask_ratio": 0.99}, (32, 64, 32), "masks 16 of the 16 patches"),
        (unet, {"mask_ratio": 0.9}, (32, 64, 32), "leaves one visible voxel of the deepest features"),
        (unet, {"width": 24}, (32, 64, 32), "method.width=24 cannot be halved at each of the 5 levels"),
        (swin, {}, (64, 64, 64), "spark cannot compute .* of backbone 'swinunetr' at visible voxels only"),
    ],
)
def test_settings_that_do_not_fit_are_refused(backbone, settings, crop, says):
    with pytest.raises(UserError, match=says):
        Spark(Spark.Config(**settings), backbone()).check(crop, 2)


def test_settings_that_fit_are_not():
    make().check((32, 64, 32), 1)
    make(patch=32, mask_ratio=0.5).check((32, 64, 32), 1)
    make(segresnet, width=24).check((32, 64, 32), 1)
    make(genesis).check((16, 32, 32), 1)
    method = Spark(Spark.Config(), narrow())
    method.check((32, 64, 32), 1)
    assert method.light.predict.in_channels == 1, "8 channels cannot be halved four times, so the decoder has 16"


def test_transformers_are_refused_before_data_is_read(capsys):
    for backbone in ("swinunetr", "unetr"):
        assert main(["run", "--method", "spark", "--backbone", backbone, "--task", "msd_hippocampus", "--dry-run"]) == 2
        assert (
            f"method 'spark' needs a backbone with the ability 'sparse', which '{backbone}' does not have: choose "
            "--backbone from genesis_unet3d, plainunet, resenc, segresnet, unet" in capsys.readouterr().err
        )


# Densify and decode


@pytest.mark.parametrize("decoder", DECODERS)
def test_every_masked_position_of_a_level_gets_the_embedding_of_that_level(decoder):
    made, image = make(decoder=decoder), images()
    hidden = made.draw_mask(image)
    sparse = made.encoder.encode(image, hidden)
    dense = made.densify(sparse, hidden)
    assert len(dense) == len(made.tokens) == len(made.backbone.channels)
    for number, (before, after, token) in enumerate(zip(sparse, dense, made.tokens, strict=True)):
        mask = voxels(hidden, before)
        assert torch.equal(after[mask], token[None, :, None, None, None].expand_as(after)[mask])
        if decoder == "backbone":
            assert torch.equal(after[~mask], before[~mask])
        else:
            norm, visible = made.norms[number], (~mask[:, :1]).numpy()
            due = numpy_norm(before.detach().numpy().astype(np.float64), visible, before.shape[1], False)
            weight, bias = (value.detach().numpy()[:, None, None, None] for value in (norm.weight, norm.bias))
            np.testing.assert_allclose(after[~mask].detach().numpy(), (due * weight + bias)[~mask.numpy()], atol=1e-4)


@pytest.mark.parametrize("decoder", DECODERS)
def test_the_decoder_gets_the_dense_pyramid(decoder, monkeypatch):
    made, image = make(decoder=decoder), images()
    hidden, decoded = made.draw_mask(image), []
    owner, name = (made.light, "forward") if decoder == "light" else (made.backbone, "decode")
    decode = getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda pyramid: decoded.append(pyramid) or decode(pyramid))
    restored = made.restore(image, hidden)
    due = made.densify(made.encoder.encode(image, hidden), hidden)
    assert all(torch.equal(a, b) for a, b in zip(decoded[0], due, strict=True))
    wanted = decode(due) if decoder == "light" else made.predict(decode(due))
    assert torch.equal(restored, wanted)
    assert restored.shape == image.shape


def test_embeddings_are_drawn_as_in_the_released_code():
    torch.manual_seed(0)
    drawn = torch.cat([spark._new_embedding(100).detach() for _ in range(200)]).numpy()
    assert np.abs(drawn).max() <= 0.02
    assert drawn.std() == pytest.approx(0.02 * 0.5396, rel=0.02)  # of a normal that is cut off at one deviation
    assert all((token != 0).any() for token in Spark(Spark.Config(), unet()).tokens)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_level_enters_the_light_decoder(backbone):
    network = backbone(2)
    decoder = LightDecoder(network, network.channels[-1])
    levels = [
        torch.randn(1, c, *(32 // s for s in stride))
        for c, stride in zip(network.channels, network.strides, strict=True)
    ]
    whole = decoder(levels)
    assert whole.shape == (1, 2, 32, 32, 32)
    for number in range(len(levels)):
        others = [level * (index != number) for index, level in enumerate(levels)]
        assert not torch.allclose(decoder(others), whole, atol=1e-6), number


def test_the_light_decoder_halves_its_width_at_each_level():
    network = unet()
    blocks = LightDecoder(network, 64).blocks
    assert [(block[0].in_channels, block[0].out_channels, block[4].out_channels) for block in blocks] == [
        (64, 64, 32),
        (32, 32, 16),
        (16, 16, 8),
        (8, 8, 4),
    ]
    assert {(block[0].kernel_size, block[0].stride, block[0].padding) for block in blocks} == {
        ((4,) * 3, (2,) * 3, (1,) * 3)
    }
    project = LightDecoder(network, 64).project
    assert [layer.kernel_size[0] for layer in project] == [1, 3, 3, 3, 3]
    assert isinstance(LightDecoder(network, 16).project[0], nn.Identity)
    assert make().light.predict.in_channels == 1
    assert make(width=64).light.predict.in_channels == 4


def test_blocks_multiply_the_size_by_their_step():
    block = spark._up_block(4, 2, (1, 2, 3))
    assert block(torch.randn(1, 4, 5, 4, 3)).shape == (1, 2, 5, 8, 9)
    assert spark._up_block(4, 2, (4, 1, 1))(torch.randn(1, 4, 3, 2, 2)).shape == (1, 2, 12, 2, 2)


# Training and transfer


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_gradients_reach_every_trained_parameter_and_no_other(backbone, decoder):
    made = make(backbone, decoder=decoder)
    made({"image": images(size=CUBE)})["reconstruction"].backward()
    trains = ("encoder",) if decoder == "light" else ("encoder", "decoder")
    assert made.trains == trains
    for name, parameter in made.named_parameters():
        part = made.backbone.part_of(name.removeprefix("backbone.")) if name.startswith("backbone.") else "method"
        assert parameter.requires_grad == (part in (*trains, "method")), name
        assert (parameter.grad is not None and bool(parameter.grad.any())) == parameter.requires_grad, name
    assert {made.backbone.part_of(key) for key in made.weights()} == set(trains)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_backbone_is_what_it_was(backbone):
    """Keys, weights, layers and dense features: nothing of the sparse computation stays."""
    made, fresh, image = make(backbone), backbone(), images(size=CUBE)
    attributes = {name: set(vars(layer)) for name, layer in fresh.named_modules()}
    fresh.load_state_dict(made.backbone.state_dict())
    made({"image": image})["reconstruction"].backward()
    fresh.train()
    assert list(made.backbone.state_dict()) == list(fresh.state_dict())
    assert {name: set(vars(layer)) for name, layer in made.backbone.named_modules()} == attributes
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in made.backbone.modules())
    for a, b in zip(made.backbone.encode(image), fresh.encode(image), strict=True):
        assert torch.equal(a, b)
    fresh.load_state_dict({**fresh.state_dict(), **made.weights()})


def test_the_backbone_is_what_it_was_after_an_error_too(monkeypatch):
    made, image = make(), images(1)
    monkeypatch.setattr(made.backbone, "trunk", lambda image: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made({"image": image})
    assert not any("forward" in vars(layer) for layer in made.backbone.modules())


def test_a_copy_is_a_method_of_its_own():
    made, image = make(), images()
    for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        losses = []
        for method in (made, twin):
            method.generator.manual_seed(7)
            losses.append(method({"image": image})["reconstruction"].item())
        assert losses[0] == losses[1]
        assert twin.encoder.backbone is twin.backbone
        assert not {id(layer) for layer, _ in twin.encoder.forwards} & {id(layer) for layer in made.backbone.modules()}
        assert {id(layer) for layer, _ in twin.encoder.forwards} <= {id(layer) for layer in twin.backbone.modules()}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_channels_last_features_stay_so_and_are_the_same(backbone):
    made, image = make(backbone, channels=2), images(channels=2, size=CUBE)
    hidden = made.draw_mask(image)
    plain = made.encoder.encode(image, hidden)
    prepare_module(made, torch.device("cpu"), channels_last=True)
    last = made.encoder.encode(image.to(memory_format=torch.channels_last_3d), hidden)
    for a, b in zip(plain, last, strict=True):
        assert b.is_contiguous(memory_format=torch.channels_last_3d)
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    dense = made.densify(last, hidden)
    assert all(level.is_contiguous(memory_format=torch.channels_last_3d) for level in dense)


@pytest.mark.slow  # the compiler takes seconds to load
def test_a_compiled_trunk_sees_each_new_mask():
    made, image = make(), images(1)
    masks = [made.draw_mask(image) for _ in range(3)]
    plain = [made.restore(image, hidden) for hidden in masks]
    made.backbone.trunk = torch.compile(made.backbone.trunk, backend="eager")
    for hidden, due in zip(masks, plain, strict=True):
        torch.testing.assert_close(made.restore(image, hidden), due)


# Picture


def test_the_picture_has_visible_patches_as_they_are_and_restored_ones_on_the_images_scale(monkeypatch):
    made, image = make(channels=2), images(2, channels=2)
    hidden = made.draw_mask(image)
    mask = voxels(hidden, image)
    made.generator.manual_seed(0)
    shown = made.show({"image": image})
    assert torch.equal(shown["image"], image)
    assert torch.equal(shown["what it sees"], image.masked_fill(mask, 0))
    assert torch.equal(shown["what it restores"][~mask], image[~mask])
    assert not torch.allclose(shown["what it restores"][mask], image[mask], atol=0.01)
    assert 0 <= shown["what it restores"].min() <= shown["what it restores"].max() <= 1
    target = spark.from_patches(normalised(to_patches(image, made.patch))[0], made.patch, 2)
    monkeypatch.setattr(made, "restore", lambda image, mask: target)
    made.generator.manual_seed(0)
    torch.testing.assert_close(made.show({"image": image})["what it restores"], image)


def test_patches_hold_their_own_voxels():
    image = images(2, channels=3)
    patches = to_patches(image, (16, 32, 8))
    assert patches.shape == (2, 2, 2, 4, 3 * 16 * 32 * 8)
    assert torch.equal(patches[1, 1, 0, 2], image[1, :, 16:32, :32, 16:24].flatten())
    assert torch.equal(spark.from_patches(patches, (16, 32, 8), 3), image)
    hidden = torch.zeros(1, 2, 4, 2, dtype=torch.bool)
    hidden[0, 1, 2, 0] = True
    mask = at_resolution(hidden, torch.zeros(1, 5, 8, 8, 8))
    assert mask.sum() == 4 * 2 * 4
    assert mask[0, 0, 4:8, 4:6, :4].all()
