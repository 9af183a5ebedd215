"""Image files with other voxels or another place than they had."""

from pathlib import Path

import nibabel as nib
import numpy as np


def rewrite(path: Path, change, affine=None, dtype=None) -> None:
    """Writes `change` of the voxels over a file."""
    image = nib.load(path)
    voxels = change(np.asarray(image.dataobj).copy())
    nib.save(nib.Nifti1Image(voxels, image.affine if affine is None else affine, dtype=dtype), path)


def poke(value):
    """A change of one voxel."""

    def change(voxels):
        voxels[5, 5, 5] = value
        return voxels

    return change
