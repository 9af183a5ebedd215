"""The one-page HTML report of `harness data check`. It opens from disk, needs no network, and escapes all text."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.image import imsave
from numpy.typing import NDArray

from harness.api.task import ImageSet
from harness.data.check import SPOILS, CheckedCase, problems_of
from harness.data.pictures import colours
from harness.system.files import printable


def render_report(images: ImageSet, root: str, checked: Sequence[CheckedCase], summary: str) -> str:
    """The report as HTML: a table per kind of problem, a slice of each case, and a table of all cases."""
    groups = problems_of(checked)
    bad = {problem.case for (weight, _), problems in groups.items() for problem in problems if weight == SPOILS}
    environment = Environment(
        loader=PackageLoader("harness.data", "templates"), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    )
    environment.filters["printable"] = printable
    return environment.get_template("check.html").render(
        name=images.name,
        description=images.description,
        root=root,
        summary=summary,
        bad=bad,
        groups=[
            {
                "kind": kind,
                "weight": weight,
                "spoils": weight == SPOILS,
                "rows": [[problem.case, problem.text] for problem in problems],
            }
            for (weight, kind), problems in groups.items()
        ],
        keys=_legend(images),
        figures=[
            {"case": result.case.id, "bad": result.case.id in bad, "image": _data_url(result.thumbnail)}
            for result in checked
        ],
        cases=_table_of_cases(images, checked),
    )


def _table_of_cases(images: ImageSet, checked: Sequence[CheckedCase]) -> dict[str, Any]:
    """Headings and rows of the table of all cases; volumes of the targets are in ml."""
    headings = ["case", "shape", "spacing mm", "axes", "types", *(f"{name} ml" for name in images.targets)]
    rows = []
    for result in checked:
        millilitres = float(np.prod(result.spacing)) / 1000 if result.spacing else 0.0
        volumes = [
            sum(result.voxels.get(value, 0) for value in values) * millilitres for values in images.targets.values()
        ]
        rows.append(
            [
                result.case.id,
                " x ".join(map(str, result.shape)),
                " x ".join(f"{edge:.3g}" for edge in result.spacing),
                result.axes,
                result.types,
                *(_volume(volume) if result.voxels else "" for volume in volumes),
            ]
        )
    return {"heads": headings, "rows": rows}


def _volume(millilitres: float) -> str:
    """A volume in ml as text: whole numbers from 100 ml on, three significant digits below."""
    return f"{millilitres:.0f}" if millilitres >= 100 else f"{millilitres:.3g}"


def _legend(images: ImageSet) -> list[dict[str, Any]]:
    """Colour and name of each label value but 0; a value that is no target by itself has an empty name."""
    names = {values[0]: name for name, values in images.targets.items() if len(values) == 1}
    pairs = zip(images.labels[1:], colours(len(images.labels) - 1), strict=True)
    return [{"value": value, "colour": colour, "name": names.get(value, "")} for value, colour in pairs]


def _data_url(pixels: NDArray[np.uint8] | None) -> str:
    """PNG of an image (rows, columns, 3) in base64; empty if there is no image."""
    if pixels is None:
        return ""
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return base64.b64encode(file.getvalue()).decode()
