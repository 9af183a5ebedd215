"""Phantoms: small made-up volumes in the exact layout of a task or a corpus, so that all commands run without real data."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from harness.api.task import ImageSet, PhantomShape, Task
from harness.data.corpus import Corpus
from harness.data.image_files import write_image
from harness.system.console import progress
from harness.system.errors import UserError

PHANTOM = 2  # version of the phantoms; raise it when the voxels of a seed change
MARKER = "PHANTOM.json"
CORPUS_SIZE, CORPUS_CASES = (80, 72, 72), 12
# The organs of an unlabelled body: big and small, bright and dark.
ORGANS = (
    PhantomShape(1, (0.4, 0.1, 0.1), (0.4, 0.42, 0.5), (70,)),
    PhantomShape(2, (-0.5, -0.2, 0.2), (0.24, 0.3, 0.34), (110,)),
    PhantomShape(3, (0.0, -0.55, 0.0), (0.18, 0.16, 0.8), (300,)),
    PhantomShape(4, (-0.35, 0.4, -0.1), (0.26, 0.24, 0.34), (-300,)),
)


def is_phantom(root: Path) -> bool:
    """Whether a data folder was written by `write_phantom`."""
    return (root / MARKER).exists()


def check_phantom(images: Task | Corpus) -> None:
    """Raises UserError where a task describes no phantom."""
    if isinstance(images, Task) and not images.phantom:
        raise UserError(f"task {images.name!r} describes no phantom: give --data a folder with its data")


def write_phantom(images: Task | Corpus, root: Path, num_cases: int, seed: int) -> None:
    """Write `num_cases` phantom cases in the layout of a task or a corpus, and a file MARKER that marks the folder.

    Raises:
        UserError: the task describes no phantom, or `root` is not empty.
    """
    check_phantom(images)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} is not empty: a phantom needs a folder of its own, so that no data is overwritten")
    if root.parent.exists() and not root.parent.is_dir():
        raise UserError(f"{root.parent} is no folder: give another place for the phantom")
    root.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and then renamed, so that an interrupted call leaves nothing and can be repeated.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".partial-") as partial:
        _write_cases(images, Path(partial) / "phantom", num_cases, seed)
        (Path(partial) / "phantom").replace(root)


def _write_cases(images: Task | Corpus, root: Path, num_cases: int, seed: int) -> None:
    """Write the cases and the marker into the folder `root`."""
    for number in progress(range(1, num_cases + 1), "phantom"):
        # The name is part of the seed, so that a corpus does not contain the test cases of a task.
        name = int.from_bytes(images.name.encode()[:8].ljust(8), "big")
        rng = np.random.default_rng((seed, number, name))
        voxels, label = make_phantom(images, rng)
        # RAS axes; the origin differs between cases, as it does in real scans.
        affine = np.diag([*(images.spacing or (1.0, 1.0, 1.0)), 1.0])
        affine[:3, 3] = rng.uniform(-100, 100, 3).round(2)
        if isinstance(images, Task):
            images.write_case(root, number, voxels, label, affine)
        else:
            write_image(root / images.phantom.format(number), voxels[0], affine)
    described = {"phantom": PHANTOM, "of": images.name, "cases": num_cases, "seed": seed}
    (root / MARKER).write_text(json.dumps(described))


def make_phantom(images: Task | Corpus, rng: np.random.Generator) -> tuple[NDArray[Any], NDArray[np.uint8]]:
    """One case: images (channels, x, y, z) and label (x, y, z).

    A case is a body with an outer rind and nested structures, whose position, size, side and outline vary. CT images are
    int16 Hounsfield units with air at -1000. Other images are float32 with a contrast per channel, texture, a bias field
    and noise; they are 0 outside the body.
    """
    size, shapes = (images.phantom_size, images.phantom) if isinstance(images, Task) else (CORPUS_SIZE, ORGANS)
    shape = tuple(int(n * rng.uniform(0.92, 1.08)) for n in size)
    axes = np.meshgrid(*(np.linspace(-1.05, 1.05, n, dtype=np.float32) for n in shape), indexing="ij")
    body = _ellipsoid(axes, (0, 0, 0), (0.95, 0.95, 0.95), rng, wobble=0.06)
    core = _ellipsoid(axes, (0, 0, 0), (0.72, 0.74, 0.7), rng, wobble=0.2)
    label = _structures(axes, body, shapes, rng)
    if images.hounsfield:
        return _hounsfield(body, core, label, shapes, rng)[None], label
    return _intensities(images, body, core, label, shapes, rng), label


def _structures(
    axes: Sequence[NDArray[np.float32]],
    body: NDArray[np.bool_],
    shapes: Sequence[PhantomShape],
    rng: np.random.Generator,
) -> NDArray[np.uint8]:
    """Label map (x, y, z) of structures in the body, at random positions, on a random side."""
    label = np.zeros(body.shape, dtype=np.uint8)
    side = rng.choice([-1, 1])
    shift, scale = rng.uniform(-0.1, 0.1, 3), rng.uniform(0.8, 1.15)
    masks: dict[int | None, NDArray[np.bool_]] = {None: body}
    for structure in shapes:
        centre = np.asarray(structure.centre) * (side, 1, 1) + shift + rng.uniform(-0.02, 0.02, 3)
        radius = np.asarray(structure.radius) * scale * rng.uniform(0.9, 1.1, 3)
        mask = _ellipsoid(axes, centre, radius, rng, wobble=0.18) & masks[structure.inside]
        # A structure overwrites the background and the structure that contains it, but no neighbour.
        mask &= np.isin(label, (0, structure.inside or 0))
        masks[structure.label] = mask
        label[mask] = structure.label
    return label


def _intensities(
    images: ImageSet,
    body: NDArray[np.bool_],
    core: NDArray[np.bool_],
    label: NDArray[np.uint8],
    shapes: Sequence[PhantomShape],
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Images (channels, x, y, z) in arbitrary units, 0 outside the body."""
    number = len(images.channels)
    rind = rng.uniform(0.25, 0.4, number) * rng.choice([-1, 1], number)
    channels = []
    for channel in range(number):
        clean = 1.0 + rind[channel] * (body & ~core)
        for structure in shapes:
            clean = clean + structure.contrast[channel] * (label == structure.label)
        clean = ndimage.gaussian_filter(clean, 0.5) + 0.06 * _smooth_noise(body.shape, 2, rng)
        bias = 1 + 0.12 * _smooth_noise(body.shape, min(body.shape) / 4, rng)
        noisy = clean * bias + 0.05 * rng.standard_normal(body.shape)
        channels.append((np.clip(noisy, 0.02, None) * body * rng.uniform(300, 1500)).astype(np.float32))
    return np.stack(channels)


