"""The ten tasks of the Medical Segmentation Decathlon, and its brain tumours with the targets of BraTS."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harness import Archive, Percentiles, PhantomShape, Window
from tasks.case_lists import read_test_ids
from tasks.folders import FolderTask, crops

REFERENCE = "Antonelli et al. 2022, The Medical Segmentation Decathlon, Nat. Commun. 13:4128"
LICENCE = "CC-BY-SA 4.0"
# HU; the common window for abdominal organs (MONAI's BTCV bundles); the paper states none.
ABDOMEN = Window(-175, 250)
LUNG = Window(-1000, 400)
PAPER = {"finetune.epochs": 600}  # section IV-C, liver and spleen
# Few steps, so that the first table of a phantom, control included, is ready within minutes.
QUICK = {"pretrain.steps": 60, "finetune.steps": 150}


@dataclass(frozen=True, kw_only=True)
class DecathlonTask(FolderTask):
    """A task of the Decathlon, which has a public archive."""

    @classmethod
    def from_folder(cls, folder: Path) -> FolderTask | None:
        """The task of TEN that recognises the folder, in the Decathlon's or nnU-Net's layout; else one made from the folder."""
        if not (folder / "dataset.json").is_file():
            return None
        task = next((task for task in TEN if task.recognises(folder)), None)
        return task or FolderTask.from_folder(folder)

    def archive(self) -> Archive:
        """The public archive; MONAI has its address and its MD5 sum."""
        from monai.apps import DecathlonDataset

        return Archive(DecathlonDataset.resource[self.folder], DecathlonDataset.md5[self.folder], self.folder)


def _ct(
    name: str, folder: str, targets: dict[str, int], shapes: Any, window: Window = ABDOMEN, **more: Any
) -> DecathlonTask:
    """A CT task with the geometry of the paper for liver and spleen: 1.5 x 1.5 x 2 mm, crops of 96^3 voxels (section IV-A)."""
    return DecathlonTask(
        name=name,
        version="1",
        licence=LICENCE,
        reference=REFERENCE,
        channels=("CT",),
        targets={target: (value,) for target, value in targets.items()},
        labels=(0, *targets.values()),
        overlapping=False,
        spacing=(1.5, 1.5, 2.0),
        normalisation=window,
        folder=folder,
        presets=crops((96, 96, 96), demo=QUICK, paper=PAPER),
        phantom=tuple(shapes),
        phantom_size=(72, 64, 64),
        layout=_layout(folder),
        **more,
    )


def _mr(name: str, folder: str, presets: Mapping[str, Any], **more: Any) -> DecathlonTask:
    """An MR task, scaled by percentiles."""
    return DecathlonTask(
        name=name,
        licence=LICENCE,
        reference=REFERENCE,
        normalisation=Percentiles(),
        folder=folder,
        presets=presets,
        layout=_layout(folder),
        **{"version": "1", "overlapping": False, **more},
    )


def _layout(folder: str) -> str:
    """The expected files, for messages."""
    return f"{folder}/ with dataset.json, imagesTr/ and labelsTr/"


hippocampus = _mr(
    "msd_hippocampus",
    "Task04_Hippocampus",
    crops((35, 50, 35)),
    version="2",
    description="MSD Task04 Hippocampus: T1 MR, anterior and posterior hippocampus, 1 mm",
    titles=("Hippocampus",),
    channels=("MRI",),
    targets={"anterior": (1,), "posterior": (2,)},
    labels=(0, 1, 2),
    spacing=(1.0, 1.0, 1.0),
    phantom=(
        PhantomShape(1, (0.0, 0.3, -0.1), (0.32, 0.34, 0.32), (-0.25,)),
        PhantomShape(2, (0.05, -0.3, 0.05), (0.25, 0.42, 0.28), (-0.38,)),
    ),
    phantom_size=(36, 52, 36),
    test_ids=read_test_ids("msd_hippocampus"),
)

brain_tumour = _mr(
    "msd_brain_tumour",
    "Task01_BrainTumour",
    crops((138, 170, 138), demo=QUICK),
    description="MSD Task01 BrainTumour in the Decathlon's terms: edema, non-enhancing and enhancing tumour",
    titles=("BRATS", "BrainTumour"),
    names=("edema", "non-enhancing tumor", "enhancing tumour"),
    channels=("FLAIR", "T1w", "t1gd", "T2w"),
    targets={"edema": (1,), "non_enhancing_tumor": (2,), "enhancing_tumour": (3,)},
    labels=(0, 1, 2, 3),
    spacing=(1.0, 1.0, 1.0),
    phantom=(
        PhantomShape(1, (0.3, 0.1, 0.0), (0.42, 0.38, 0.42), (0.75, -0.15, 0.05, 0.65)),
        PhantomShape(2, (0.3, 0.1, 0.0), (0.26, 0.25, 0.27), (-0.25, -0.35, -0.3, 0.2), inside=1),
        PhantomShape(3, (0.33, 0.12, 0.02), (0.18, 0.17, 0.19), (0.3, 0.05, 0.9, 0.1), inside=2),
    ),
    phantom_size=(72, 80, 64),
)

# The same scans with the targets of BraTS. The label values differ from those of BraTS' own releases.
brats = replace(
    brain_tumour,
    name="msd_brats",
    description="MSD Task01 BrainTumour in BraTS' terms: whole tumour, tumour core, enhancing tumour, which overlap",
    targets={"whole_tumor": (1, 2, 3), "tumor_core": (2, 3), "enhancing_tumor": (3,)},
    overlapping=True,
)

heart = _mr(
    "msd_heart",
    "Task02_Heart",
    crops((320, 320, 130), demo=QUICK),
    description="MSD Task02 Heart: MR, left atrium",
    titles=("LeftAtrium", "Heart"),
    channels=("MRI",),
    targets={"left_atrium": (1,)},
    labels=(0, 1),
    spacing=(1.25, 1.25, 1.37),
    phantom=(PhantomShape(1, (0.1, -0.15, 0.0), (0.34, 0.3, 0.4), (0.5,)),),
)

prostate = _mr(
    "msd_prostate",
    "Task05_Prostate",
    crops((320, 320, 20), demo=QUICK),
    description="MSD Task05 Prostate: T2 and ADC MR, peripheral and transition zone",
    titles=("PROSTATE",),
    channels=("T2", "ADC"),
    targets={"pz": (1,), "tz": (2,)},
    labels=(0, 1, 2),
    spacing=(0.6, 0.6, 3.6),
    phantom=(
        PhantomShape(1, (0.0, -0.1, 0.0), (0.42, 0.4, 0.5), (0.55, 0.35)),
        PhantomShape(2, (0.0, 0.05, 0.0), (0.26, 0.22, 0.34), (-0.4, -0.35), inside=1),
    ),
    phantom_size=(64, 64, 34),
)

liver = _ct(
    "msd_liver",
    "Task03_Liver",
    {"liver": 1, "tumor": 2},
    [
        PhantomShape(1, (0.3, 0.05, 0.1), (0.46, 0.48, 0.55), (70,)),
        PhantomShape(2, (0.35, 0.0, 0.15), (0.16, 0.18, 0.18), (-75,), inside=1),
    ],
    description="MSD Task03 Liver: CT, liver and liver tumour",
    titles=("LITS", "Liver"),
    names=("liver", "cancer"),
)

lung = _ct(
    "msd_lung",
    "Task06_Lung",
    {"cancer": 1},
    [PhantomShape(1, (0.35, 0.1, 0.0), (0.2, 0.2, 0.22), (250,))],
    window=LUNG,
    description="MSD Task06 Lung: CT, lung cancer",
    titles=("Lung",),
)

pancreas = _ct(
    "msd_pancreas",
    "Task07_Pancreas",
    {"pancreas": 1, "cancer": 2},
    [
        PhantomShape(1, (0.0, 0.1, 0.0), (0.44, 0.22, 0.24), (60,)),
        PhantomShape(2, (0.12, 0.1, 0.0), (0.16, 0.14, 0.14), (-70,), inside=1),
    ],
    description="MSD Task07 Pancreas: CT, pancreas and its masses",
    titles=("Pancreas",),
)

hepatic_vessel = _ct(
    "msd_hepatic_vessel",
    "Task08_HepaticVessel",
    {"vessel": 1, "tumour": 2},
    [
        PhantomShape(1, (0.2, 0.2, 0.0), (0.12, 0.12, 0.6), (150,)),
        PhantomShape(2, (0.3, -0.25, 0.1), (0.2, 0.2, 0.2), (-60,)),
    ],
    description="MSD Task08 HepaticVessel: CT, hepatic vessels and tumours",
    titles=("HepaticVessel",),
)

spleen = _ct(
    "msd_spleen",
    "Task09_Spleen",
    {"spleen": 1},
    [PhantomShape(1, (-0.5, -0.2, 0.1), (0.24, 0.32, 0.34), (80,))],
    description="MSD Task09 Spleen: CT, spleen",
    titles=("Spleen",),
)

colon = _ct(
    "msd_colon",
    "Task10_Colon",
    {"cancer": 1},
    [PhantomShape(1, (0.3, 0.15, -0.2), (0.2, 0.18, 0.2), (90,))],
    description="MSD Task10 Colon: CT, colon cancer primaries",
    titles=("COLON",),
    names=("colon cancer primaries",),
)

TEN = (brain_tumour, heart, liver, hippocampus, prostate, lung, pancreas, hepatic_vessel, spleen, colon)
