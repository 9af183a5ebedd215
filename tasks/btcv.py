"""BTCV, "Beyond the Cranial Vault": abdominal CT with thirteen organs."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness
from harness import Case, PhantomShape, Task, UserError, Window

# Folders of images and labels, relative to the folder in which the archive is unpacked: first as unpacked, then as MONAI's
# tutorials rename them.
LAYOUTS = (
    ("RawData/Training/img", "RawData/Training/label"),
    ("Training/img", "Training/label"),
    ("img", "label"),
    ("imagesTr", "labelsTr"),
)
IMAGE = re.compile(r"img(\d{4})\.nii(\.gz)?")
ORGANS = {
    "spleen": 1,
    "right_kidney": 2,
    "left_kidney": 3,
    "gallbladder": 4,
    "esophagus": 5,
    "liver": 6,
    "stomach": 7,
    "aorta": 8,
    "inferior_vena_cava": 9,
    "portal_and_splenic_veins": 10,
    "pancreas": 11,
    "right_adrenal_gland": 12,
    "left_adrenal_gland": 13,
}
NAMES = ("btcv", "BTCV", "Abdomen")


@dataclass(frozen=True, kw_only=True)
class BTCVTask(Task):
    """`img/imgNNNN.nii.gz` and `label/labelNNNN.nii.gz`, or `imagesTr` and `labelsTr` with the same file names."""

    def find(self, data: Path) -> Path:
        """The folder in which the archive was unpacked: `data` or a folder in it. Raises UserError if there is none."""
        for root in (data, *(data / name for name in NAMES)):
            if _layout(root) is not None:
                return root
        raise UserError(
            f"task {self.name!r}: no imgNNNN.nii.gz in {', '.join(images for images, _ in LAYOUTS)} of {data}: give --data "
            f"the folder in which RawData.zip was unpacked ({self.registration})"
        )

    def cases(self, root: Path) -> list[Case]:
        """The labelled cases, sorted by id. Raises UserError if there is no image."""
        layout = _layout(root)
        if layout is None:
            raise UserError(f"task {self.name!r}: no imgNNNN.nii.gz in {root}: unpack RawData.zip in it")
        images, labels = layout
        cases = []
        for path in sorted(images.iterdir()):
            match = IMAGE.fullmatch(path.name)
            if match:
                label = labels / f"label{match[1]}.nii.gz"
                uncompressed = label.with_suffix("")
                cases.append(
                    Case(
                        f"img{match[1]}",
                        (path,),
                        uncompressed if uncompressed.exists() and not label.exists() else label,
                    )
                )
        return cases

    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Write one phantom case in the layout as unpacked."""
        for folder, name, voxels in (("img", "img", images[0]), ("label", "label", label)):
            path = root / "RawData" / "Training" / folder / f"{name}{number:04d}.nii.gz"
            harness.write_image(path, voxels, affine)


def _layout(root: Path) -> tuple[Path, Path] | None:
    """The folders of images and labels below `root`, or None if no layout fits."""
    for images, labels in LAYOUTS:
        folder = root / images
        if folder.is_dir() and any(IMAGE.fullmatch(path.name) for path in folder.iterdir()):
            return folder, root / labels
    return None


btcv = BTCVTask(
    name="btcv",
    version="1",
    description="BTCV: abdominal CT in the portal venous phase, thirteen organs",
    licence="on registration, see www.synapse.org/Synapse:syn3193805",
    reference="Landman et al. 2015, MICCAI Multi-Atlas Labeling Beyond the Cranial Vault, doi:10.7303/syn3193805",
    registration="www.synapse.org/Synapse:syn3193805, Abdomen/RawData.zip",
    layout="RawData/Training/img/imgNNNN.nii.gz and RawData/Training/label/labelNNNN.nii.gz, or imagesTr/ and labelsTr/",
    channels=("CT",),
    targets={organ: (value,) for organ, value in ORGANS.items()},
    labels=(0, *ORGANS.values()),
    overlapping=False,
    spacing=(1.5, 1.5, 2.0),
    # The common window (MONAI's BTCV bundles); the paper states none.
    normalisation=Window(-175, 250),
    presets={
        "demo": {"pretrain.steps": 60, "finetune.steps": 150},
        "paper": {"finetune.epochs": 2000},
    },
    phantom=(
        PhantomShape(6, (0.4, 0.1, 0.1), (0.4, 0.42, 0.55), (70,)),
        PhantomShape(1, (-0.55, -0.25, 0.2), (0.2, 0.24, 0.34), (95,)),
        PhantomShape(2, (0.35, -0.5, -0.3), (0.16, 0.16, 0.3), (150,)),
        PhantomShape(3, (-0.38, -0.5, -0.3), (0.16, 0.16, 0.3), (150,)),
        PhantomShape(4, (0.3, 0.62, -0.15), (0.13, 0.13, 0.2), (-40,)),
        PhantomShape(7, (-0.4, 0.4, 0.15), (0.26, 0.24, 0.34), (30,)),
        PhantomShape(8, (-0.08, -0.35, 0.0), (0.1, 0.1, 0.9), (190,)),
        PhantomShape(9, (0.14, -0.35, 0.0), (0.1, 0.1, 0.9), (120,)),
        PhantomShape(5, (-0.1, -0.1, 0.6), (0.09, 0.09, 0.35), (15,)),
        PhantomShape(10, (0.02, 0.02, 0.1), (0.16, 0.09, 0.2), (140,)),
        PhantomShape(11, (-0.05, 0.25, -0.1), (0.3, 0.12, 0.18), (50,)),
        PhantomShape(12, (0.2, -0.6, 0.2), (0.1, 0.12, 0.16), (40,)),
        PhantomShape(13, (-0.25, -0.6, 0.2), (0.1, 0.12, 0.16), (40,)),
    ),
    phantom_size=(88, 76, 64),
    # The split of the Swin UNETR tutorials (24 and 6 cases), the only published split that is 80/20.
    test_ids=frozenset(f"img{number:04d}" for number in range(35, 41)),
)
