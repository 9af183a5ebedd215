"""The one-page report of `harness data check`: opens from disk, needs no network, everything escaped."""

import base64
import io
from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from harness.api.task import ImageSet
from harness.data.check import SPOILS, Checked, problems_of
from harness.data.pictures import colours
from harness.system.files import printable

STYLE = """
:root { color-scheme: light dark; --line: #8884; --bad: #b3261e; --look: #8a5a00; --good: #1b6e3c; }
@media (prefers-color-scheme: dark) { :root { --bad: #ff8a80; --look: #ffc46b; --good: #7ddc9a; } }
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child { overflow-wrap: anywhere; } .cases td { white-space: nowrap; font-variant-numeric: tabular-nums; }
.bad { color: var(--bad); } .look { color: var(--look); } .good { color: var(--good); }
.strip { display: flex; flex-wrap: wrap; gap: .5rem; } figure { margin: 0; width: 112px; }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .3em 0 1em; }
figure img { display: block; max-width: 96px; background: #000; } figure.bad img { outline: 3px solid var(--bad); }
figcaption { font-size: .68rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
"""


def render_report(images: ImageSet, root: str, checked: Sequence[Checked], summary: str) -> str:
    """A page with what was found, a table per problem, a strip of thumbnails and a table of all cases."""
    groups = problems_of(checked)
    bad = {problem.case for (weight, _), found in groups.items() for problem in found if weight == SPOILS}
    parts = [
        f"<h1>{escape(images.name)}: {len(checked)} cases</h1>",
        f"<p>{escape(images.description)}<br><code>{escape(printable(root))}</code></p>",
        f"<p class={'bad' if bad else 'good'}>{escape(summary)}</p>",
    ]
    for (weight, kind), found in groups.items():
        mark = "bad" if weight == SPOILS else "look"
        parts.append(f"<h2 class={mark}>{escape(kind)} <small>({escape(weight)}, {len(found)})</small></h2>")
        parts.append(_table(["case", "what"], [[problem.case, problem.text] for problem in found]))
    parts += ["<h2>Slices</h2><p>The axial slice of each case with the most labelled voxels.", _key(images)]
    parts += ["</p><div class=strip>"]
    parts += [_figure(each, each.case.id in bad) for each in checked]
    parts += ["</div><h2>Cases</h2>", _cases(images, checked)]
    title = escape(f"data check: {images.name}")
    return (
        f'<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{title}</title><style>{STYLE}</style><body>{''.join(parts)}</body></html>\n"
    )


def _cases(images: ImageSet, checked: Sequence[Checked]) -> str:
    heads = ["case", "shape", "spacing mm", "axes", "types", *(f"{name} ml" for name in images.targets)]
    rows = []
    for each in checked:
        voxel = float(np.prod(each.spacing)) / 1000 if each.spacing else 0.0
        volumes = [sum(each.voxels.get(value, 0) for value in values) * voxel for values in images.targets.values()]
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
    return _table(heads, rows, "cases")


def _volume(millilitres: float) -> str:
    return f"{millilitres:.0f}" if millilitres >= 100 else f"{millilitres:.3g}"


def _key(images: ImageSet) -> str:
    """The colours of the label values, by the names of the targets that have them alone."""
    names = {values[0]: name for name, values in images.targets.items() if len(values) == 1}
    return "".join(
        f"<span class=key style='background:{colour}'></span>{value} {escape(names.get(value, ''))}"
        for value, colour in zip(images.labels[1:], colours(len(images.labels) - 1), strict=True)
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]], kind: str = "problems") -> str:
    head = "".join(f"<th scope=col>{escape(text)}" for text in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(printable(str(cell)))}" for cell in row) for row in rows)
    return f"<div class='scroll {kind}'><table><thead><tr>{head}<tbody>{body}</table></div>"


def _figure(each: Checked, bad: bool) -> str:
    name = escape(printable(each.case.id))
    if each.thumbnail is None:
        return f"<figure class=bad><div role=img aria-label='no image'>not readable</div><figcaption>{name}</figcaption></figure>"
    picture = base64.b64encode(_png(each.thumbnail)).decode()
    mark = " class=bad" if bad else ""
    return (
        f'<figure{mark}><img loading=lazy alt="slice of {name}" src="data:image/png;base64,{picture}">'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _png(pixels: NDArray[np.uint8]) -> bytes:
    file = io.BytesIO()
    imsave(file, pixels, format="png")
    return file.getvalue()
