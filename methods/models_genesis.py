"""Models Genesis: restore a crop from its distortions (Zhou et al. 2021)."""

from functools import cache
from typing import Any

import numpy as np
from numba import njit
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn

from harness import Backbone, Batch, Method, Settings, Transform

Image = NDArray[np.float32]


class ModelsGenesis(Method):
    """Restoration from local shuffling, non-linear intensities, in-painting and out-painting.

    Source: Zhou, Sodha, Pang, Gotway, Liang, "Models Genesis", Medical Image Analysis 67, 2021, sections 2.1-2.3; repository
    MrGiovanni/ModelsGenesis, whose distributions and order these are: flip (image and target alike), local shuffling,
    non-linear intensities, then in- or out-painting. Loss: mean squared error over all voxels, through a sigmoid.

    Several modalities (the published network has one channel): shuffling moves voxels, so all modalities move alike; painting
    hides a place, so it hides it in all of them, or one modality would show what another hides. Intensities belong to a
    modality, so each has a curve of its own; so has the noise.

    Deviations:
      * AdamW with the harness's schedule instead of SGD (rate 1, momentum 0.9, halved every 40 epochs).
      * Curves are looked up in a table of 2048 steps (there: interpolated between 100,000 sorted points).
      * Crops too short for the margin of 3 get a smaller one.
    """

    name = "models_genesis"
    reference = "Zhou et al. 2021, doi:10.1016/j.media.2020.101840; github.com/MrGiovanni/ModelsGenesis"

    class Config(Settings):
        flip: float = Field(0.4, ge=0, lt=1, description="probability of each of up to three flips; released code")
        shuffle: float = Field(0.5, ge=0, le=1, description="probability of local shuffling; released code")
        windows: PositiveInt = Field(10_000, description="shuffled windows; released code")
        nonlinear: float = Field(0.9, ge=0, le=1, description="probability of non-linear intensities; released code")
        paint: float = Field(0.9, ge=0, le=1, description="probability of painting; released code")
        inpaint: float = Field(
            0.2, ge=0, le=1, description="share of in-painting, the rest is out-painting; released code"
        )

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.restore = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)

    @classmethod
    def transform(cls, config: Any) -> Transform:
        return Distort(config)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` distorted and `target` whole, both (N, C, x, y, z) -> `restoration`, mean squared error."""
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return {"restoration": (self.restore(features).float().sigmoid() - batch["target"]).square().mean()}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        restored = self.restore(features).float().sigmoid()
        return {"image": batch["target"], "what it sees": batch["image"], "what it restores": restored}


class Distort:
    """The published pair: the crop (flipped) as target, and what the distortions make of it."""

    def __init__(self, config: ModelsGenesis.Config) -> None:
        self.config = config

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """`image` (C, x, y, z) in [0, 1] -> `image` distorted, `target` not."""
        config = self.config
        target = np.ascontiguousarray(random_flips(sample["image"], config.flip, rng))
        image = target
        if rng.random() < config.shuffle:
            image = shuffle_locally(image, config.windows, rng)
        if rng.random() < config.nonlinear:
            image = remap_intensities(image, rng)
        if rng.random() < config.paint:
            image = paint_in(image, rng) if rng.random() < config.inpaint else paint_out(image, rng)
        return {**sample, "image": np.ascontiguousarray(image), "target": target}


def random_flips(image: Image, probability: float, rng: np.random.Generator) -> Image:
    """(C, x, y, z) flipped along a random axis, up to three times; goes on with `probability`."""
    for _ in range(3):
        if rng.random() >= probability:
            break
        image = np.flip(image, axis=int(rng.integers(1, 4)))
    return image


def shuffle_locally(image: Image, windows: int, rng: np.random.Generator) -> Image:
    """Windows of up to a tenth of each edge, each filled with a permutation of the original's voxels there.

    Later windows overwrite earlier ones; every window draws from the undistorted (C, x, y, z), not from the result.
    """
    longest = np.maximum(np.asarray(image.shape[1:]) // 10, 1)
    shuffled = image.copy()
    _shuffle(np.ascontiguousarray(image), shuffled, longest, windows, np.uint64(rng.integers(1, 2**63)))
    return shuffled


def remap_intensities(image: Image, rng: np.random.Generator) -> Image:
    """Each channel of (C, x, y, z) in [0, 1] through a curve of its own, rising or falling with equal probability."""
    return np.stack([_look_up(channel, random_curve(rng)) for channel in image])


def random_curve(rng: np.random.Generator, steps: int = 2048, points: int = 4096) -> Image:
    """Values of a random curve at `steps` + 1 even places of [0, 1].

    A cubic Bezier through (0, 0), two uniform points and (1, 1); its coordinates are sorted, both for a rising curve and
    the horizontal one only for a falling one, as published.
    """
    basis = _bezier_basis(points)
    inner = rng.random((2, 2))
    x, y = (np.array([0, inner[0, axis], inner[1, axis], 1]) @ basis for axis in (0, 1))
    x.sort()
    if rng.random() >= 0.5:
        y.sort()
    return np.interp(np.linspace(0, 1, steps + 1), x, y).astype(np.float32)


@cache
def _bezier_basis(points: int) -> NDArray[np.float64]:
    """Weights of the four control points at `points` places along the curve, (4, points)."""
    t = np.linspace(0, 1, points)
    return np.stack([t**3, 3 * t**2 * (1 - t), 3 * t * (1 - t) ** 2, (1 - t) ** 3])


def paint_in(image: Image, rng: np.random.Generator, least: int = 0, most: int = 5) -> Image:
    """`least` to `most` boxes (going on with probability 0.95) of a sixth to a third of each edge, filled with noise."""
    painted, extent = image.copy(), np.asarray(image.shape[1:])
    for number in range(most):
        if number >= least and rng.random() >= 0.95:
            break
        box = _box(extent, rng.integers(np.maximum(extent // 6, 1), np.maximum(extent // 3, 1) + 1), rng)
        painted[box] = rng.random(painted[box].shape, dtype=np.float32)
    return painted


def paint_out(image: Image, rng: np.random.Generator, most: int = 5) -> Image:
    """Noise everywhere but in one box and up to `most` - 1 more, each of 3/7 to 4/7 of each edge less than the edge."""
    extent = np.asarray(image.shape[1:])
    painted = rng.random(image.shape, dtype=np.float32)
    for number in range(most):
        if number and rng.random() >= 0.95:
            break
        box = _box(extent, extent - rng.integers(3 * extent // 7, 4 * extent // 7 + 1), rng)
        painted[box] = image[box]
    return painted


def _box(extent: NDArray[Any], size: NDArray[Any], rng: np.random.Generator) -> tuple[slice, ...]:
    """A box of that size at a random place, three voxels from the border where there is room."""
    margin = np.minimum(3, (extent - size) // 2)
    start = rng.integers(margin, extent - size - margin + 1)
    return (slice(None), *(slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True)))


@njit(cache=True, inline="always")
def _next(state: Any) -> Any:
    """One step of xorshift64: small and fast, seeded from the sample's own generator."""
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    state ^= state << np.uint64(17)
    return state


@njit(cache=True, inline="always")
def _below(state: Any, limit: int) -> Any:
    """A whole number in 0..limit - 1, from the upper half of the state by multiplication."""
    return np.int64(((state >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32))


@njit(cache=True)
def _shuffle(original: Image, shuffled: Image, longest: NDArray[np.int64], windows: int, state: Any) -> None:
    """Windows are drawn from the last to the first, so that only what no later one overwrites is permuted at all."""
    channels, nx, ny, nz = original.shape
    source, target = original.reshape(channels, -1), shuffled.reshape(channels, -1)
    most = longest[0] * longest[1] * longest[2]
    order, vacant = np.empty(most, np.int64), np.empty(most, np.int64)
    written = np.zeros(nx * ny * nz, np.bool_)
    for _ in range(windows):
        state = _next(state)
        a = 1 + _below(state, longest[0])
        state = _next(state)
        b = 1 + _below(state, longest[1])
        state = _next(state)
        c = 1 + _below(state, longest[2])
        state = _next(state)
        x = _below(state, nx - a + 1)
        state = _next(state)
        y = _below(state, ny - b + 1)
        state = _next(state)
        z = _below(state, nz - c + 1)
        count = free = 0
        for i in range(x, x + a):
            for j in range(y, y + b):
                first = (i * ny + j) * nz + z
                for place in range(first, first + c):
                    order[count] = place
                    count += 1
                    if not written[place]:
                        vacant[free] = place
                        free += 1
        for number in range(free):
            # The first steps of a Fisher-Yates shuffle: as many draws without replacement as there are vacancies.
            state = _next(state)
            other = number + _below(state, count - number)
            drawn = order[other]
            order[other] = order[number]
            written[vacant[number]] = True
            for channel in range(channels):
                target[channel, vacant[number]] = source[channel, drawn]


@njit(cache=True)
def _look_up(channel: Image, curve: Image) -> Image:
    """(x, y, z) in [0, 1] through the curve, linear between its steps."""
    last = len(curve) - 1
    mapped = np.empty_like(channel)
    source, target = channel.ravel(), mapped.ravel()
    for index in range(source.size):
        place = min(max(source[index], np.float32(0)), np.float32(1)) * last
        step = min(int(place), last - 1)
        share = place - step
        target[index] = curve[step] * (1 - share) + curve[step + 1] * share
    return mapped
