"""TransVW: self-discovered visual words, classified and restored (Haghighi et al. 2021)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numba import njit
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from scipy import ndimage
from scipy.spatial.distance import cdist
from torch import Tensor, nn

from harness import (
    Backbone,
    Batch,
    Method,
    Preparation,
    Settings,
    Size3,
    Source,
    Transform,
    Triple,
    UserError,
    VolumeSource,
    size_text,
)
from methods.models_genesis import paint_in, paint_out, remap_intensities, shuffle_locally

Image = NDArray[np.float32]
Position = tuple[float, float, float]
ATTEMPTS = 200  # random coordinates tried for a word, as published
SCALES = 3  # each instance is sampled at its own size and at two larger ones, as published


class TransVW(Method):
    """Transferable visual words: the whole method, self-discovery, self-classification and self-restoration.

    Source: Haghighi, Hosseinzadeh Taher, Zhou, Gotway, Liang, "Transferable Visual Words: Exploiting the Semantics of
    Anatomical Patterns for Self-supervised Learning", IEEE TMI 2021, arXiv:2102.10680, sections II-A to II-C; repository
    fhaghighi/TransVW.

    Discovery: an autoencoder computes a code for each volume. A reference volume is drawn, and the volumes with the
    nearest codes are added to it. Their crops at one random coordinate of the reference are the instances of a word. The
    coordinate is its class. If every volume is a member of every word (`instances=1`, two volumes), discovery cannot
    matter: then no autoencoder is trained, and the record says so.

    Pretext task: elastic deformation, then one of four distortions with probability 0.25 each: shuffling (5 windows),
    non-linear intensities, in-painting (one box), out-painting (one box). The loss is 1 * MSE of the restored and the
    undistorted crop + 0.01 * cross-entropy of the word.

    Three points of the released code are not copied: a `repeated` flag is never reset, the last instance of each fold is
    lost, and few volumes satisfy its border of 100 voxels.
    Deviations:
      * The number of instances is a share of the volumes. The released code has 200 of them per word, whatever the data;
        with 200 volumes or fewer that switches discovery off. Its volumes are those of LUNA16, 623 for training and
        validation together, so 200 are 0.32 of them (0.45 of the 445 in the five folds that its configuration trains on).
      * A member is cropped at the corresponding coordinate: the origin has the same relative position between the two
        ends of its range as in the reference. So a member may be smaller than the reference, and words reach all of a
        volume. The released code crops every member at the reference's voxel coordinate, counted from corner 0.
      * The distance of two words is measured in the voxels of the later word's reference. Along an axis on which all
        crops are equal (a volume no longer than the word) there is no distance.
      * Words are crops of `extent` voxels, resized to the training crop. In the released code words have the extent of the
        network's input. Here too, along each axis on which the smallest volume is longer than it by four times
        `distance`, so that words have room. Elsewhere they are smaller, down to half of the smallest volume, and so
        magnified. If fewer coordinates are found, there are fewer words, which is reported.
      * Larger cubes and jitter are proportional to `extent` (released code: 50..79 and -10..9 voxels of 64, in the
        plane). They are drawn for each sample and moved back into the volume. The released code draws them once, and
        redraws those that leave the volume.
      * A coordinate is used if at least a tenth of the reference's crop is not background. The released code has a rule
        for lungs: it rejects cubes of which more than 15 % are denser than -150 HU.
      * A volume may be a reference again, once all volumes have been one. In the released code discovery ends then.
      * The autoencoder has four strided convolutions on the volume resized to 64^3; a code is the mean of 512 channels.
      * AdamW with the harness's schedule and batch replaces Adam (rate 1e-3, halved every 40 epochs, batch 12 by the
        configuration and 64 by the training script, early stopping).
      * Crops are not validated on 30 further instances per word, because pre-training here has a fixed length.
    Modalities share deformation, windows and boxes. Each has its own intensity curve, as in Models Genesis.
    """

    name = "transvw"
    version = "2"
    reference = "Haghighi et al. 2021, doi:10.1109/TMI.2021.3060634; github.com/fhaghighi/TransVW"
    presets = {
        "check": {"method.autoencoder_steps": 2, "method.hidden": 16},
        "demo": {"method.autoencoder_steps": 60},
    }

    class Config(Settings):
        """Settings of TransVW: words and how they are discovered, elastic deformation, weights of the terms."""

        words: int = Field(44, ge=2, description="classes sought; released pre-training")
        instances: float = Field(0.32, gt=0, le=1, description="share of the volumes in a word; 200 of LUNA16's 623")
        distance: float = Field(5.0, gt=0, description="least distance of two words in voxels; released code")
        extent: Size3 | None = Field(
            None, description="of a word in voxels; none: the crop as in released code, less where volumes are small"
        )
        autoencoder_steps: PositiveInt = Field(2000, description="of the autoencoder whose codes compare volumes; here")
        code_size: Size3 = Field((64, 64, 64), description="extent to which volumes are resized for it; here")
        elastic_alpha: float = Field(
            991.0, ge=0, description="strength of the deformation, 0 switches it off; released code"
        )
        elastic_sigma: float = Field(8.0, gt=0, description="its smoothness in voxels; released code")
        restoration: float = Field(1.0, ge=0, description="weight; released code")
        classification: float = Field(0.01, gt=0, description="weight; released code")
        hidden: PositiveInt = Field(1024, description="channels of the classification head; released code")

    config: Config

    def __init__(self, config: Config, backbone: Backbone) -> None:
        super().__init__(config, backbone)
        self.trains = ("encoder", "decoder") if config.restoration else ("encoder",)
        if config.restoration:
            self.restore = nn.Conv3d(backbone.width, backbone.in_channels, kernel_size=1)
        # This head has one output per word sought. `prepare` replaces it if it discovers fewer words.
        self.classify = WordHead(backbone.channels[-1], config.hidden, config.words)

    @classmethod
    def transform(cls, config: Any) -> Transform:
        """Distort each crop in the loader's workers."""
        return Perturb(config)

    def prepare(self, volumes: Sequence[VolumeSource], preparation: Preparation) -> Sequence[Source]:
        """Discover the words. Returns their instances, from which pre-training samples.

        Raises:
            UserError: fewer than two volumes, or fewer than two words.
        """
        config = self.config
        if len(volumes) < 2:
            raise UserError(
                f"transvw finds words that several volumes share, there is {len(volumes)} volume to pre-train on: "
                "give at least 2, better hundreds"
            )
        extent = self._extent(volumes, preparation.crop)
        settings = config.model_dump(
            mode="json", include={"words", "instances", "distance", "autoencoder_steps", "code_size"}
        )
        words = preparation.remember(
            "words", settings | {"extent": extent}, lambda: self._discover(volumes, extent, preparation)
        )
        if len(words) < 2:
            raise UserError(
                f"transvw found {len(words)} words of {size_text(extent)} voxels at least {config.distance:g} voxels "
                "apart, it needs 2 to tell apart: set a smaller method.extent or method.distance"
            )
        if len(words) < config.words:
            self.classify = WordHead(self.backbone.channels[-1], config.hidden, len(words))
        self._report(words, extent, volumes, preparation)
        return [
            Instance(volumes[index], number, tuple(word["position"]), extent, scale)
            for number, word in enumerate(words)
            for index in word["volumes"]
            for scale in range(SCALES)
        ]

    def _report(
        self,
        words: Sequence[dict[str, Any]],
        extent: Triple,
        volumes: Sequence[VolumeSource],
        preparation: Preparation,
    ) -> None:
        """Report how many words and instances there are, and whether the codes had any influence on them."""
        members, able = len(words[0]["volumes"]), len(able_volumes(volumes, extent))
        discovery = members < able
        preparation.report(
            f"transvw: {len(words)} words of {self.config.words} sought, each of {size_text(extent)} voxels in "
            f"{members} of the {able} volumes that hold it"
            + ("; no more coordinates keep their distance" if len(words) < self.config.words else "")
            + ("" if discovery else "; every volume is in every word, so discovery has no effect and no autoencoder is")
            + ("" if discovery else " trained: set a smaller method.instances"),
            words=len(words),
            instances=sum(len(word["volumes"]) for word in words),
            volumes_per_word=members,
            discovery=discovery,
            extent=list(extent),
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Distorted `image` and `target` (N, C, x, y, z), `word` (N,) -> `restoration` and `classification`."""
        config = self.config
        pyramid = self.backbone.encode(batch["image"])
        logits = self.classify(pyramid[-1]).float()
        terms = {"classification": config.classification * F.cross_entropy(logits, batch["word"])}
        if config.restoration:
            restored = self.restore(self.backbone.decode(pyramid)).float().sigmoid()
            terms["restoration"] = config.restoration * (restored - batch["target"]).square().mean()
        return terms

    def show(self, batch: Batch) -> dict[str, Tensor]:
        """The original crop, the distorted one, and the restored one if the restoration term is on."""
        images = {"image": batch["target"], "what it sees": batch["image"]}
        if not self.config.restoration:
            return images
        restored = self.restore(self.backbone.decode(self.backbone.encode(batch["image"]))).float().sigmoid()
        return {**images, "what it restores": restored}

    def _extent(self, volumes: Sequence[VolumeSource], crop: Triple) -> Triple:
        """Extent of a word in voxels: the setting, or the crop where the smallest volume has room for different words."""
        if self.config.extent is not None:
            return self.config.extent
        smallest = np.min([volume.shape for volume in volumes], axis=0)
        room = round(4 * self.config.distance)
        x, y, z = (
            max(1, min(edge, max(int(least) // 2, int(least) - room)))
            for edge, least in zip(crop, smallest, strict=True)
        )
        return x, y, z

    def _discover(
        self, volumes: Sequence[VolumeSource], extent: Triple, preparation: Preparation
    ) -> list[dict[str, Any]]:
        """Discover the words, with codes of a trained autoencoder if they make a difference."""
        config = self.config
        able = len(able_volumes(volumes, extent))
        codes: NDArray[Any] = np.zeros((len(volumes), 1))
        if num_members(able, config.instances) < able:
            whole = [ResizedVolume(volume) for volume in volumes]
            autoencoder = Autoencoder(self.backbone.in_channels)
            preparation.train(
                autoencoder, whole, size=config.code_size, steps=config.autoencoder_steps, batch_size=4, lr=1e-3
            )
            codes = autoencoder.codes(whole, config.code_size, preparation.device)
        return discover_words(
            volumes,
            codes,
            extent,
            config.words,
            config.instances,
            config.distance,
            np.random.default_rng(preparation.seed),
        )


def discover_words(
    volumes: Sequence[VolumeSource],
    codes: NDArray[Any],
    extent: Triple,
    number: int,
    instances: float,
    distance: float,
    rng: np.random.Generator,
) -> list[dict[str, Any]]:
    """Words as `{"position": [x, y, z], "volumes": [index, ...]}`, the reference volume first.

    A position is that of a crop's origin between the two ends of its range, 0..1 along each axis (see `origin_at`).

    Args:
        codes: one row per volume.
        extent: size of a word in voxels. Smaller volumes are in no word.
        number: words sought.
        instances: share of the able volumes that a word has as members.
        distance: least Euclidean distance between two coordinates, in voxels of the later word's reference.
    """
    able = able_volumes(volumes, extent)
    members = num_members(len(able), instances)
    if len(able) < 2:
        return []
    nearest = cdist(codes[able], codes[able]).argsort(axis=1, kind="stable")
    words: list[dict[str, Any]] = []
    references: list[int] = []
    failures = 0  # consecutive references without a word; when every volume has failed, discovery ends
    while len(words) < number and failures < len(able):
        if not references:
            references = [int(row) for row in rng.permutation(len(able))]
        row = references.pop()
        failures += 1
        # Other volumes with an equal code are at distance 0 as well, so the reference is put first explicitly.
        order = [row, *(int(other) for other in nearest[row] if other != row)]
        taken = [word["position"] for word in words]
        position = _free_position(volumes[able[row]], extent, taken, distance, rng)
        if position is not None:
            words.append({"position": position, "volumes": [able[other] for other in order[:members]]})
            failures = 0
    return words


def able_volumes(volumes: Sequence[VolumeSource], extent: Triple) -> list[int]:
    """Indices of the volumes that hold a crop of this extent."""
    return [index for index, volume in enumerate(volumes) if (np.array(volume.shape) >= extent).all()]


def num_members(able: int, share: float) -> int:
    """Volumes per word: a share of the volumes that hold it, and at least two, because one volume shares nothing."""
    return min(able, max(2, round(share * able)))


def origin_at(position: Sequence[float], shape: Sequence[int], extent: Sequence[int]) -> Triple:
    """Origin in voxels of the crop at a relative position of a volume: 0 is the first possible origin, 1 the last one."""
    room = np.array(shape) - extent
    x, y, z = (int(value) for value in np.round(np.array(position) * room))
    return x, y, z


def _free_position(
    reference: VolumeSource,
    extent: Triple,
    taken: Sequence[Sequence[float]],
    distance: float,
    rng: np.random.Generator,
) -> list[float] | None:
    """Relative position of a random crop that is not background and `distance` voxels from those `taken`, or None."""
    room: NDArray[np.int64] = np.array(reference.shape, dtype=np.int64) - np.array(extent, dtype=np.int64)
    others = np.array(taken).reshape(-1, 3) * room
    for _ in range(ATTEMPTS):
        coordinate = rng.integers(0, room + 1)
        if len(others) and cdist(others, coordinate[None]).min() < distance:
            continue
        # The value 0.001 of preprocessed images stands for background and for the lower end of the intensity window.
        if (reference.crop(coordinate.tolist(), extent) > 0.002).mean() >= 0.1:
            return [float(value) for value in coordinate / np.maximum(room, 1)]
    return None


@dataclass(frozen=True)
class Instance:
    """The crop of one volume at the position of a word.

    Attributes:
        volume: the volume that is cropped.
        word: class of the word.
        position: of the crop's origin, relative to its range in the volume (see `origin_at`).
        extent: size of the crop in voxels.
        scale: 0 for exactly this crop, 1 or 2 for a larger and shifted one.
    """

    volume: VolumeSource
    word: int
    position: Position
    extent: Triple
    scale: int

    @property
    def coordinate(self) -> Triple:
        """Origin of the crop in voxels of its volume."""
        return origin_at(self.position, self.volume.shape, self.extent)

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """`image` (C, *size) and `word`. A larger cube that does not fit the volume is padded with zeros."""
        origin, extent = np.array(self.coordinate), np.array(self.extent)
        if self.scale:
            # Published values: edges of 50..79 and shifts of -10..9 voxels, in the plane, for words of 64 voxels.
            larger = extent[:2] * rng.integers(50, 80) / 64
            shift = extent[:2] * rng.integers(-10, 10, size=2) / 64
            extent[:2], origin[:2] = np.maximum(1, np.round(larger)), origin[:2] + np.round(shift).astype(int)
            # The cube is moved back into the volume, as published cubes lie inside. Padding would reveal the position.
            origin = np.clip(origin, 0, np.maximum(0, np.array(self.volume.shape) - extent))
        crop = self.volume.crop(origin.tolist(), extent.tolist())
        return {"image": resize(crop, size), "word": np.int64(self.word)}


@dataclass(frozen=True)
class ResizedVolume:
    """A whole volume, resized: the input of the autoencoder."""

    volume: VolumeSource

    def sample(self, size: Triple, rng: np.random.Generator) -> dict[str, Any]:
        """The volume as `image` (C, *size)."""
        return {"image": resize(self.volume.image, size)}


class Autoencoder(nn.Module):
    """Encodes volumes (N, C, x, y, z) as codes of 512 numbers; trained to restore the volumes."""

    def __init__(self, in_channels: int) -> None:
        super().__init__()
        widths = (in_channels, 16, 32, 64, 512)
        steps = list(pairwise(widths))
        self.encoder = nn.Sequential(
            *(nn.Sequential(nn.Conv3d(a, b, kernel_size=3, stride=2, padding=1), nn.LeakyReLU(0.1)) for a, b in steps)
        )
        self.decoder = nn.Sequential(
            *(
                nn.Sequential(nn.LeakyReLU(0.1), nn.ConvTranspose3d(b, a, kernel_size=2, stride=2))
                for a, b in reversed(steps)
            )
        )

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """`image` (N, C, x, y, z) -> `restoration`, mean squared error."""
        image = batch["image"]
        restored = F.interpolate(self.decoder(self.encoder(image)).float(), size=image.shape[2:])
        return {"restoration": (restored - image).square().mean()}

    @torch.inference_mode()
    def codes(self, volumes: Sequence[Source], size: Triple, device: torch.device) -> NDArray[np.float32]:
        """One code per volume, (volumes, 512)."""
        self.eval()
        rng = np.random.default_rng(0)  # required by `sample`; whole volumes draw nothing
        rows = []
        for volume in volumes:
            image = torch.from_numpy(volume.sample(size, rng)["image"])[None].to(device)
            rows.append(self.encoder(image).float().mean(dim=(2, 3, 4))[0].cpu().numpy())
        return np.stack(rows)


class WordHead(nn.Module):
    """Deepest features -> word logits: convolution, batch norm with the batch's statistics, pooling, linear layer."""

    def __init__(self, channels: int, hidden: int, words: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(channels, hidden, kernel_size=3, padding=1, bias=False)
        self.norm = nn.BatchNorm3d(hidden, track_running_stats=False)
        self.linear = nn.Linear(hidden, words)

    def forward(self, deepest: Tensor) -> Tensor:
        """Deepest features (N, channels, x, y, z) -> logits (N, words)."""
        logits: Tensor = self.linear(F.relu(self.norm(self.conv(deepest))).mean(dim=(2, 3, 4)))
        return logits


class Perturb:
    """Elastic deformation, then exactly one of four distortions."""

    def __init__(self, config: TransVW.Config) -> None:
        self.config = config

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """`image` (C, x, y, z) in [0, 1] -> distorted `image` and undistorted `target`; `word` is unchanged."""
        target = image = np.ascontiguousarray(sample["image"])
        if self.config.elastic_alpha:
            image = deform(image, self.config.elastic_alpha, self.config.elastic_sigma, rng)
        kind = rng.integers(4)
        if kind == 0:
            image = shuffle_locally(image, 5, rng)
        elif kind == 1:
            image = remap_intensities(image, rng)
        elif kind == 2:
            image = paint_in(image, rng, least=1, most=1)
        else:
            image = paint_out(image, rng, most=1)
        return {**sample, "image": image, "target": target}


def deform(image: Image, alpha: float, sigma: float, rng: np.random.Generator) -> Image:
    """Elastic deformation of (C, x, y, z) in the plane of the first two axes.

    The displacements in voxels are noise in -1..1, Gaussian-filtered with `sigma` voxels and zero padding, times `alpha`.
    Intensities are interpolated linearly and reflected at the border.
    """
    extent = image.shape[1:]
    filters = [_gaussian(length, sigma) for length in extent]
    fields = []
    for _ in range(2):
        noise = rng.random(extent, dtype=np.float32) * 2 - 1
        # The filter is separable. One matrix product per axis is much faster than a convolution with 65 taps.
        smooth = filters[0] @ noise.reshape(extent[0], -1)
        smooth = np.matmul(filters[1], smooth.reshape(extent)) @ filters[2].T
        fields.append(np.ascontiguousarray(smooth * np.float32(alpha), dtype=np.float32))
    return _warp(image, *fields)


def _gaussian(length: int, sigma: float) -> Image:
    """The filter of `scipy.ndimage.gaussian_filter1d(mode="constant")` as a matrix (length, length)."""
    impulses = np.eye(length, dtype=np.float64)
    return ndimage.gaussian_filter1d(impulses, sigma, axis=0, mode="constant").astype(np.float32)


@njit(cache=True)
def _reflect(position: float, length: int) -> float:
    """Reflect a position into -0.5..length - 0.5, as scipy's mode "reflect" does, then clip it to 0..length - 1."""
    period = 2.0 * length
    position = (position + 0.5) % period
    if position >= length:
        position = period - position
    return min(max(position - 0.5, 0.0), length - 1.0)


@njit(cache=True)
def _warp(image: Image, down: Image, across: Image) -> Image:
    """Sample (C, x, y, z) at positions displaced by `down` along x and by `across` along y, both (x, y, z) in voxels."""
    channels, nx, ny, nz = image.shape
    warped = np.empty_like(image)
    for i in range(nx):
        for j in range(ny):
            for k in range(nz):
                x, y = _reflect(i + down[i, j, k], nx), _reflect(j + across[i, j, k], ny)
                a, b = min(int(x), max(nx - 2, 0)), min(int(y), max(ny - 2, 0))
                p, q = np.float32(x - a), np.float32(y - b)
                a1, b1 = min(a + 1, nx - 1), min(b + 1, ny - 1)
                for c in range(channels):
                    near = image[c, a, b, k] * (1 - q) + image[c, a, b1, k] * q
                    far = image[c, a1, b, k] * (1 - q) + image[c, a1, b1, k] * q
                    warped[c, i, j, k] = near * (1 - p) + far * p
    return warped


def resize(image: Image, size: Triple) -> Image:
    """(C, x, y, z) -> (C, *size), trilinear. The box in space stays the same."""
    if image.shape[1:] == tuple(size):
        return image
    resized: Image = F.interpolate(torch.from_numpy(image)[None], size=size, mode="trilinear", align_corners=False)[
        0
    ].numpy()
    return resized
