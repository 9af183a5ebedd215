"""Random crops from preprocessed volumes.

Sample i is a function of (seed, i) alone, so the number of workers and resuming do not change it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from harness.api.method import Transform
from harness.api.task import Task
from harness.data.arrays import cut, origins, random_origin
from harness.data.volumes import Volume


class CropDataset(Dataset[dict[str, Any]]):
    """A data set of `length` crops. Each pass uses every source once, in a new order.

    Args:
        sources: preprocessed volumes, or any other objects that have `sample` (see `harness.api.method.Source`).
        size: extent (x, y, z) of a crop in voxels; a smaller volume is placed at a random position and padded with zeros.
        transform: applied to each sample, with a random generator of its own for each sample.
        task: makes the crops labelled: a sample then holds `target` too.
        foreground: share of the labelled crops that are centred on a labelled voxel (each target equally likely).
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
    ) -> None:
        self.sources, self.size, self.length, self.seed = sources, size, length, seed
        self.transform, self.task, self.foreground = transform, task, foreground

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
        sample = (
            _labelled(source, self.task, self.size, self.foreground, rng)
            if self.task is not None
            else source.sample(self.size, rng)
        )
        return self.transform(sample, rng) if self.transform else sample


def _labelled(
    volume: Volume, task: Task, size: tuple[int, int, int], foreground: float, rng: np.random.Generator
) -> dict[str, Any]:
    """A crop with its target; with probability `foreground` centred on a labelled voxel, each target equally likely."""
    points = volume.points if foreground and rng.random() < foreground else None
    if points is not None and len(points):
        low, high = origins(volume.shape, size)
        rows = points[points[:, 0] == rng.choice(np.unique(points[:, 0]))]
        centre = rows[rng.integers(len(rows)), 1:] - np.asarray(size) // 2
        origin = [int(value) for value in np.clip(centre, low, high)]
    else:
        origin = random_origin(volume.shape, size, rng)
    target = task.training_target(cut(volume.label[None], origin, size)[0])
    return {"image": volume.crop(origin, size), "target": target}


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, number: int) -> list[int]:
    """Random order of `number` sources in a pass."""
    # The third number makes this random stream differ from those of the samples, which are seeded with (seed, index).
    return [int(index) for index in np.random.default_rng((seed, epoch, 1)).permutation(number)]
