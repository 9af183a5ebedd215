"""New images through a finished run: `harness predict`. Needs the run's folder and its backbone, not its data."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.api.registry import Registry
from harness.api.task import Case
from harness.data.cases import group_images, load_case
from harness.data.image_files import read_header, write_label
from harness.data.image_names import stem
from harness.data.preprocessing import STEPS, preprocess, quantise
from harness.evaluation.sliding_window import predict
from harness.runs.restore import Restored, in_memory, read_run, restore
from harness.system.console import progress
from harness.system.errors import UserError


def predict_images(run: Path, inputs: Sequence[Path], output: Path, plugins: Sequence[str]) -> list[Path]:
    """Segment one case (a file per channel, or one 4D file) into a file, or a folder of cases into a folder.

    Raises:
        UserError: a record that cannot be used, images that do not fit the task, or outputs that would be overwritten.
    """
    record = read_run(run)
    restored = restore(run, record, Registry(plugins))
    task = restored.task
    folder = len(inputs) == 1 and inputs[0].is_dir()
    if folder:
        cases = group_images(inputs[0], task.channels)
        if output.exists() and not output.is_dir():
            raise UserError(f"{output} is no folder, and {inputs[0]} is one: give a folder to write to")
    else:
        if output.parent.exists() and not output.parent.is_dir():
            raise UserError(f"{output.parent} is no folder: give another place to write to")
        if not output.name.endswith((".nii.gz", ".nii")):
            raise UserError(f"{output}: predictions are written as .nii.gz or .nii: give such a name")
        cases = [Case(id=stem(output), images=tuple(inputs), label=None)]
    places = [output / f"{case.id}.nii.gz" if folder else output for case in cases]
    for case in cases:
        headers = [read_header(path) for path in case.images]
        number = sum(header.shape[3] if len(header.shape) == 4 else 1 for header in headers)
        if number != len(task.channels):
            raise UserError(
                f"{case.images[0]}: {number} channels, {task.name!r} has {len(task.channels)}: {', '.join(task.channels)}: "
                "give a file for each in this order, or one 4D file"
            )
    read = {path.resolve() for case in cases for path in case.images}
    for place in places:
        if place.resolve() in read:
            raise UserError(f"{place} is an input, which would be overwritten: give another output")
    for case, place in zip(progress(cases, "predict"), places, strict=True):
        _predict(restored, case, place)
    return places


def _predict(restored: Restored, case: Case, place: Path) -> None:
    loaded = load_case(restored.task, case)
    image, _, geometry = preprocess(restored.task, loaded, str(case.images[0]))
    # As the cache holds it, so that a test case gets the prediction that was scored.
    image = quantise(image).astype(np.float32) * np.float32(1 / STEPS)
    with in_memory(case.images[0], restored.trained.crop):
        probabilities = predict(restored.task, restored.network, image, restored.trained, restored.evaluate)
    write_label(place, restored.task.compose(geometry.decide(restored.task, probabilities)), loaded.affine)
