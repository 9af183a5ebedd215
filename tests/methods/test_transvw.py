"""TransVW: words are corresponding coordinates in different volumes, found among those whose codes are near."""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from scipy.stats import chisquare

from harness import UserError
from harness.conformance.fixture import MethodFixture, PhantomVolume
from methods.transvw import Autoencoder, Instance, ResizedVolume, TransVW, WordHead, num_members, resize
from tests.methods.parts import images, swin, unet
from tests.methods.transvw_parts import Coordinates, discover


@dataclass
class Services:
    """What `prepare` may use. `train` fills the module with random weights, so that its codes can be computed again."""

    crop: tuple[int, int, int] = (16, 16, 16)
    seed: int = 0
    device: torch.device = torch.device("cpu")
    trained: list = field(default_factory=list)
    values: dict = field(default_factory=dict)

    def remember(self, name, depends_on, compute):
        self.depends_on = depends_on
        return compute()

    def train(self, module, sources, **settings):
        self.trained.append((module, sources, settings))
        rng = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.2)

    def report(self, message, **values):
        self.message = message
        self.values |= values


def coordinates_of(word, volumes, extent=(16, 16, 16)):
    """Second implementation: the origin has the same share of its range in every volume."""
    return [
        [
            round(share * (long - edge))
            for share, long, edge in zip(word["position"], volumes[v].shape, extent, strict=True)
        ]
        for v in word["volumes"]
    ]


# Discovery


def test_instances_of_a_word_are_the_corresponding_crops_of_different_volumes():
    shapes = [(40, 44, 36), (30, 30, 30), (61, 20, 47), (16, 50, 33)]
    volumes = [Coordinates(number, shape) for number, shape in enumerate(shapes)]
    for number, word in enumerate(discover(volumes, instances=1.0)):
        assert sorted(word["volumes"]) == [0, 1, 2, 3]
        for index, origin in zip(word["volumes"], coordinates_of(word, volumes), strict=True):
            instance = Instance(volumes[index], number, tuple(word["position"]), (16, 16, 16), 0)
            crop = instance.sample((16, 16, 16), None)["image"]
            x, y, z = origin
            assert np.array_equal(crop, volumes[index].image[:, x : x + 16, y : y + 16, z : z + 16])
            assert list(instance.coordinate) == origin


def test_a_member_may_be_smaller_than_the_reference_and_every_corner_is_reached():
    large, small = Coordinates(0, (60, 60, 60)), Coordinates(1, (20, 20, 20))
    for position, ends in [((0.0,) * 3, (0, 0)), ((1.0,) * 3, (44, 4)), ((0.5,) * 3, (22, 2))]:
        for volume, end in zip((large, small), ends, strict=True):
            assert Instance(volume, 0, position, (16, 16, 16), 0).coordinate == (end,) * 3


def test_a_words_coordinate_is_uniform_over_the_whole_reference():
    volumes = [Coordinates(number, (20, 19, 18)) for number in range(2)]
    drawn = []
    for seed in range(900):
        (word,) = discover(volumes, words=1, seed=seed)
        drawn.append(np.array(word["position"]) * [4, 3, 2])
    drawn = np.array(drawn)
    np.testing.assert_allclose(drawn, drawn.round(), atol=1e-9)
    for axis, room in enumerate((4, 3, 2)):
        counts = np.bincount(drawn[:, axis].round().astype(int), minlength=room + 1)
        assert len(counts) == room + 1
        assert chisquare(counts).pvalue > 1e-3


def test_instances_are_the_nearest_in_code_space():
    """Against a sort in NumPy; the reference is the first member."""
    rng = np.random.default_rng(3)
    volumes, codes = [Coordinates(number) for number in range(20)], rng.standard_normal((20, 5))
    words = discover(volumes, codes, instances=0.3, words=15, distance=1.0)
    assert len(words) == 15
    for word in words:
        reference = word["volumes"][0]
        distances = np.sqrt(((codes - codes[reference]) ** 2).sum(axis=1))
        assert word["volumes"] == list(np.argsort(distances)[:6])


