"""Medical Segmentation Decathlon folders: `dataset.json`, `imagesTr`, `labelsTr`."""

import json
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harness import Case, Percentiles, PhantomShape, Task, UserError

REFERENCE = "Antonelli et al. 2022, The Medical Segmentation Decathlon, Nat. Commun. 13:4128"


@dataclass(frozen=True, kw_only=True)
class MSDTask(Task):
    """One Decathlon task; `folder` is its name on disk and `title` what its `dataset.json` calls itself."""

    folder: str
    title: str

    def find(self, data: Path) -> Path:
        for root in (data, data / self.folder):
            if (root / "dataset.json").is_file():
                break
        else:
            raise UserError(
                f"task {self.name!r}: no dataset.json in {data} nor in {data / self.folder}: give --data the task's "
                "folder or the one that contains it"
            )
        title = read_description(root).get("name")
        if title != self.title:
            raise UserError(
                f"task {self.name!r}: {root / 'dataset.json'} describes {title!r}, expected {self.title!r}: give --data "
                f"the folder {self.folder}, or --task {root} to use this one"
            )
        return root

    def cases(self, root: Path) -> list[Case]:
        entries = read_description(root).get("training")
        if not isinstance(entries, list) or not entries:
            raise UserError(f"{root / 'dataset.json'}: 'training' must list the labelled cases")
        return sorted((_case(root, entry) for entry in entries), key=lambda case: case.id)

    def write_case(
        self, root: Path, number: int, images: NDArray[np.float32], label: NDArray[np.uint8], affine: NDArray[Any]
    ) -> None:
        import nibabel as nib

        name = f"{self.title.lower()}_{number:03d}.nii.gz"
        for sub, voxels in (
            ("imagesTr", np.moveaxis(images, 0, -1) if len(images) > 1 else images[0]),
            ("labelsTr", label),
        ):
            (root / sub).mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, affine), root / sub / name)
        path = root / "dataset.json"
        described: dict[str, Any] = read_description(root) if path.exists() else self._description()
        described["training"].append({"image": f"./imagesTr/{name}", "label": f"./labelsTr/{name}"})
        described["numTraining"] = len(described["training"])
        path.write_text(json.dumps(described, indent=1))

    def _description(self) -> dict[str, Any]:
        names = {str(values[0]): target for target, values in self.targets.items()}
        return {
            "name": self.title,
            "description": f"phantom in the layout of {self.folder}, not real data",
            "reference": self.reference,
            "licence": self.licence,
            "tensorImageSize": "3D" if len(self.channels) == 1 else "4D",
            "modality": {str(number): channel for number, channel in enumerate(self.channels)},
            "labels": {"0": "background", **names},
            "training": [],
            "numTest": 0,
            "test": [],
        }

    @classmethod
    def from_folder(cls, folder: Path) -> "MSDTask | None":
        """Any Decathlon-style folder: channels, targets and spacing follow from `dataset.json` and the headers.

        Intensities are scaled by percentiles; the spacing is the median of the cases'.
        """
        if not (folder / "dataset.json").is_file() or "modality" not in (described := read_description(folder)):
            return None
        title, labels, modality = str(described.get("name")), described.get("labels"), described["modality"]
        if title == hippocampus.title:
            return hippocampus
        if not isinstance(labels, dict) or not all(key.isdigit() for key in labels) or not isinstance(modality, dict):
            raise UserError(f"{folder / 'dataset.json'}: 'labels' and 'modality' must map numbers to names")
        task = cls(
            name=f"msd_{_slug(title)}",
            version="1",
            description=str(described.get("description", title)),
            licence=str(described.get("licence", "see dataset.json")),
            reference=REFERENCE,
            channels=tuple(str(modality[key]) for key in sorted(modality, key=int)),
            targets={_slug(str(name)): (int(key),) for key, name in labels.items() if int(key)},
            labels=tuple(sorted(map(int, labels))),
            overlapping=False,
            spacing=None,
            normalisation=Percentiles(),
            folder=folder.name,
            title=title,
        )
        return _replace_spacing(task, folder)


def read_description(root: Path) -> dict[str, Any]:
    """`dataset.json` of a Decathlon folder. Raises UserError where it is not a JSON object."""
    path = root / "dataset.json"
    try:
        described = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(described, dict):
        raise UserError(f"{path} must hold a JSON object, it holds a {type(described).__name__}")
    return described


def _case(root: Path, entry: Any) -> Case:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("image", "label")):
        raise UserError(f"{root / 'dataset.json'}: a training entry needs 'image' and 'label', it is {str(entry)[:80]}")
    paths = []
    for key in ("image", "label"):
        path = (root / entry[key]).resolve()
        if not path.is_relative_to(root.resolve()):
            raise UserError(f"{root / 'dataset.json'}: {entry[key]!r} leaves the task's folder")
        if not path.is_file():
            raise UserError(f"{path} is missing, {root / 'dataset.json'} lists it: unpack the archive again")
        paths.append(path)
    return Case(id=paths[0].name.removesuffix(".gz").removesuffix(".nii"), images=(paths[0],), label=paths[1])


def _replace_spacing(task: MSDTask, folder: Path) -> MSDTask:
    from dataclasses import replace

    import nibabel as nib

    headers: list[Any] = [nib.load(case.images[0]).header for case in task.cases(folder)]
    spacings = [header.get_zooms()[:3] for header in headers]
    median = [round(float(value), 4) for value in np.median(spacings, axis=0)]
    return replace(task, spacing=(median[0], median[1], median[2]))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_") or "unnamed"


def _shipped_test_ids(name: str) -> frozenset[str]:
    return frozenset(json.loads((resources.files("tasks") / "splits" / f"{name}.json").read_text())["test"])


hippocampus = MSDTask(
    name="msd_hippocampus",
    version="1",
    description="MSD Task04 Hippocampus: T1 MR, anterior and posterior hippocampus, 1 mm",
    licence="CC-BY-SA 4.0",
    reference=REFERENCE,
    channels=("MRI",),
    targets={"anterior": (1,), "posterior": (2,)},
    labels=(0, 1, 2),
    overlapping=False,
    spacing=(1.0, 1.0, 1.0),
    normalisation=Percentiles(),
    folder="Task04_Hippocampus",
    title="Hippocampus",
    presets={
        "demo": {"pretrain.crop": (32, 64, 32), "finetune.crop": (32, 64, 32)},
        "small": {"pretrain.crop": (64, 64, 64), "finetune.crop": (64, 64, 64)},
        "paper": {"pretrain.crop": (64, 64, 64), "finetune.crop": (64, 64, 64), "finetune.epochs": 600},
    },
    phantom=(
        PhantomShape(1, (0.0, 0.3, -0.1), (0.32, 0.34, 0.32), (-0.25,)),
        PhantomShape(2, (0.05, -0.3, 0.05), (0.25, 0.42, 0.28), (-0.38,)),
    ),
    phantom_size=(36, 52, 36),
    test_ids=_shipped_test_ids("msd_hippocampus"),
)
