"""Random crops from prepared volumes. Sample i is a function of (seed, i) alone: workers and resuming change nothing."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import combinations
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from harness.arrays import cut, origins, random_origin
from harness.config import Finetune
from harness.contracts import Transform
from harness.task import Task
from harness.volumes import Volume


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


class Augment:
    """Fine-tuning augmentation of section IV-C: flip, rotation by 90 degrees, intensity scaling and shift."""

    def __init__(self, settings: Finetune) -> None:
        self.settings = settings

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """`image` and `target` (C, x, y, z) -> the same, turned alike; intensities change in the image only."""
        image, target, settings = sample["image"], sample["target"], self.settings
        for axis in (1, 2, 3):
            if rng.random() < settings.flip:
                image, target = np.flip(image, axis), np.flip(target, axis)
        # Only planes whose sides are equal keep the crop's shape.
        planes = [(a, b) for a, b in combinations((1, 2, 3), 2) if image.shape[a] == image.shape[b]]
        if planes and rng.random() < settings.rotate:
            plane, turns = planes[rng.integers(len(planes))], int(rng.integers(1, 4))
            image, target = np.rot90(image, turns, plane), np.rot90(target, turns, plane)
        if rng.random() < settings.scale:
            image = image * np.float32(rng.uniform(0.9, 1.1))
        if rng.random() < settings.shift:
            image = image + np.float32(rng.uniform(-0.1, 0.1))
        return {"image": np.ascontiguousarray(image), "target": np.ascontiguousarray(target)}