def test_shuffled_codes_give_other_words():
    rng = np.random.default_rng(0)
    volumes, codes = [Coordinates(number) for number in range(30)], rng.standard_normal((30, 8))
    real = discover(volumes, codes, words=30, instances=0.32, distance=2.0)
    shuffled = discover(volumes, rng.permutation(codes), words=30, instances=0.32, distance=2.0)
    assert len(real) == len(shuffled) == 30
    differ = sum(set(a["volumes"]) != set(b["volumes"]) for a, b in zip(real, shuffled, strict=True))
    assert differ == 30
    everyone = [discover(volumes, c, words=30, instances=1.0, distance=2.0) for c in (codes, rng.permutation(codes))]
    assert all(set(a["volumes"]) == set(b["volumes"]) for a, b in zip(*everyone, strict=True))


def test_equal_codes_do_not_displace_the_reference():
    words = discover([Coordinates(number) for number in range(6)], np.zeros((6, 2)), words=6, instances=0.4)
    assert all(len(set(word["volumes"])) == 2 for word in words)
    assert len({word["volumes"][0] for word in words}) == 6


@pytest.mark.parametrize(
    ("able", "share", "members"),
    [(623, 0.32, 199), (176, 0.32, 56), (4, 0.32, 2), (3, 0.1, 2), (10, 1.0, 10), (10, 0.25, 2)],
)
def test_members_are_a_share_of_the_volumes_and_at_least_two(able, share, members):
    assert num_members(able, share) == members


@pytest.mark.parametrize("share", [0, 1.01, 200])
def test_a_number_of_volumes_is_refused_as_a_share(share):
    with pytest.raises(ValidationError):
        TransVW.Config(instances=share)


def test_coordinates_keep_their_distance_in_the_reference_and_lie_inside():
    volumes = [Coordinates(number, (30 + 3 * number, 44, 36)) for number in range(5)]
    words = discover(volumes, words=10)
    assert len(words) > 4
    for number, word in enumerate(words):
        assert all(0 <= share <= 1 for share in word["position"])
        room = np.array(volumes[word["volumes"][0]].shape) - 16
        earlier = np.array([other["position"] for other in words[:number]]).reshape(-1, 3) * room
        gaps = np.linalg.norm(earlier - np.array(word["position"]) * room, axis=1)
        assert not len(gaps) or gaps.min() >= 5 - 1e-9


def test_no_instance_is_lost():
    """The released code drops the last instance of each fold."""
    volumes = [Coordinates(number) for number in range(6)]
    assert all(sorted(word["volumes"]) == list(range(6)) for word in discover(volumes, instances=1.0))


def test_a_repeated_coordinate_does_not_end_discovery():
    """The released code never resets its `repeated` flag: after one clash it finds nothing more."""
    volumes = [Coordinates(number, (24, 24, 24)) for number in range(12)]
    assert len(discover(volumes, words=12, distance=6.0)) > 5


def test_small_volumes_have_fewer_words_and_every_volume_is_tried_as_reference():
    small = discover([Coordinates(n, (20, 20, 20)) for n in range(4)], words=44)
    large = discover([Coordinates(n) for n in range(4)], words=44)
    assert 0 < len(small) < len(large)
    references = [word["volumes"][0] for word in large]
    assert sorted(references[:4]) == [0, 1, 2, 3]
    assert [discover([Coordinates(n) for n in range(9)], seed=s)[0]["volumes"][0] for s in range(6)] != [0] * 6


def test_volumes_smaller_than_the_word_have_no_instances():
    volumes = [Coordinates(0), Coordinates(1, (10, 40, 40)), Coordinates(2)]
    words = discover(volumes, instances=1.0)
    assert words
    assert all(sorted(word["volumes"]) == [0, 2] for word in words)
    assert discover(volumes[:2]) == []


