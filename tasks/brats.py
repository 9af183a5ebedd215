"""BraTS 2020: four MR modalities, three nested and therefore overlapping tumour targets."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import Case, Percentiles, PhantomShape, Task, UserError

FOLDER = "MICCAI_BraTS2020_TrainingData"
CASE = re.compile(r"BraTS20_Training_\d{3}")


@dataclass(frozen=True, kw_only=True)
class BraTSTask(Task):
    """`BraTS20_Training_NNN/BraTS20_Training_NNN_{flair,t1,t1ce,t2,seg}.nii[.gz]`, as unpacked."""

    def find(self, data: Path) -> Path:
        for root in (data, data / FOLDER):
            if _case_folders(root):
                return root
        raise UserError(
            f"task {self.name!r}: no BraTS20_Training_NNN folder in {data} nor in {data / FOLDER}: give --data the "
            "unpacked BraTS 2020 training folder (registration: www.med.upenn.edu/cbica/brats2020)"
        )

    def cases(self, root: Path) -> list[Case]:
        return [
            Case(
                id=folder.name,
                images=tuple(_volume(folder, channel) for channel in self.channels),
                label=_volume(folder, "seg"),
            )
            for folder in _case_folders(root)
        ]

    def write_case(
        self, root: Path, number: int, images: NDArray[np.float32], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        import nibabel as nib

        folder = root / f"BraTS20_Training_{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        for channel, voxels in zip((*self.channels, "seg"), (*images, label), strict=True):
            nib.save(nib.Nifti1Image(voxels, affine), folder / f"{folder.name}_{channel}.nii.gz")


def _case_folders(root: Path) -> list[Path]:
    return sorted(path for path in root.glob("BraTS20_Training_*") if path.is_dir() and CASE.fullmatch(path.name))


def _volume(folder: Path, kind: str) -> Path:
    for ending in (".nii.gz", ".nii"):
        path = folder / f"{folder.name}_{kind}{ending}"
        if path.is_file():
            return path
    raise UserError(
        f"{folder / folder.name}_{kind}.nii.gz (or .nii) is missing; a BraTS 2020 case has flair, t1, t1ce, t2 and seg: "
        "unpack it again, or take the folder out"
    )


brats = BraTSTask(
    name="brats",
    version="1",
    description="BraTS 2020: glioma in four MR modalities; whole tumour, tumour core, enhancing tumour",
    licence="CC-BY-NC 4.0 on registration",
    reference="Menze et al. 2015, doi:10.1109/TMI.2014.2377694; Bakas et al. 2017, doi:10.1038/sdata.2017.117",
    channels=("flair", "t1", "t1ce", "t2"),
    # Label 3 does not exist in BraTS 2020; MSD Task01 and BraTS 2023 number the same tissues differently.
    targets={"whole_tumor": (1, 2, 4), "tumor_core": (1, 4), "enhancing_tumor": (4,)},
    labels=(0, 1, 2, 4),
    overlapping=True,
    spacing=(1.0, 1.0, 1.0),
    normalisation=Percentiles(),
    presets={
        # Few steps: the phantom's first table, control included, is to be there within four minutes.
        "demo": {
            "pretrain.steps": 60,
            "pretrain.crop": (32, 64, 32),
            "finetune.steps": 150,
            "finetune.crop": (32, 64, 32),
        },
        "paper": {
            "pretrain.crop": (128, 128, 128),
            "pretrain.batch_size": 2,
            "finetune.crop": (128, 128, 128),
            "finetune.batch_size": 2,
            "finetune.epochs": 300,
        },
    },
    phantom=(
        PhantomShape(2, (0.3, 0.1, 0.0), (0.42, 0.38, 0.42), (0.75, -0.15, 0.05, 0.65)),
        PhantomShape(1, (0.3, 0.1, 0.0), (0.26, 0.25, 0.27), (-0.25, -0.35, -0.3, 0.2), inside=2),
        PhantomShape(4, (0.33, 0.12, 0.02), (0.18, 0.17, 0.19), (0.3, 0.05, 0.9, 0.1), inside=1),
    ),
    phantom_size=(72, 80, 64),
)
