"""Does this self-supervised pre-training help my 3D segmentation, by how much, and at what cost?

The names that a plugin needs are re-exported here. They are imported on first use, so that `import harness` (and with
it `harness --help` and `harness list`) does not pay for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.arrays import cut
    from harness.contracts import (
        Backbone,
        Batch,
        Method,
        Preparation,
        Pyramid,
        Source,
        Transform,
        VolumeSource,
        crop,
    )
    from harness.corpus import Corpus
    from harness.errors import UserError
    from harness.files import slug
    from harness.masking import any_box, inside_boxes, num_masked, random_integers, random_patches, to_voxels
    from harness.parts import gather, previous, rand, randn, total
    from harness.settings import Settings, Size3
    from harness.task import Archive, Case, ImageSet, Percentiles, PhantomShape, Task, Window
    from harness.transfer import inflate

_HOME = {
    "Backbone": "harness.contracts",
    "Batch": "harness.contracts",
    "Method": "harness.contracts",
    "Preparation": "harness.contracts",
    "Pyramid": "harness.contracts",
    "Source": "harness.contracts",
    "Transform": "harness.contracts",
    "VolumeSource": "harness.contracts",
    "crop": "harness.contracts",
    "gather": "harness.parts",
    "previous": "harness.parts",
    "rand": "harness.parts",
    "randn": "harness.parts",
    "total": "harness.parts",
    "Corpus": "harness.corpus",
    "UserError": "harness.errors",
    "slug": "harness.files",
    "Settings": "harness.settings",
    "Size3": "harness.settings",
    "cut": "harness.arrays",
    "any_box": "harness.masking",
    "inside_boxes": "harness.masking",
    "num_masked": "harness.masking",
    "random_integers": "harness.masking",
    "random_patches": "harness.masking",
    "to_voxels": "harness.masking",
    "Archive": "harness.task",
    "inflate": "harness.transfer",
    "Case": "harness.task",
    "ImageSet": "harness.task",
    "Percentiles": "harness.task",
    "PhantomShape": "harness.task",
    "Task": "harness.task",
    "Window": "harness.task",
}

__all__ = [
    "Archive",
    "Backbone",
    "Batch",
    "Case",
    "Corpus",
    "ImageSet",
    "Method",
    "Percentiles",
    "PhantomShape",
    "Preparation",
    "Pyramid",
    "Settings",
    "Size3",
    "Source",
    "Task",
    "Transform",
    "UserError",
    "VolumeSource",
    "Window",
    "any_box",
    "crop",
    "cut",
    "gather",
    "inflate",
    "inside_boxes",
    "num_masked",
    "previous",
    "rand",
    "randn",
    "random_integers",
    "random_patches",
    "slug",
    "to_voxels",
    "total",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