def test_words_are_not_background():
    """At least a tenth of the reference's crop is above 0.002; here only one corner of each volume is."""

    @dataclass
    class Corner(Coordinates):
        @property
        def image(self):
            bright = np.full((1, *self.shape), 0.001, np.float32)
            bright[:, :16, :16, :16] = 0.5
            return bright

    volumes = [Corner(number) for number in range(4)]
    words = [discover(volumes, words=1, seed=seed)[0] for seed in range(60)]
    shares = []
    for word in words:
        origin = coordinates_of(word, volumes)[0]
        shares.append((volumes[0].crop(origin, (16, 16, 16)) > 0.002).mean())
    assert min(shares) >= 0.1
    assert min(shares) < 0.3


# Preparation


def expected_codes(module, volumes, size):
    """Second implementation: four strided convolutions with leaky ReLU, then the mean over space."""
    parameters = [parameter.detach() for parameter in module.encoder.parameters()]
    rows = []
    for volume in volumes:
        features = F.interpolate(torch.from_numpy(volume.image)[None], size=size, mode="trilinear")
        for weight, bias in zip(parameters[::2], parameters[1::2], strict=True):
            features = F.conv3d(features, weight, bias, stride=2, padding=1)
            features = torch.where(features > 0, features, 0.1 * features)
        rows.append(features.mean(dim=(2, 3, 4))[0].numpy())
    return np.stack(rows)


def test_words_follow_the_codes_of_the_trained_autoencoder():
    volumes = [PhantomVolume(number, 1, (24, 26, 28)) for number in range(12)]
    services = Services()
    made = TransVW(TransVW.Config(words=9, autoencoder_steps=7, code_size=(32, 32, 32), distance=2), unet())
    sources = made.prepare(volumes, services)
    ((module, whole, settings),) = services.trained
    assert isinstance(module, Autoencoder)
    assert [source.volume for source in whole] == volumes
    assert settings == {"size": (32, 32, 32), "steps": 7, "batch_size": 4, "lr": 1e-3}
    codes = expected_codes(module, volumes, (32, 32, 32))
    assert codes.shape == (12, 512)
    extent = tuple(services.values["extent"])
    assert extent == (16, 16, 16)
    words = discover(volumes, codes, extent, words=9, instances=0.32, distance=2)
    assert len(words) == 9
    expected = [
        (id(volumes[index]), number, tuple(word["position"]), extent, scale)
        for number, word in enumerate(words)
        for index in word["volumes"]
        for scale in range(3)
    ]
    assert [(id(s.volume), s.word, s.position, s.extent, s.scale) for s in sources] == expected
    constant = discover(volumes, np.zeros((12, 1)), extent, words=9, instances=0.32, distance=2)
    assert [word["volumes"] for word in constant] != [word["volumes"] for word in words]
    assert services.values["discovery"] is True
    assert services.values["volumes_per_word"] == 4
    assert {"words", "instances", "distance", "autoencoder_steps", "code_size", "extent"} <= set(services.depends_on)


@pytest.mark.parametrize(("number", "share"), [(6, 1.0), (2, 0.32)])
def test_without_a_choice_no_autoencoder_is_trained_and_it_is_said(number, share):
    volumes = [PhantomVolume(number, 1, (24, 26, 28)) for number in range(number)]
    services = Services()
    TransVW(TransVW.Config(words=5, instances=share, distance=2), unet()).prepare(volumes, services)
    assert services.trained == []
    assert services.values["discovery"] is False
    assert "discovery has no effect" in services.message
    assert "set a smaller method.instances" in services.message


@pytest.mark.parametrize(
    ("shape", "crop", "extent"),
    [
        ((130, 170, 140), (96, 96, 96), (96, 96, 96)),
        ((130, 170, 140), (128, 128, 128), (110, 128, 120)),
        ((30, 41, 24), (64, 64, 64), (15, 21, 12)),
        ((512, 512, 100), (64, 64, 32), (64, 64, 32)),
    ],
)
def test_a_word_is_the_networks_input_where_the_smallest_volume_has_room(shape, crop, extent):
    volumes = [Coordinates(0, shape), Coordinates(1, tuple(2 * edge for edge in shape))]
    assert TransVW(TransVW.Config(), unet())._extent(volumes, crop) == extent
    assert TransVW(TransVW.Config(extent=(8, 9, 10)), unet())._extent(volumes, crop) == (8, 9, 10)


