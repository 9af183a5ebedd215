"""Segments new images with the network of a finished run: `harness predict`.

It needs the folder of the run and its backbone, but not its data.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from harness.api.registry import Registry
from harness.api.task import Case, Task
from harness.data.cases import group_images, load_case, order_channels
from harness.data.duplicates import signature
from harness.data.image_files import read_header, write_label
from harness.data.image_names import stem
from harness.data.preprocessing import preprocess, quantise, steps_of
from harness.evaluation.sliding_window import predict
from harness.runs.restore import Restored, in_memory, read_run, restore
from harness.system.console import progress, say
from harness.system.errors import UserError
from harness.training.lineage import say_what_is_lost


def predict_images(
    run: Path, inputs: Sequence[Path], output: Path, plugins: Sequence[str]
) -> tuple[list[Path], list[str]]:
    """Segment one case into a file, or a folder of cases into a folder.

    Args:
        inputs: one file per channel of a case, one 4D file, or one folder.
        output: file, or folder for a folder of cases.

    Returns:
        The written paths; and, for a folder, why each of the other cases could not be segmented.

    Raises:
        UserError: the record cannot be used, images do not fit the task, or an input would be overwritten.
    """
    for path in inputs:
        if not path.exists():
            raise UserError(f"{path} does not exist: give images that are there, or a folder of them")
    record = read_run(run)
    restored = restore(run, record, Registry(plugins))
    task = restored.task
    folder = len(inputs) == 1 and inputs[0].is_dir()
    if folder:
        cases = group_images(inputs[0], task)
        if output.exists() and not output.is_dir():
            raise UserError(f"{output} is no folder, and {inputs[0]} is one: give a folder to write to")
    else:
        if output.parent.exists() and not output.parent.is_dir():
            raise UserError(f"{output.parent} is no folder: give another place to write to")
        if not output.name.endswith((".nii.gz", ".nii")):
            raise UserError(f"{output}: predictions are written as .nii.gz or .nii: give such a name")
        cases = [Case(id=stem(output), images=tuple(order_channels(inputs, task)), label=None)]
        if len(inputs) == len(task.channels) > 1:
            pairs = zip(task.channels, cases[0].images, strict=True)
            say(f"channels: {', '.join(f'{channel} = {path.name}' for channel, path in pairs)}")
    outputs = [output / f"{case.id}.nii.gz" if folder else output for case in cases]
    input_paths = {path.resolve() for case in cases for path in case.images}
    for path in outputs:
        if path.resolve() in input_paths:
            raise UserError(f"{path} is an input, which would be overwritten: give another output")
    if restored.lineage is not None:
        say_what_is_lost(restored.lineage)
    written, problems = [], []
    for case, path in zip(progress(cases, "predict"), outputs, strict=True):
        try:
            _check_channels(case, task)
            _predict(restored, case, path, record["task_description"].get("numbering", []))
            written.append(path)
        except UserError as error:
            if not folder:
                raise
            problems.append(str(error))
    return written, problems


def _check_channels(case: Case, task: Task) -> None:
    """Raises UserError if a case has another number of channels than the task."""
    headers = [read_header(path) for path in case.images]
    num_channels = sum(header.shape[3] if len(header.shape) == 4 else 1 for header in headers)
    if num_channels != len(task.channels):
        raise UserError(
            f"{case.images[0]}: {num_channels} channels, {task.name!r} has {len(task.channels)}: {', '.join(task.channels)}: "
            "give a file for each in this order, or one 4D file"
        )


def _predict(restored: Restored, case: Case, path: Path, numbering: Sequence[tuple[int, int]]) -> None:
    """Segment one case and write its label map. The user is told if the weights were trained on it.

    Args:
        numbering: as `Case.numbering`, of the label files that the run was trained with.
    """
    loaded = load_case(restored.task, case)
    if restored.lineage is not None:
        signatures = np.stack([signature(channel) for channel in loaded.image])
        if pairs := restored.lineage.seen({case.id: ("", signatures)}):
            say(
                f"{case.images[0]} looks like a scan that these weights were trained on (correlation "
                f"{max(value for *_, value in pairs):.3f}): its prediction shows no quality on new scans"
            )
    image, _, geometry = preprocess(restored.task, loaded, str(case.images[0]))
    # Values are rounded as in the cache, so that a test case gets the same prediction that was scored.
    steps = steps_of(restored.task.normalisation)
    image = quantise(image, steps).astype(np.float32) * np.float32(1 / steps)
    with in_memory(case.images[0], restored.trained.crop):
        probabilities = predict(restored.task, restored.network, image, restored.trained, restored.evaluate)
    masks = geometry.decide(restored.task, probabilities)
    write_label(path, restored.task.compose(masks, numbering), loaded.affine)
