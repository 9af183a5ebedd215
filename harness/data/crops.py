"""Random crops from preprocessed volumes.

Sample i is a function of (seed, i) alone, so the number of workers and resuming do not change it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from harness.api.method import Transform
from harness.api.settings import Triple
from harness.api.task import Task
from harness.data.arrays import cut, origins, random_origin
from harness.data.volumes import Volume


@dataclass(frozen=True)
class Warp:
    """A linear map about the centre of a crop, with linear interpolation.

    Attributes:
        matrix: (3, 3); the offset of a voxel of the crop from its centre -> the offset at which the volume is read.
    """

    matrix: NDArray[np.float64]

    def margin(self, size: Triple) -> Triple:
        """Voxels beyond a crop of `size` that it reads on each side."""
        half = (np.asarray(size) - 1) / 2
        x, y, z = np.maximum(0, np.ceil(np.abs(self.matrix) @ half - half - 1e-9)).astype(int).tolist()
        return x, y, z

    def image(self, larger: NDArray[np.float32], size: Triple) -> NDArray[np.float32]:
        """A crop (C, *size), from one that is larger by the margin on each side."""
        warped: NDArray[np.float32] = self._sample(torch.from_numpy(larger), size).numpy()
        return warped

    def label(self, larger: NDArray[np.uint8], size: Triple) -> NDArray[np.uint8]:
        """A label map, as `image`: each value is interpolated as a mask, and the largest mask wins."""
        values = np.unique(larger)
        if len(values) == 1:
            return np.full(size, values[0], np.uint8)
        masks = torch.from_numpy(larger[None] == values[:, None, None, None]).float()
        winners: NDArray[np.uint8] = values[self._sample(masks, size).argmax(dim=0).numpy()]
        return winners

    def _sample(self, larger: Tensor, size: Triple) -> Tensor:
        """(C, *larger) float32 -> (C, *size)."""
        new, old = ((np.asarray(extent) - 1) / 2 for extent in (size, larger.shape[1:]))
        # In PyTorch's coordinates, an image ends at -1 and 1, and the last axis comes first.
        relative = self.matrix * new[None, :] / np.maximum(old, 0.5)[:, None]
        theta = np.pad(relative[::-1, ::-1], ((0, 0), (0, 1)))
        grid = F.affine_grid(torch.tensor(theta[None], dtype=torch.float32), [1, 1, *size], align_corners=True)
        return F.grid_sample(larger[None], grid, padding_mode="border", align_corners=True)[0]


DrawWarp = Callable[[Triple, np.random.Generator], Warp | None]
"""Draws the warp of a crop from its extent; None leaves the crop as it is."""


class CropDataset(Dataset[dict[str, Any]]):
    """A data set of `length` crops. Each pass uses every source once, in a new order.

    Args:
        sources: preprocessed volumes, or any other objects that have `sample` (see `harness.api.method.Source`).
        size: extent (x, y, z) of a crop in voxels; a smaller volume is placed at a random position and padded with zeros.
        transform: applied to each sample, with a random generator of its own for each sample.
        task: makes the crops labelled: a sample then holds `target` too.
        foreground: share of the labelled crops that are centred on a labelled voxel (each target equally likely).
        exact_batch: size of the batches that have exactly this share, in their last crops; 0: each crop by chance.
        draw_warp: turns and scales labelled crops.
    """

    def __init__(
        self,
        sources: Sequence[Any],
        size: tuple[int, int, int],
        length: int,
        seed: int,
        transform: Transform | None = None,
        task: Task | None = None,
        foreground: float = 0.0,
        exact_batch: int = 0,
        draw_warp: DrawWarp | None = None,
    ) -> None:
        self.sources, self.size, self.length, self.seed = sources, size, length, seed
        self.transform, self.task, self.foreground = transform, task, foreground
        self.exact_batch, self.draw_warp = exact_batch, draw_warp

    def __len__(self) -> int:
        return self.length

    def name(self, index: int) -> str:
        """Id of the case that sample `index` comes from; "?" if the source does not say."""
        source = self._source(index)
        case = getattr(getattr(source, "volume", source), "case", None)
        return str(getattr(case, "id", "?"))

    def _source(self, index: int) -> Any:
        """The source of sample `index`."""
        epoch, position = divmod(index, len(self.sources))
        return self.sources[_order(self.seed, epoch, len(self.sources))[position]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        rng = np.random.default_rng((self.seed, index))
        source = self._source(index)
        sample = source.sample(self.size, rng) if self.task is None else self._labelled(index, source, self.task, rng)
        return self.transform(sample, rng) if self.transform else sample

    def _labelled(self, index: int, volume: Volume, task: Task, rng: np.random.Generator) -> dict[str, Any]:
        """A crop with its target."""
        warp = self.draw_warp(self.size, rng) if self.draw_warp else None
        margin = (0, 0, 0) if warp is None else warp.margin(self.size)
        origin = [at - edge for at, edge in zip(self._origin(index, volume, rng), margin, strict=True)]
        x, y, z = (edge + 2 * more for edge, more in zip(self.size, margin, strict=True))
        image, label = volume.crop(origin, (x, y, z)), cut(volume.label[None], origin, (x, y, z))[0]
        if warp is not None:
            image, label = warp.image(image, self.size), warp.label(label, self.size)
        return {"image": image, "target": task.training_target(label)}

    def _origin(self, index: int, volume: Volume, rng: np.random.Generator) -> list[int]:
        """Where a crop begins: at random, or so that it is centred on a labelled voxel (each target equally likely)."""
        if self.exact_batch:
            centred = index % self.exact_batch >= round(self.exact_batch * (1 - self.foreground))
        else:
            centred = bool(self.foreground) and rng.random() < self.foreground
        points = volume.points if centred else np.empty((0, 4), np.int32)
        if not len(points):
            return random_origin(volume.shape, self.size, rng)
        low, high = origins(volume.shape, self.size)
        rows = points[points[:, 0] == rng.choice(np.unique(points[:, 0]))]
        centre = rows[rng.integers(len(rows)), 1:] - np.asarray(self.size) // 2
        return [int(value) for value in np.clip(centre, low, high)]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, number: int) -> list[int]:
    """Random order of `number` sources in a pass."""
    # The third number makes this random stream differ from those of the samples, which are seeded with (seed, index).
    return [int(index) for index in np.random.default_rng((seed, epoch, 1)).permutation(number)]
