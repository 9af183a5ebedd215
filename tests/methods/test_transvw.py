"""TransVW: words are one coordinate in different volumes, found among those whose codes are near."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import ndimage

from harness import UserError, cut
from harness.conformance.fixture import MethodFixture, PhantomVolume
from methods.models_genesis import paint_in
from methods.transvw import Instance, Perturb, ResizedVolume, TransVW, deform, discover_words, resize
from tests.methods.parts import image, unet


@dataclass
class Coordinates:
    """A volume whose voxels say where they are and, in the second channel, whose they are."""

    number: int
    shape: tuple[int, int, int] = (40, 44, 36)

    @property
    def image(self):
        where = np.arange(np.prod(self.shape), dtype=np.float32).reshape(self.shape) + 1
        return np.stack([where, np.full(self.shape, self.number + 1, np.float32)])

    def crop(self, origin, size):
        return cut(self.image, origin, size)


def discover(volumes, codes=None, extent=(16, 16, 16), words=6, instances=3, distance=5.0):
    codes = np.arange(len(volumes), dtype=float)[:, None] if codes is None else codes
    return discover_words(volumes, codes, extent, words, instances, distance, np.random.default_rng(0))


def test_words_of_one_class_come_from_the_same_coordinate_of_different_volumes():
    volumes = [Coordinates(number) for number in range(5)]
    for word in discover(volumes):
        crops = [
            Instance(volumes[index], 0, tuple(word["coordinate"]), (16, 16, 16), 0).sample((16, 16, 16), None)["image"]
            for index in word["volumes"]
        ]
        assert len({tuple(crop[1].ravel()[:1]) for crop in crops}) == len(word["volumes"]) == 3
        for crop in crops[1:]:
            assert np.array_equal(crop[0], crops[0][0])
        first = np.unravel_index(int(crops[0][0, 0, 0, 0]) - 1, (40, 44, 36))
        assert list(first) == word["coordinate"]


def test_instances_are_the_nearest_in_code_space():
    volumes = [Coordinates(number) for number in range(8)]
    codes = np.array([0, 10, 0.1, 10.1, 0.2, 10.2, 0.3, 10.3])[:, None]
    for word in discover(volumes, codes, instances=4):
        assert len({index % 2 for index in word["volumes"]}) == 1


def test_coordinates_keep_their_distance_and_lie_inside():
    volumes = [Coordinates(number) for number in range(5)]
    coordinates = np.array([word["coordinate"] for word in discover(volumes, words=10)])
    gaps = np.linalg.norm(coordinates[:, None] - coordinates[None], axis=-1)[np.triu_indices(len(coordinates), 1)]
    assert len(coordinates) > 4
    assert gaps.min() >= 5
    assert (coordinates >= 0).all()
    assert (coordinates + 16 <= [40, 44, 36]).all()


def test_no_instance_is_lost():
    """The released code drops the last instance of each fold."""
    volumes = [Coordinates(number) for number in range(6)]
    assert all(len(word["volumes"]) == 6 for word in discover(volumes, instances=200))


def test_a_repeated_coordinate_does_not_end_discovery():
    """The released code never resets its `repeated` flag: after one clash it finds nothing more."""
    volumes = [Coordinates(number, (24, 24, 24)) for number in range(12)]
    assert len(discover(volumes, words=12, distance=6.0)) > 5


def test_small_volumes_have_fewer_words_and_every_volume_is_tried_as_reference():
    small = discover([Coordinates(n, (20, 20, 20)) for n in range(4)], words=44)
    large = discover([Coordinates(n) for n in range(4)], words=44)
    assert 0 < len(small) < len(large)
    assert len({word["volumes"][0] for word in large}) == 4


def test_volumes_smaller_than_the_word_have_no_instances():
    volumes = [Coordinates(0), Coordinates(1, (10, 40, 40)), Coordinates(2)]
    assert all(1 not in word["volumes"] for word in discover(volumes))


def test_larger_cubes_are_published_sizes_with_jitter():
    volume = Coordinates(0, (200, 200, 64))
    word = Instance(volume, 3, (60, 60, 10), (64, 64, 32), 1)
    corners, edges = [], []
    for seed in range(200):
        sample = word.sample((64, 64, 32), np.random.default_rng(seed))
        assert sample["word"] == 3
        assert sample["image"].shape == (2, 64, 64, 32)
        x = np.unravel_index((sample["image"][0, :, 0, 0] - 1).round().astype(int), volume.shape)[0]
        corners.append(x[0])
        edges.append(x[-1] - x[0] + 1)
    assert 50 <= min(corners) <= 52
    assert 67 <= max(corners) <= 70
    assert 49 <= min(edges) <= 52
    assert 77 <= max(edges) <= 80


def test_own_size_is_the_crop_itself():
    volume = Coordinates(0)
    sample = Instance(volume, 0, (3, 4, 5), (16, 16, 16), 0).sample((16, 16, 16), np.random.default_rng(0))
    assert np.array_equal(sample["image"], volume.image[:, 3:19, 4:20, 5:21])


def test_deformation_is_scipys():
    cube, seed = image(1, (40, 36, 20)), 4
    got = deform(cube, 991.0, 8.0, np.random.default_rng(seed))
    rng = np.random.default_rng(seed)
    fields = [
        ndimage.gaussian_filter(rng.random((40, 36, 20), dtype=np.float32) * 2 - 1, 8.0, mode="constant") * 991
        for _ in range(2)
    ]
    x, y, z = np.meshgrid(*(np.arange(n) for n in (40, 36, 20)), indexing="ij")
    expected = ndimage.map_coordinates(cube[0], [x + fields[0], y + fields[1], z], order=1, mode="reflect")
    assert np.abs(fields[0]).max() > 1
    np.testing.assert_allclose(got[0], expected, atol=2e-3)


def test_exactly_one_distortion_with_equal_probability():
    perturb = Perturb(TransVW.Config(elastic_alpha=0))
    cube = image(1, (40, 40, 40))
    kinds = {"shuffle": 0, "curve": 0, "in": 0, "out": 0}
    for seed in range(400):
        sample = perturb({"image": cube, "word": 1}, np.random.default_rng(seed))
        assert np.array_equal(sample["target"], cube)
        share = (sample["image"] != cube).mean()
        kinds["shuffle" if share < 0.006 else "in" if share < 0.05 else "out" if share < 0.97 else "curve"] += 1
    assert all(70 < number < 130 for number in kinds.values()), kinds


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


def test_every_in_painted_sample_has_its_box():
    cube = image(1, (40, 40, 40))
    assert all((paint_in(cube, np.random.default_rng(s), least=1, most=1) != cube).any() for s in range(200))


def test_larger_cubes_stay_inside_where_they_fit():
    volume = Coordinates(0, (100, 100, 40))
    for seed in range(50):
        for corner in [(0, 0, 0), (36, 36, 8)]:
            sample = Instance(volume, 0, corner, (64, 64, 32), 2).sample((64, 64, 32), np.random.default_rng(seed))
            assert sample["image"].min() > 0


def test_the_head_has_as_many_classes_as_there_are_words(tmp_path, registry):
    built = MethodFixture(TransVW, registry.load("backbone", "unet"), tmp_path, {"words": "300"}).new()
    number = 1 + max(source.word for source in built.sources)
    assert 2 <= number < 300
    assert built.method.classify.linear.out_features == number


class Shop:
    crop, seed, device = (32, 32, 32), 0, torch.device("cpu")

    def remember(self, name, depends_on, compute):
        return compute()


def test_one_volume_is_an_error():
    made = TransVW(TransVW.Config(), unet())
    with pytest.raises(UserError, match="give at least 2"):
        made.prepare([PhantomVolume(0, 1, (40, 40, 40))], Shop())


def test_losses_have_the_published_weights(monkeypatch):
    made = TransVW(TransVW.Config(words=3, hidden=8), unet())
    logits, target = torch.tensor([[1.0, 2, 3], [3, 2, 1]]), torch.rand(2, 1, 32, 32, 32)
    monkeypatch.setattr(made.classify, "forward", lambda deepest: logits)
    monkeypatch.setattr(made.restore, "forward", lambda features: torch.zeros_like(target))
    word = torch.tensor([2, 0])
    terms = made({"image": torch.rand_like(target), "target": target, "word": word})
    entropy = -torch.log_softmax(logits, dim=1)[0, 2]
    assert terms["classification"].item() == pytest.approx(0.01 * entropy.item(), rel=1e-5)
    assert terms["restoration"].item() == pytest.approx((0.5 - target).square().mean().item(), rel=1e-5)


def test_whole_volumes_are_resized():
    volume = PhantomVolume(0, 2, (20, 30, 10))
    sample = ResizedVolume(volume).sample((16, 16, 16), np.random.default_rng(0))
    assert sample["image"].shape == (2, 16, 16, 16)
    assert sample["image"].mean() == pytest.approx(volume.image.mean(), rel=0.02)
    assert resize(volume.image, (20, 30, 10)) is volume.image
