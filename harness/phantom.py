"""Phantoms: small anatomy-like volumes in a task's exact layout, so that everything runs before any data is there."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from harness.errors import UserError
from harness.progress import progress
from harness.task import Task

PHANTOM = 1  # raise it when the voxels that a seed gives change
MARKER = "PHANTOM.json"


def is_phantom(root: Path) -> bool:
    """Whether a data folder was written by `write_phantom`."""
    return (root / MARKER).exists()


def write_phantom(task: Task, root: Path, num_cases: int, seed: int) -> None:
    """Write `num_cases` phantom cases in the task's layout; the marker that ends the work names them as phantoms.

    Raises:
        UserError: the task describes no phantom, or `root` holds something already.
    """
    if not task.phantom:
        raise UserError(f"task {task.name!r} describes no phantom: give --data a folder with its data")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty: a phantom needs a folder of its own, so that no data is overwritten")
    for number in progress(range(1, num_cases + 1), "phantom"):
        rng = np.random.default_rng((seed, number))
        images, label = make_phantom(task, rng)
        # RAS with an origin that differs between cases, as scanners do.
        affine = np.diag([*(task.spacing or (1.0, 1.0, 1.0)), 1.0])
        affine[:3, 3] = rng.uniform(-100, 100, 3).round(2)
        task.write_case(root, number, images, label, affine)
    described = {"phantom": PHANTOM, "task": task.name, "cases": num_cases, "seed": seed}
    (root / MARKER).write_text(json.dumps(described))


def make_phantom(task: Task, rng: np.random.Generator) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """One case: images (channels, x, y, z) and label (x, y, z).

    A body with an outer rind, the task's structures nested in it (position, size, side and outline vary), different
    contrast per channel, texture, a bias field and noise; 0 outside the body.
    """
    shape = tuple(int(n * rng.uniform(0.92, 1.08)) for n in task.phantom_size)
    axes = np.meshgrid(*(np.linspace(-1.05, 1.05, n, dtype=np.float32) for n in shape), indexing="ij")
    body = _ellipsoid(axes, (0, 0, 0), (0.95, 0.95, 0.95), rng, wobble=0.06)
    core = _ellipsoid(axes, (0, 0, 0), (0.72, 0.74, 0.7), rng, wobble=0.2)
    label = np.zeros(shape, dtype=np.uint8)
    side = rng.choice([-1, 1])
    shift, scale = rng.uniform(-0.1, 0.1, 3), rng.uniform(0.8, 1.15)
    masks: dict[int | None, NDArray[np.bool_]] = {None: body}
    for structure in task.phantom:
        centre = np.asarray(structure.centre) * (side, 1, 1) + shift + rng.uniform(-0.02, 0.02, 3)
        radius = np.asarray(structure.radius) * scale * rng.uniform(0.9, 1.1, 3)
        mask = _ellipsoid(axes, centre, radius, rng, wobble=0.18) & masks[structure.inside]
        # Neighbours do not overwrite each other; what lies inside another takes its place.
        mask &= np.isin(label, (0, structure.inside or 0))
        masks[structure.label] = mask
        label[mask] = structure.label
    rind = rng.uniform(0.25, 0.4, len(task.channels)) * rng.choice([-1, 1], len(task.channels))
    images = []
    for channel in range(len(task.channels)):
        clean = 1.0 + rind[channel] * (body & ~core)
        for structure in task.phantom:
            clean = clean + structure.contrast[channel] * (label == structure.label)
        clean = ndimage.gaussian_filter(clean, 0.5) + 0.06 * _smooth_noise(shape, 2, rng)
        bias = 1 + 0.12 * _smooth_noise(shape, min(shape) / 4, rng)
        noisy = clean * bias + 0.05 * rng.standard_normal(shape)
        images.append((np.clip(noisy, 0.02, None) * body * rng.uniform(300, 1500)).astype(np.float32))
    return np.stack(images), label


def _ellipsoid(
    axes: Sequence[NDArray[np.float32]], centre: object, radius: object, rng: np.random.Generator, wobble: float
) -> NDArray[np.bool_]:
    """A filled ellipsoid whose outline varies smoothly by about `wobble` of its radius."""
    squares = [((x - c) / r) ** 2 for x, c, r in zip(axes, np.asarray(centre), np.asarray(radius), strict=True)]
    outline = 1 + wobble * _smooth_noise(axes[0].shape, min(axes[0].shape) / 8, rng)
    inside: NDArray[np.bool_] = np.sqrt(sum(squares)) < outline
    return inside


def _smooth_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Gaussian noise smoothed by `sigma` voxels, scaled to unit deviation."""
    noise: NDArray[np.float64] = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    return noise / noise.std()