def _hounsfield(
    body: NDArray[np.bool_],
    core: NDArray[np.bool_],
    label: NDArray[np.uint8],
    shapes: Sequence[PhantomShape],
    rng: np.random.Generator,
) -> NDArray[np.int16]:
    """A CT image (x, y, z) in Hounsfield units: air, a rind of fat, soft tissue, structures, and noise as of a scanner."""
    tissue = np.where(body, np.where(core, 40.0, -100.0), -1000.0)
    for structure in shapes:
        tissue[label == structure.label] = 40.0 + structure.contrast[0]
    noise = 8 * _smooth_noise(body.shape, 2, rng) + 12 * rng.standard_normal(body.shape)
    return np.rint(ndimage.gaussian_filter(tissue, 0.5) + noise).clip(-1024, 3071).astype(np.int16)


def _ellipsoid(
    axes: Sequence[NDArray[np.float32]], centre: object, radius: object, rng: np.random.Generator, wobble: float
) -> NDArray[np.bool_]:
    """A filled ellipsoid whose outline varies smoothly by about `wobble` of its radius."""
    squares = [((x - c) / r) ** 2 for x, c, r in zip(axes, np.asarray(centre), np.asarray(radius), strict=True)]
    outline = 1 + wobble * _smooth_noise(axes[0].shape, min(axes[0].shape) / 8, rng)
    inside: NDArray[np.bool_] = np.sqrt(sum(squares)) < outline
    return inside


def _smooth_noise(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Gaussian noise, smoothed by `sigma` voxels and scaled to a standard deviation of 1."""
    noise: NDArray[np.float64] = ndimage.gaussian_filter(rng.standard_normal(shape), sigma)
    return noise / noise.std()
