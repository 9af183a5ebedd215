"""Does this self-supervised pre-training help my 3D segmentation, by how much, and at what cost?

The names that a plugin needs are re-exported here. They are imported on first use, so that `import harness` (and with
it `harness --help` and `harness list`) does not pay for torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.contracts import Backbone, Batch, Method, Pyramid, Transform, crop, gather
    from harness.errors import UserError
    from harness.settings import Settings, Size3
    from harness.task import Case, Percentiles, PhantomShape, Task, Window

_HOME = {
    "Backbone": "harness.contracts",
    "Batch": "harness.contracts",
    "Method": "harness.contracts",
    "Pyramid": "harness.contracts",
    "Transform": "harness.contracts",
    "crop": "harness.contracts",
    "gather": "harness.contracts",
    "UserError": "harness.errors",
    "Settings": "harness.settings",
    "Size3": "harness.settings",
    "Case": "harness.task",
    "Percentiles": "harness.task",
    "PhantomShape": "harness.task",
    "Task": "harness.task",
    "Window": "harness.task",
}

__all__ = [
    "Backbone",
    "Batch",
    "Case",
    "Method",
    "Percentiles",
    "PhantomShape",
    "Pyramid",
    "Settings",
    "Size3",
    "Task",
    "Transform",
    "UserError",
    "Window",
    "crop",
    "gather",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
