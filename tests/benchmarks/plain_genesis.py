"""Models Genesis' distortions in plain Python, from their published description: slow, and as simple as can be."""

import random

import numpy as np


def pair(cube, flip=0.4, shuffle=0.5, nonlinear=0.9, paint=0.9, inpaint=0.2):
    """(1, x, y, z) -> distorted, target."""
    turns = 0
    while turns < 3 and random.random() < flip:
        cube = np.flip(cube, axis=random.choice([1, 2, 3]))
        turns += 1
    target, changed = cube, cube.copy()
    if random.random() < shuffle:
        changed = shuffled(changed)
    if random.random() < nonlinear:
        changed = remapped(changed)
    if random.random() < paint:
        changed = painted_in(changed) if random.random() < inpaint else painted_out(changed)
    return changed, target


def shuffled(cube, windows=10_000):
    result = cube.copy()
    extents = cube.shape[1:]
    for _ in range(windows):
        edges = [random.randint(1, n // 10) for n in extents]
        corner = [random.randint(0, n - e) for n, e in zip(extents, edges, strict=True)]
        place = (0, *(slice(c, c + e) for c, e in zip(corner, edges, strict=True)))
        voxels = cube[place].flatten()
        np.random.shuffle(voxels)
        result[place] = voxels.reshape(edges)
    return result


def bezier(samples=100_000):
    """Horizontal and vertical coordinates of the curve, before they are sorted."""
    corners = [(0, 0), (random.random(), random.random()), (random.random(), random.random()), (1, 1)]
    t = np.linspace(0, 1, samples)
    weights = [t**3, 3 * t**2 * (1 - t), 3 * t * (1 - t) ** 2, (1 - t) ** 3]
    return tuple(sum(w * c[axis] for w, c in zip(weights, corners, strict=True)) for axis in (0, 1))


def remapped(cube):
    x, y = bezier()
    x = np.sort(x)
    return np.interp(cube, x, y if random.random() < 0.5 else np.sort(y))


def painted_in(cube):
    result, left = cube.copy(), 5
    while left and random.random() < 0.95:
        edges = [random.randint(n // 6, n // 3) for n in cube.shape[1:]]
        place = box(cube.shape[1:], edges)
        result[place] = np.random.rand(*edges)
        left -= 1
    return result


def painted_out(cube):
    result, left = np.random.rand(*cube.shape), 5
    while left == 5 or (left and random.random() < 0.95):
        edges = [n - random.randint(3 * n // 7, 4 * n // 7) for n in cube.shape[1:]]
        place = box(cube.shape[1:], edges)
        result[place] = cube[place]
        left -= 1
    return result


def box(extents, edges):
    corner = [random.randint(3, n - e - 3) for n, e in zip(extents, edges, strict=True)]
    return (slice(None), *(slice(c, c + e) for c, e in zip(corner, edges, strict=True)))
