"""BraTS 2020, 2021 and 2023: four MR modalities, and three tumour targets that overlap because they are nested."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import harness
from harness import Case, Percentiles, PhantomShape, Task, UserError
from tasks.case_lists import read_test_ids

ODD_LABEL = "W39_1998.09.19_Segm.nii"  # name of the label map of case 355 in the release of 2020


@dataclass(frozen=True)
class Release:
    """Names of the folders and files of one year, and its numbering of the tissues.

    Attributes:
        case: matches the name of a case's folder; its first group is the patient.
        separator: character between the name of the case and the modality in a file's name.
        files: names of the modalities flair, t1, t1ce and t2 and of the label map in files, in this order.
        numbering: (value on disk, value in BraTS 2020) pairs; 2023 moved the enhancing tumour from 4 to 3.
    """

    year: str
    case: re.Pattern[str]
    separator: str
    files: tuple[str, ...]
    numbering: tuple[tuple[int, int], ...]


OLD = ((0, 0), (1, 1), (2, 2), (4, 4))
NEW = ((0, 0), (1, 1), (2, 2), (3, 4))
RELEASES = (
    Release("2020", re.compile(r"(BraTS20_Training_\d{3})"), "_", ("flair", "t1", "t1ce", "t2", "seg"), OLD),
    Release("2021", re.compile(r"(BraTS2021_\d{5})"), "_", ("flair", "t1", "t1ce", "t2", "seg"), OLD),
    Release("2023", re.compile(r"(BraTS-GLI-\d{5})-\d{3}"), "-", ("t2f", "t1n", "t1c", "t2w", "seg"), NEW),
)


@dataclass(frozen=True, kw_only=True)
class BraTSTask(Task):
    """BraTS as it is unpacked: one folder per case, one file per modality. Names show the release; label values are not used."""

    def find(self, data: Path) -> Path:
        """The folder with the cases: `data` or a folder in it. Raises UserError if there is none or more than one."""
        subfolders = sorted(path for path in data.iterdir() if path.is_dir()) if data.is_dir() else []
        roots = [root for root in (data, *subfolders) if _case_folders(root)]
        if len(roots) > 1:
            raise UserError(
                f"task {self.name!r}: {data} holds several releases ({', '.join(root.name for root in roots)}), which share "
                "patients: give --data one of these folders"
            )
        if not roots:
            raise UserError(
                f"task {self.name!r}: no folder named BraTS20_Training_NNN, BraTS2021_NNNNN or BraTS-GLI-NNNNN-NNN in {data} "
                f"or one level below: give --data the unpacked training folder ({self.registration})"
            )
        return roots[0]

    def cases(self, root: Path) -> list[Case]:
        """The labelled cases, sorted by id. Raises UserError if releases are mixed or a file is missing."""
        folders = _case_folders(root)
        years = sorted({release.year for release, _ in folders})
        if len(years) > 1:
            raise UserError(
                f"task {self.name!r}: {root} mixes the releases {' and '.join(years)}, which share patients under other "
                "names and number the tumour otherwise: keep one release in it"
            )
        cases = []
        for release, folder in folders:
            match = release.case.fullmatch(folder.name)
            assert match is not None, folder
            *images, label = (_volume(folder, release, kind) for kind in release.files)
            cases.append(Case(folder.name, tuple(images), label, patient=match[1], numbering=release.numbering))
        return cases

    def write_case(
        self, root: Path, number: int, images: NDArray[Any], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        """Write one phantom case as BraTS 2020 has it."""
        folder = root / f"BraTS20_Training_{number:03d}"
        for channel, voxels in zip((*self.channels, "seg"), (*images, label), strict=True):
            harness.write_image(folder / f"{folder.name}_{channel}.nii.gz", voxels, affine)


def _case_folders(root: Path) -> list[tuple[Release, Path]]:
    """The case folders in `root` with their releases, sorted by name."""
    folders = sorted(path for path in root.glob("BraTS*") if path.is_dir())
    return [(release, path) for path in folders for release in RELEASES if release.case.fullmatch(path.name)]


def _volume(folder: Path, release: Release, kind: str) -> Path:
    """The file of a modality or of the label map. Raises UserError if it is missing."""
    name = f"{folder.name}{release.separator}{kind}"
    for path in (folder / f"{name}.nii.gz", folder / f"{name}.nii"):
        if path.exists() or path.is_symlink():
            return path
    if kind == "seg" and (folder / ODD_LABEL).exists():
        return folder / ODD_LABEL
    raise UserError(
        f"{folder / name}.nii.gz (or .nii) is missing; a case of BraTS {release.year} has {', '.join(release.files)}: "
        "unpack it again, or take the folder out"
    )


brats = BraTSTask(
    name="brats",
    version="2",
    description="BraTS 2020, 2021 or 2023 (GLI): glioma in four MR modalities; whole tumour, tumour core, enhancing tumour",
    licence="CC-BY-NC 4.0 on registration",
    reference="Menze et al. 2015, doi:10.1109/TMI.2014.2377694; Bakas et al. 2017, doi:10.1038/sdata.2017.117",
    registration="www.med.upenn.edu/cbica/brats2020, or www.synapse.org for 2021 and 2023",
    layout="MICCAI_BraTS2020_TrainingData/BraTS20_Training_NNN/BraTS20_Training_NNN_{flair,t1,t1ce,t2,seg}.nii.gz, "
    "or BraTS2021_NNNNN/BraTS2021_NNNNN_{...}.nii.gz, or BraTS-GLI-NNNNN-NNN/BraTS-GLI-NNNNN-NNN-{t2f,t1n,t1c,t2w,seg}.nii.gz",
    channels=("flair", "t1", "t1ce", "t2"),
    aliases={"flair": ("t2f",), "t1": ("t1n",), "t1ce": ("t1c",), "t2": ("t2w",)},  # from 2023 on
    # Label 3 does not exist in BraTS 2020; MSD Task01 and BraTS 2023 number the same tissues differently.
    targets={"whole_tumor": (1, 2, 4), "tumor_core": (1, 4), "enhancing_tumor": (4,)},
    labels=(0, 1, 2, 4),
    overlapping=True,
    spacing=(1.0, 1.0, 1.0),
    normalisation=Percentiles(),
    presets={
        # Few steps, so that the first table of the phantom, control included, is ready within four minutes.
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
    test_ids=read_test_ids("brats2020"),
)
