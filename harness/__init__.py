"""Does this self-supervised pre-training help my 3D segmentation, by how much, and at what cost?

The names that a plugin needs are re-exported here, and `run`, which makes a run from Python. They are imported on first use,
so that `import harness` (and with it `harness --help` and `harness list`) does not pay for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.api.backbone import Backbone, Pyramid, crop, inflate
    from harness.api.global_batch import Dropout, gather, previous, rand, randn, total
    from harness.api.losses import dice_loss, segmentation_loss
    from harness.api.masks import any_box, inside_boxes, num_masked, random_integers, random_patches, to_voxels
    from harness.api.method import Batch, Method, Preparation, Source, Transform, VolumeSource
    from harness.api.nnssl import NNSSL_NORMALISATION, from_nnssl, read_plan
    from harness.api.published import PublishedWeights
    from harness.api.settings import Settings, Size3, Triple, size_text
    from harness.api.task import Archive, Case, ImageSet, Percentiles, PhantomShape, Task, Window, ZScore
    from harness.api.teacher import follow, new_teacher
    from harness.api.weight_files import WeightsFile, read_state_dict, read_weights_file
    from harness.data.arrays import cut, origins, random_origin
    from harness.data.corpus import Corpus
    from harness.data.image_files import read_header, write_image
    from harness.data.image_names import IMAGE_ENDINGS, stem
    from harness.runs.finished import FinishedRun
    from harness.runs.from_python import run
    from harness.system.console import say_once
    from harness.system.errors import UserError
    from harness.system.files import slug

_HOME = {
    "IMAGE_ENDINGS": "harness.data.image_names",
    "NNSSL_NORMALISATION": "harness.api.nnssl",
    "Archive": "harness.api.task",
    "Backbone": "harness.api.backbone",
    "Batch": "harness.api.method",
    "Case": "harness.api.task",
    "Corpus": "harness.data.corpus",
    "Dropout": "harness.api.global_batch",
    "FinishedRun": "harness.runs.finished",
    "ImageSet": "harness.api.task",
    "Method": "harness.api.method",
    "Percentiles": "harness.api.task",
    "PhantomShape": "harness.api.task",
    "Preparation": "harness.api.method",
    "PublishedWeights": "harness.api.published",
    "Pyramid": "harness.api.backbone",
    "Settings": "harness.api.settings",
    "Size3": "harness.api.settings",
    "Source": "harness.api.method",
    "Task": "harness.api.task",
    "Triple": "harness.api.settings",
    "Transform": "harness.api.method",
    "UserError": "harness.system.errors",
    "VolumeSource": "harness.api.method",
    "WeightsFile": "harness.api.weight_files",
    "Window": "harness.api.task",
    "ZScore": "harness.api.task",
    "any_box": "harness.api.masks",
    "crop": "harness.api.backbone",
    "cut": "harness.data.arrays",
    "follow": "harness.api.teacher",
    "new_teacher": "harness.api.teacher",
    "origins": "harness.data.arrays",
    "random_origin": "harness.data.arrays",
    "size_text": "harness.api.settings",
    "dice_loss": "harness.api.losses",
    "segmentation_loss": "harness.api.losses",
    "from_nnssl": "harness.api.nnssl",
    "gather": "harness.api.global_batch",
    "inflate": "harness.api.backbone",
    "inside_boxes": "harness.api.masks",
    "num_masked": "harness.api.masks",
    "previous": "harness.api.global_batch",
    "rand": "harness.api.global_batch",
    "randn": "harness.api.global_batch",
    "random_integers": "harness.api.masks",
    "random_patches": "harness.api.masks",
    "read_header": "harness.data.image_files",
    "read_plan": "harness.api.nnssl",
    "read_state_dict": "harness.api.weight_files",
    "read_weights_file": "harness.api.weight_files",
    "run": "harness.runs.from_python",
    "say_once": "harness.system.console",
    "slug": "harness.system.files",
    "stem": "harness.data.image_names",
    "to_voxels": "harness.api.masks",
    "total": "harness.api.global_batch",
    "write_image": "harness.data.image_files",
}

__all__ = [
    "IMAGE_ENDINGS",
    "NNSSL_NORMALISATION",
    "Archive",
    "Backbone",
    "Batch",
    "Case",
    "Corpus",
    "Dropout",
    "FinishedRun",
    "ImageSet",
    "Method",
    "Percentiles",
    "PhantomShape",
    "Preparation",
    "PublishedWeights",
    "Pyramid",
    "Settings",
    "Size3",
    "Source",
    "Task",
    "Transform",
    "Triple",
    "UserError",
    "VolumeSource",
    "WeightsFile",
    "Window",
    "ZScore",
    "any_box",
    "crop",
    "cut",
    "dice_loss",
    "follow",
    "from_nnssl",
    "gather",
    "inflate",
    "inside_boxes",
    "new_teacher",
    "num_masked",
    "origins",
    "previous",
    "rand",
    "randn",
    "random_integers",
    "random_origin",
    "random_patches",
    "read_header",
    "read_plan",
    "read_state_dict",
    "read_weights_file",
    "run",
    "say_once",
    "segmentation_loss",
    "size_text",
    "slug",
    "stem",
    "to_voxels",
    "total",
    "write_image",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
