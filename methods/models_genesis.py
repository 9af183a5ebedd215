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

    Source: Zhou, Sodha, Pang, Gotway, Liang, "Models Genesis", Medical Image Analysis 67, 2021, sections 2.1-2.3;
    repository MrGiovanni/ModelsGenesis. Distributions and order are those of the repository: flip (image and target
    alike), local shuffling, non-linear intensities, then in-painting or out-painting. The loss is the mean squared error
    over all voxels, after a sigmoid.

    The published network has one channel. With several modalities:
      * Shuffling moves the voxels of all modalities alike.
      * Painting hides the same box in all modalities. Otherwise one modality would show what another one hides.
      * Intensities belong to one modality, so each modality has its own curve and its own noise.

    Deviations:
      * AdamW with the harness's schedule, batch and fixed length replaces SGD (rate 1, momentum 0.9, no weight decay,
        halved every 40 epochs, batch 6, at most 10,000 epochs, early stopping after 50 without a better validation).
      * Every crop is used, from anywhere in the volume. The released generator of cubes (`infinite_generator_3D.py`) is
        made for lungs in CT: it stores 32 cubes per scan, at least 100 voxels (30 along z) from its border, and rejects
        a cube if more than 15 % of it is denser than -150 HU. (A voxel counts half if it is not dense, but the next one
        along z is.) On other organs this rule would reject nearly everything.
      * The crop has the extent of the preset (released code: 64x64x32).
      * Curves are looked up in a table of 2048 steps. The repository interpolates between 100,000 sorted points.
      * Crops that are too short for the margin of 3 voxels get a smaller margin.
    """

    name = "models_genesis"
    reference = "Zhou et al. 2021, doi:10.1016/j.media.2020.101840; github.com/MrGiovanni/ModelsGenesis"

    class Config(Settings):
        """Settings of Models Genesis: probabilities of the distortions and number of shuffled windows."""

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
        """Distort each crop in the loader's workers."""
        return Distort(config)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Distorted `image` and original `target`, both (N, C, x, y, z) -> `restoration`, mean squared error."""
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        return {"restoration": (self.restore(features).float().sigmoid() - batch["target"]).square().mean()}

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The original crop, the distorted one, and the restored one."""
        features = self.backbone.decode(self.backbone.encode(batch["image"]))
        restored = self.restore(features).float().sigmoid()
        return {"image": batch["target"], "what it sees": batch["image"], "what it restores": restored}


class Distort:
    """The published transform: the flipped crop is the target, its distorted copy is the input."""

    def __init__(self, config: ModelsGenesis.Config) -> None:
        self.config = config

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """`image` (C, x, y, z) in [0, 1] -> distorted `image` and undistorted `target`."""
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
    """Flip (C, x, y, z) along random axes, up to three times. Each flip happens with `probability`, else flipping ends."""
    for _ in range(3):
        if rng.random() >= probability:
            break
        image = np.flip(image, axis=int(rng.integers(1, 4)))
    return image


