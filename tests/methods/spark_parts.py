"""What the tests of SparK share."""

import numpy as np
import torch


def voxels(hidden, features) -> torch.Tensor:
    """The mask of `features`, made with NumPy: (N, C, x, y, z) bool, True is masked."""
    mask = hidden.numpy()
    for axis in (1, 2, 3):
        mask = mask.repeat(features.shape[axis + 1] // mask.shape[axis], axis=axis)
    return torch.from_numpy(mask)[:, None].expand_as(features)


def numpy_norm(features, visible, groups, over_batch):
    """Features (N, C, x, y, z) -> normalised over the visible positions of a group of channels, with NumPy."""
    out, (n, channels, *_) = np.zeros_like(features), features.shape
    size = channels // groups
    for sample in [slice(None)] if over_batch else [slice(i, i + 1) for i in range(n)]:
        for first in range(0, channels, size):
            block, where = features[sample, first : first + size], visible[sample]
            values = block[np.broadcast_to(where, block.shape)]
            scaled = (block - values.mean()) / np.sqrt(values.var() + 1e-5)
            out[sample, first : first + size] = np.where(where, scaled, 0)
    return out
