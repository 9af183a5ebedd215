"""Augmentation of labelled crops in fine-tuning."""

from itertools import combinations
from typing import Any

import numpy as np

from harness.config.schema import Finetune


class Augment:
    """The augmentation of the paper (section IV-C): flips, rotations by 90 degrees, intensity scaling and shift."""

    def __init__(self, settings: Finetune) -> None:
        self.settings = settings

    def __call__(self, sample: dict[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """Flip and rotate `image` and `target` (C, x, y, z) alike; change intensities in the image only."""
        image, target, settings = sample["image"], sample["target"], self.settings
        for axis in (1, 2, 3):
            if rng.random() < settings.flip:
                image, target = np.flip(image, axis), np.flip(target, axis)
        # A rotation by 90 degrees keeps the crop's shape only in planes whose two sides are equal.
        planes = [(a, b) for a, b in combinations((1, 2, 3), 2) if image.shape[a] == image.shape[b]]
        if planes and rng.random() < settings.rotate:
            plane, turns = planes[rng.integers(len(planes))], int(rng.integers(1, 4))
            image, target = np.rot90(image, turns, plane), np.rot90(target, turns, plane)
        if rng.random() < settings.scale:
            image = image * np.float32(rng.uniform(0.9, 1.1))
        if rng.random() < settings.shift:
            image = image + np.float32(rng.uniform(-0.1, 0.1))
        return {"image": np.ascontiguousarray(image), "target": np.ascontiguousarray(target)}
