"""Names of image files: the endings of images, and the names that label maps have. Reads no file."""

import re
from pathlib import Path

NIFTI = (".nii.gz", ".nii")
NRRD = (".nrrd", ".nhdr")
ITK = (*NRRD, ".mha", ".mhd")
IMAGE_ENDINGS = NIFTI + ITK
LABEL_FOLDERS = re.compile(r"(labels?|masks?|seg|segmentations?|predictions)(Tr|Ts)?", re.IGNORECASE)
LABEL_NAMES = re.compile(r"(.*[_.-])?(seg|segm|segmentation|label|labels|mask|gt)\d*", re.IGNORECASE | re.DOTALL)


def stem(path: Path, root: Path | None = None) -> str:
    """Name of an image file without its ending; with `root`, the path relative to it without the ending."""
    name = path.relative_to(root).as_posix() if root else path.name
    return next((name.removesuffix(ending) for ending in IMAGE_ENDINGS if name.endswith(ending)), name)


def is_named_label(path: Path) -> bool:
    """Whether a path, relative to the folder of a data set, has a label map's name: `labelsTr/x`, `x_seg`, `label0001`."""
    return any(map(LABEL_FOLDERS.fullmatch, path.parts[:-1])) or bool(LABEL_NAMES.fullmatch(stem(path)))
