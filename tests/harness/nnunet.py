"""Data sets in nnU-Net's layout."""

import json
import shutil

from harness.api.registry import Registry


def nnunet(data, folder, names, labels=None):
    """The phantom as an nnU-Net folder whose `dataset` key gives the cases' names."""
    shutil.copytree(data, folder)
    cases = Registry().task("msd_hippocampus").cases(data)
    listed = {
        name: {"images": [f"imagesTr/{case.images[0].name}"], "label": f"labelsTr/{case.label.name}"}
        for name, case in zip(names, cases, strict=True)
    }
    described = {
        "name": "mine",
        "channel_names": {"0": "MRI"},
        "labels": labels or {"background": 0, "a": 1, "b": 2},
        "file_ending": ".nii.gz",
        "dataset": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(described))
    return folder
