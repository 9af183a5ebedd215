"""Random crops from prepared volumes. Sample i is a function of (seed, i) alone: workers and resuming change nothing."""

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
    """`length` crops; every source comes up once per pass, in a new order each time.

    Args:
        sources: prepared volumes, or whatever else has `sample` (see `harness.contracts.Source`).
        size: extent of a crop in voxels; volumes that are smaller are placed at random in zeros.
        transform: applied to each sample with the sample's own generator.
        task: given for labelled crops, which then carry `target`.
        foreground: share of crops centred on a labelled voxel (targets drawn evenly).
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
        """The case that sample `index` comes from, where its source says so."""
        source = self._source(index)
        case = getattr(getattr(source, "volume", source), "case", None)
        return str(getattr(case, "id", "?"))

    def _source(self, index: int) -> Any:
        turn, place = divmod(index, len(self.sources))
        return self.sources[_order(self.seed, turn, len(self.sources))[place]]

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
    """A crop with its target; with probability `foreground` centred on a labelled voxel, targets drawn evenly."""
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
def _order(seed: int, turn: int, number: int) -> list[int]:
    # A third number keeps this stream apart from the samples' (seed, index).
    return [int(place) for place in np.random.default_rng((seed, turn, 1)).permutation(number)]