def shuffle_locally(image: Image, windows: int, rng: np.random.Generator) -> Image:
    """Permute the voxels of (C, x, y, z) inside random windows, whose edges are up to a tenth of the image's edges.

    Later windows overwrite earlier ones. Every window permutes voxels of the original image, not of the result.
    """
    longest = np.maximum(np.asarray(image.shape[1:]) // 10, 1)
    shuffled = image.copy()
    _shuffle(np.ascontiguousarray(image), shuffled, longest, windows, np.uint64(rng.integers(1, 2**63)))
    return shuffled


def remap_intensities(image: Image, rng: np.random.Generator) -> Image:
    """Map each channel of (C, x, y, z) in [0, 1] by its own curve, which rises or falls with equal probability."""
    return np.stack([_look_up(channel, random_curve(rng)) for channel in image])


def random_curve(rng: np.random.Generator, steps: int = 2048, points: int = 4096) -> Image:
    """Values of a random curve at `steps` + 1 evenly spaced positions in [0, 1].

    The curve is a cubic Bezier with control points (0, 0), two uniform points and (1, 1). As published, both coordinates
    are sorted for a rising curve, and only the horizontal coordinate for a falling one.
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
    """Weights of the four control points at `points` positions along the curve, (4, points)."""
    t = np.linspace(0, 1, points)
    return np.stack([t**3, 3 * t**2 * (1 - t), 3 * t * (1 - t) ** 2, (1 - t) ** 3])


def paint_in(image: Image, rng: np.random.Generator, least: int = 0, most: int = 5) -> Image:
    """Fill boxes of (C, x, y, z) with noise. The edges of a box are a sixth to a third of the image's edges.

    There are at least `least` and at most `most` boxes. After `least`, each further box follows with probability 0.95.
    """
    painted, extent = image.copy(), np.asarray(image.shape[1:])
    for number in range(most):
        if number >= least and rng.random() >= 0.95:
            break
        box = _box(extent, rng.integers(np.maximum(extent // 6, 1), np.maximum(extent // 3, 1) + 1), rng)
        painted[box] = rng.random(painted[box].shape, dtype=np.float32)
    return painted


def paint_out(image: Image, rng: np.random.Generator, most: int = 5) -> Image:
    """Replace (C, x, y, z) by noise outside 1 to `most` boxes.

    Each edge of a box is 3/7 to 4/7 of the image's edge shorter than it. After the first box, each further box follows
    with probability 0.95.
    """
    extent = np.asarray(image.shape[1:])
    painted = rng.random(image.shape, dtype=np.float32)
    for number in range(most):
        if number and rng.random() >= 0.95:
            break
        box = _box(extent, extent - rng.integers(3 * extent // 7, 4 * extent // 7 + 1), rng)
        painted[box] = image[box]
    return painted


def _box(extent: NDArray[Any], size: NDArray[Any], rng: np.random.Generator) -> tuple[slice, ...]:
    """Slices of a box of this size at a random position, at least three voxels from the border if there is room."""
    margin = np.minimum(3, (extent - size) // 2)
    start = rng.integers(margin, extent - size - margin + 1)
    return (slice(None), *(slice(int(a), int(a + n)) for a, n in zip(start, size, strict=True)))


@njit(cache=True, inline="always")
def _next(state: Any) -> Any:
    """One step of xorshift64, which is small and fast. Its seed comes from the sample's own generator."""
    state ^= state << np.uint64(13)
    state ^= state >> np.uint64(7)
    state ^= state << np.uint64(17)
    return state


@njit(cache=True, inline="always")
def _integer_below(state: Any, limit: int) -> Any:
    """An integer in 0..limit - 1: the upper half of the state, times `limit`, divided by 2^32."""
    return np.int64(((state >> np.uint64(32)) * np.uint64(limit)) >> np.uint64(32))


@njit(cache=True)
def _shuffle(original: Image, shuffled: Image, longest: NDArray[np.int64], windows: int, state: Any) -> None:
    """Fill `shuffled` with the permuted windows of `original`.

    Windows are drawn from the last to the first. A voxel that a later window has written already is skipped, so only
    voxels that stay in the result are permuted.
    """
    channels, nx, ny, nz = original.shape
    source, target = original.reshape(channels, -1), shuffled.reshape(channels, -1)
    most = longest[0] * longest[1] * longest[2]
    order, vacant = np.empty(most, np.int64), np.empty(most, np.int64)
    written = np.zeros(nx * ny * nz, np.bool_)
    for _ in range(windows):
        state = _next(state)
        a = 1 + _integer_below(state, longest[0])
        state = _next(state)
        b = 1 + _integer_below(state, longest[1])
        state = _next(state)
        c = 1 + _integer_below(state, longest[2])
        state = _next(state)
        x = _integer_below(state, nx - a + 1)
        state = _next(state)
        y = _integer_below(state, ny - b + 1)
        state = _next(state)
        z = _integer_below(state, nz - c + 1)
        count = free = 0
        for i in range(x, x + a):
            for j in range(y, y + b):
                first = (i * ny + j) * nz + z
                for voxel in range(first, first + c):
                    order[count] = voxel
                    count += 1
                    if not written[voxel]:
                        vacant[free] = voxel
                        free += 1
        for number in range(free):
            # The first steps of a Fisher-Yates shuffle: one draw without replacement for every vacant voxel.
            state = _next(state)
            other = number + _integer_below(state, count - number)
            drawn = order[other]
            order[other] = order[number]
            written[vacant[number]] = True
            for channel in range(channels):
                target[channel, vacant[number]] = source[channel, drawn]


@njit(cache=True)
def _look_up(channel: Image, curve: Image) -> Image:
    """Map (x, y, z) in [0, 1] by the curve, with linear interpolation between its steps."""
    last = len(curve) - 1
    mapped = np.empty_like(channel)
    source, target = channel.ravel(), mapped.ravel()
    for index in range(source.size):
        position = min(max(source[index], np.float32(0)), np.float32(1)) * last
        step = min(int(position), last - 1)
        share = position - step
        target[index] = curve[step] * (1 - share) + curve[step + 1] * share
    return mapped