def test_discovery_is_remembered_timed_and_shared(tmp_path, registry, capsys):
    fixture = MethodFixture(TransVW, registry.load("backbone", "unet"), tmp_path)
    first = fixture.new()
    capsys.readouterr()
    other = MethodFixture(TransVW, registry.load("backbone", "segresnet"), tmp_path).new()
    assert "words found in" in capsys.readouterr().err
    assert [source.coordinate for source in first.sources] == [source.coordinate for source in other.sources]
    assert list(tmp_path.glob("words-*.json"))


def test_what_follows_does_not_depend_on_whether_words_were_found_or_computed(tmp_path, registry):
    fixture = MethodFixture(TransVW, registry.load("backbone", "unet"), tmp_path, {"words": "300"})
    computed, found = fixture.new().method.state_dict(), fixture.new().method.state_dict()
    assert all(torch.equal(value, found[key]) for key, value in computed.items())


def test_the_head_has_as_many_classes_as_there_are_words(tmp_path, registry):
    built = MethodFixture(TransVW, registry.load("backbone", "unet"), tmp_path, {"words": "300"}).new()
    number = 1 + max(source.word for source in built.sources)
    assert 2 <= number < 300
    assert built.method.classify.linear.out_features == number


def test_one_volume_is_an_error():
    made = TransVW(TransVW.Config(), unet())
    with pytest.raises(UserError, match="give at least 2"):
        made.prepare([PhantomVolume(0, 1, (40, 40, 40))], Services())


def test_words_that_no_two_volumes_hold_are_an_error():
    made = TransVW(TransVW.Config(extent=(32, 32, 32)), unet())
    with pytest.raises(UserError, match=r"set a smaller method\.extent"):
        made.prepare([Coordinates(0, (20, 20, 20)), Coordinates(1, (20, 20, 20))], Services())


def test_the_autoencoder_restores_its_input():
    torch.manual_seed(0)
    autoencoder, batch = Autoencoder(1), images(2, size=(32, 32, 32))
    assert [m.out_channels for m in autoencoder.encoder.modules() if isinstance(m, torch.nn.Conv3d)] == [
        16,
        32,
        64,
        512,
    ]
    outputs = []
    autoencoder.decoder.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    (loss,) = autoencoder({"image": batch}).values()
    assert outputs[0].shape == batch.shape
    assert loss.item() == pytest.approx(((outputs[0] - batch) ** 2).mean().item(), rel=1e-6)


def test_whole_volumes_are_resized():
    volume = PhantomVolume(0, 2, (20, 30, 10))
    sample = ResizedVolume(volume).sample((16, 16, 16), np.random.default_rng(0))
    assert sample["image"].shape == (2, 16, 16, 16)
    assert sample["image"].mean() == pytest.approx(volume.image.mean(), rel=0.02)
    assert resize(volume.image, (20, 30, 10)) is volume.image


# Losses


@pytest.mark.parametrize(("restoration", "classification"), [(1.0, 0.01), (3.0, 2.0)])
def test_losses_against_numpy(restoration, classification, monkeypatch):
    settings = {} if restoration == 1 else {"restoration": restoration, "classification": classification}
    made = TransVW(TransVW.Config(words=3, hidden=8, **settings), unet())
    logits, target = torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.rand(2, 1, 32, 32, 32)
    raw = torch.randn_like(target)
    monkeypatch.setattr(made.classify, "forward", lambda deepest: logits)
    monkeypatch.setattr(made.restore, "forward", lambda features: raw)
    terms = made({"image": torch.rand_like(target), "target": target, "word": torch.tensor([2, 1])})
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    entropy = -(np.log(p[0, 2]) + np.log(p[1, 1])) / 2
    error = ((1 / (1 + np.exp(-raw.numpy())) - target.numpy()) ** 2).mean()
    assert set(terms) == {"classification", "restoration"}
    assert terms["classification"].item() == pytest.approx(classification * entropy, rel=1e-5)
    assert terms["restoration"].item() == pytest.approx(restoration * error, rel=1e-5)


