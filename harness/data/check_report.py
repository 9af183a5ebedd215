"""The one-page report of `harness data check`: opens from disk, needs no network, escapes everything."""

import base64
import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.image import imsave
from numpy.typing import NDArray

from harness.api.task import ImageSet
from harness.data.check import SPOILS, Checked, problems_of
from harness.data.pictures import colours
from harness.system.files import printable


def render_report(images: ImageSet, root: str, checked: Sequence[Checked], summary: str) -> str:
    """The page: a table per kind of problem, a slice of each case, and a table of all cases."""
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
                "rows": [[each.case, each.text] for each in problems],
            }
            for (weight, kind), problems in groups.items()
        ],
        keys=_keys(images),
        figures=[
            {"case": each.case.id, "bad": each.case.id in bad, "image": _data_url(each.thumbnail)} for each in checked
        ],
        cases=_cases(images, checked),
    )


def _cases(images: ImageSet, checked: Sequence[Checked]) -> dict[str, Any]:
    """Headings and rows of the table of all cases."""
    heads = ["case", "shape", "spacing mm", "axes", "types", *(f"{name} ml" for name in images.targets)]
    rows = []
    for each in checked:
        millilitres = float(np.prod(each.spacing)) / 1000 if each.spacing else 0.0
        volumes = [
            sum(each.voxels.get(value, 0) for value in values) * millilitres for values in images.targets.values()
        ]
        rows.append(
            [
                each.case.id,
                " x ".join(map(str, each.shape)),
                " x ".join(f"{edge:.3g}" for edge in each.spacing),
                each.axes,
                each.types,
                *(_volume(volume) if each.voxels else "" for volume in volumes),
            ]
        )
    return {"heads": heads, "rows": rows}


def _volume(millilitres: float) -> str:
    return f"{millilitres:.0f}" if millilitres >= 100 else f"{millilitres:.3g}"


def _keys(images: ImageSet) -> list[dict[str, Any]]:
    """The colours of the label values, by the names of the targets that consist of one value."""
    names = {values[0]: name for name, values in images.targets.items() if len(values) == 1}
    pairs = zip(images.labels[1:], colours(len(images.labels) - 1), strict=True)
    return [{"value": value, "colour": colour, "name": names.get(value, "")} for value, colour in pairs]


def _data_url(pixels: NDArray[np.uint8] | None) -> str:
    """A picture as base64 of PNG; empty where there is none."""
    if pixels is None:
        return ""
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return base64.b64encode(file.getvalue()).decode()
