"""Names of image files: the endings of images, and the names that label maps have. Reads no file."""

import re
from itertools import pairwise
from pathlib import Path

NIFTI = (".nii.gz", ".nii")
NRRD = (".nrrd", ".nhdr")
ITK = (*NRRD, ".mha", ".mhd")
IMAGE_ENDINGS = NIFTI + ITK
# Names of label maps end in such a word, with a number or without, behind a separator: `x_seg`, `segmentation-0`, `label0001`.
LABEL_NAMES = re.compile(
    r"(.*[ _.-])?(seg|segm|dseg|segs|segmentations?|labels?|labelmap|masks?|msk|gt|groundtruth|annotations?|otmulticlass)"
    r"([ _-]?\d+)?",
    re.IGNORECASE | re.DOTALL,
)
LABEL_WORDS = frozenset(
    [
        *(
            "seg",
            "segs",
            "segmentation",
            "segmentations",
            "label",
            "labels",
            "labelmap",
            "labelmaps",
            "mask",
            "masks",
            "msk",
        ),
        *("gt", "groundtruth", "annotation", "annotations", "prediction", "predictions", "instances", "multiclass"),
    ]
)
# A folder of such a name may hold scans too: `segmentation_images`, `Segmentation-Challenge`.
SCAN_WORDS = frozenset(
    [
        *("image", "images", "img", "imgs", "scan", "scans", "volume", "volumes"),
        *("data", "dataset", "challenge", "with", "and"),
    ]
)
PARTS = frozenset(["tr", "ts", "va", "val", "tst", "trn", "train", "training", "test", "testing", "validation"])
WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")


def stem(path: Path, root: Path | None = None) -> str:
    """Name of an image file without its ending; with `root`, the path relative to it without the ending."""
    name = path.relative_to(root).as_posix() if root else path.name
    return next((name.removesuffix(ending) for ending in IMAGE_ENDINGS if name.endswith(ending)), name)


def is_named_label(path: Path) -> bool:
    """Whether a path, relative to the folder of a data set, has a label map's name: `labelsTr/x`, `x_seg`, `segmentation-0`."""
    return any(map(_is_label_folder, path.parts[:-1])) or bool(LABEL_NAMES.fullmatch(stem(path)))


def _is_label_folder(name: str) -> bool:
    """Whether a folder's first or last word is one for label maps: `labelsVal`, `TrainingMask`, `seg-lungs-LUNA16`.

    Words for the parts of a data set do not count: `Tr`, `Ts`, `Va`, `Val`, `train`, `test`.
    """
    words = [word.lower() for word in WORDS.findall(name)]
    if not words or SCAN_WORDS.intersection(words):
        return False
    kept = [word for word in words if word not in PARTS and not word.isdecimal()]
    pairs = [first + second for first, second in pairwise(words)]  # ground_truth, MultiClass
    return bool(LABEL_WORDS.intersection([*kept[:1], *kept[-1:], *pairs]))