@pytest.mark.parametrize("backbone", [unet, swin])
def test_the_network_sees_the_distorted_crop_alone_and_all_of_it_is_trained(backbone, monkeypatch):
    made = TransVW(TransVW.Config(words=3, hidden=8), backbone())
    seen, deepest, encode, classify = [], [], made.backbone.encode, made.classify.forward
    monkeypatch.setattr(made.backbone, "encode", lambda x: seen.append(x) or encode(x))
    monkeypatch.setattr(made.classify, "forward", lambda x: deepest.append(x) or classify(x))
    batch = {"image": images(2), "target": images(2).flip(2), "word": torch.tensor([2, 0])}
    terms = made(batch)
    assert len(seen) == 1
    assert seen[0] is batch["image"]
    assert deepest[0].shape[1] == made.backbone.channels[-1]
    terms["classification"].backward(retain_graph=True)
    assert made.classify.conv.weight.grad.abs().sum() > 0
    assert sum(p.grad.abs().sum() for p in made.backbone.parameters() if p.grad is not None) > 0
    assert made.restore.weight.grad is None
    terms["restoration"].backward()
    assert made.restore.weight.grad.abs().sum() > 0
    assert made.trains == ("encoder", "decoder")


def test_without_restoration_the_encoder_alone_is_trained():
    made = TransVW(TransVW.Config(words=3, hidden=8, restoration=0), unet())
    assert made.trains == ("encoder",)
    terms = made({"image": images(2), "target": images(2), "word": torch.tensor([2, 0])})
    assert list(terms) == ["classification"]


@pytest.mark.parametrize("training", [True, False])
def test_the_head_against_plain_operations(training):
    """Convolution without bias, batch norm with the batch's moments (in evaluation too), ReLU, mean over space, linear."""
    torch.manual_seed(0)
    head, deepest = WordHead(6, 10, 4).train(training), torch.randn(3, 6, 4, 5, 3)
    with torch.no_grad():
        head.norm.weight.uniform_(0.5, 2)
        head.norm.bias.normal_()
        got = head(deepest).numpy()
        hidden = F.conv3d(deepest, head.conv.weight, padding=1).numpy()
        mean, variance = hidden.mean(axis=(0, 2, 3, 4), keepdims=True), hidden.var(axis=(0, 2, 3, 4), keepdims=True)
        scale, shift = (p.numpy().reshape(1, -1, 1, 1, 1) for p in (head.norm.weight, head.norm.bias))
        pooled = np.maximum((hidden - mean) / np.sqrt(variance + 1e-5) * scale + shift, 0).mean(axis=(2, 3, 4))
        expected = pooled @ head.linear.weight.numpy().T + head.linear.bias.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert head.conv.weight.shape == (10, 6, 3, 3, 3)


def test_published_settings():
    config = TransVW.Config()
    assert (config.words, config.distance, config.hidden) == (44, 5, 1024)
    assert (config.elastic_alpha, config.elastic_sigma) == (991, 8)
    assert (config.restoration, config.classification) == (1, 0.01)


def test_the_picture_shows_the_target_the_input_and_the_restoration():
    made = TransVW(TransVW.Config(words=3, hidden=8), unet()).eval()
    batch = {"image": images(1), "target": images(1).flip(2), "word": torch.tensor([2])}
    with torch.no_grad():
        shown = made.show(batch)
        restored = made.restore(made.backbone.decode(made.backbone.encode(batch["image"]))).sigmoid()
    assert torch.equal(shown["image"], batch["target"])
    assert torch.equal(shown["what it sees"], batch["image"])
    torch.testing.assert_close(shown["what it restores"], restored)
