"""The leaderboard as one static folder that opens from disk: tables, figures, a page for each run. No network is needed.

Everything that comes from a record passes through Jinja's autoescaping; what is in the pages is text, never script. The
folder `runs` of a site is a folder of runs again, with records and cases, so that others can check and merge them.
"""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from leaderboards import board, curves, figures, table
from leaderboards.board import Table
from leaderboards.records import Run

MARK = ".harness-site"
LINKED = ("record.json", "cases.csv")
INLINE = 2000
"""Rows of tables on the first page; further tables are links."""
DATATABLES = {"datatables_js": "dataTables-3.1.5.min.js", "datatables_css": "dataTables-3.1.2.min.css"}
SECTIONS = ("config", "data", "transfer", "timing", "memory", "computed_with", "environment", "method_prepare", "files")
POINTS = 200


class PublishError(Exception):
    """What was asked for cannot be published; the message says why."""


def publish(
    runs: Sequence[Run],
    out: Path,
    *,
    title: str,
    note: Path | None = None,
    pictures: bool = True,
    reported: pd.DataFrame | None = None,
) -> int:
    """Write the site by rename: `out` is new, empty, or a site that is replaced. Number of pages.

    Args:
        note: a text file; paragraphs are parted by empty lines.
        pictures: copy the pictures of scans that runs have; False where the data's licence forbids it.

    Raises:
        PublishError: `out` holds something else, the note is no text, or the title cannot be written.
    """
    if out.exists() and not (out.is_dir() and ((out / MARK).exists() or not any(out.iterdir()))):
        raise PublishError(
            f"{out} holds something that is no site: give a new folder, an empty one, or a site to replace"
        )
    if not title.isprintable():
        raise PublishError(f"--title {title!r} has characters that cannot be printed: give another")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as partial:
        place = Path(partial) / "site"
        pages = _Site(place, title, _paragraphs(note), pictures).write(runs, reported)
        if out.exists():
            out.replace(Path(partial) / "old")
        place.replace(out)
    return pages


class _Site:
    """What all pages have in common."""

    def __init__(self, place: Path, title: str, note: list[str], pictures: bool) -> None:
        self.place, self.note, self.pictures, self.pages = place, note, pictures, 0
        loader = jinja2.PackageLoader("leaderboards", "templates")
        self.templates = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
        )
        self.templates.globals |= {"title": title, "version": version("ssl-seg-harness"), **DATATABLES}

    def write(self, runs: Sequence[Run], reported: pd.DataFrame | None) -> int:
        """All pages and files."""
        tables = board.gather(runs)
        static = resources.files("leaderboards") / "static"
        (self.place / "static").mkdir(parents=True)
        for entry in static.iterdir():
            (self.place / "static" / entry.name).write_bytes(entry.read_bytes())
        frame = table.build(tables)
        for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.tex"):
            table.write(frame if reported is None else pd.concat([frame, reported]), self.place / name)
        shown = [self._table(number, each) for number, each in enumerate(tables, 1)]
        self._index(runs, tables, shown, reported)
        memberships: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for number, each in enumerate(tables, 1):
            for run in (run for group in each.groups for run in group.runs):
                memberships[run.run_id].append((number, each.title))
        for run in runs:
            self._run(run, memberships[run.run_id])
        (self.place / MARK).write_text("A site written by `harness leaderboard publish`, which may replace it.\n")
        return self.pages

    def _page(self, template: str, path: str, **values: Any) -> None:
        root = "../" * path.count("/")
        target = self.place / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.templates.get_template(template).render(root=root, **values), encoding="utf-8")
        self.pages += 1

    def _table(self, number: int, each: Table) -> dict[str, Any]:
        """The page of one table; what the first page shows of it."""
        rows: list[dict[str, Any]] = []
        for rank, group in zip(each.ranks(), each.groups, strict=True):
            missed = sum(int(run.missed.sum()) for run in group.runs)
            seen = max(run.num_test_seen for run in group.runs)
            rows.append({"rank": rank, "group": group, "missed": missed, "seen": seen})
        rows.sort(key=_place)
        drawn = figures.table_figures(each, self.place / "figures" / str(number)) if len(rows) > 1 else {}
        shown = {
            "number": number,
            "title": each.title,
            "targets": each.targets,
            "shared": each.shared,
            "rows": rows,
            "seen": any(row["seen"] for row in rows),
            "figures": drawn,
            "main_figures": {name: text for name, text in drawn.items() if name in ("dice", "ranks", "pareto")},
        }
        self._page("table.html", f"tables/{number}.html", table=shown, backbones=_backbones([shown]))
        return shown

    def _index(
        self, runs: Sequence[Run], tables: Sequence[Table], shown: list[dict[str, Any]], reported: pd.DataFrame | None
    ) -> None:
        inline: list[dict[str, Any]] = []
        rows = 0
        for each in sorted(shown, key=lambda each: -len(each["rows"])):
            if not inline or rows + len(each["rows"]) <= INLINE:
                inline.append(each)
                rows += len(each["rows"])
        found = curves.find(tables)
        efficiency = {
            f"efficiency_{number}": figures.label_efficiency(each, self.place / "figures" / f"efficiency_{number}")
            for number, each in enumerate(found, 1)
        }
        columns = ["task", "mode", "method", "backbone", "label_fraction", "target", "dice", "hd95_mm", "note"]
        self._page(
            "index.html",
            "index.html",
            note=self.note,
            phantom=any(run.phantom for run in runs),
            num_runs=len(runs),
            overview=shown,
            tables=inline,
            backbones=_backbones(shown),
            efficiency=efficiency,
            efficiency_texts=list(map(str, found)),
            reported=[] if reported is None else reported[columns].astype(object).fillna("-").to_numpy().tolist(),
            reported_columns=columns,
        )

    def _run(self, run: Run, memberships: list[tuple[int, str]]) -> None:
        folder = self.place / "runs" / run.run_id
        folder.mkdir(parents=True)
        for name in LINKED:
            (folder / name).write_bytes((run.folder / name).read_bytes())
        # Links are left out: what they lead to is not the run's.
        shown = self.pictures and not (run.folder / "figures").is_symlink()
        found = sorted((run.folder / "figures").glob("*.png")) if shown else []
        pictures = [path.name for path in found if path.is_file() and not path.is_symlink()]
        for name in pictures:
            (folder / "figures").mkdir(exist_ok=True)
            shutil.copyfile(run.folder / "figures" / name, folder / "figures" / name)
        self._page(
            "run.html",
            f"runs/{run.run_id}/index.html",
            run=run,
            memberships=memberships,
            curves=[
                _curve(stage, values) for stage, values in figures.read_losses(run.folder / "history.jsonl").items()
            ],
            pictures=pictures,
            sections={
                name: _shallow(run.record[name])
                for name in SECTIONS
                if isinstance(run.record.get(name), dict) and run.record[name]
            },
        )


def _place(row: dict[str, Any]) -> tuple[float, str]:
    return row["rank"] or np.inf, row["group"].name


def _backbones(shown: Sequence[dict[str, Any]]) -> list[str]:
    return sorted({row["group"].backbone for each in shown for row in each["rows"]})


def _paragraphs(note: Path | None) -> list[str]:
    if note is None:
        return []
    try:
        text = note.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PublishError(f"--note {note} cannot be read as text ({error}): give a text file in UTF-8") from None
    return [" ".join(part.split()) for part in text.split("\n\n") if part.strip()]


def _shallow(value: Any, depth: int = 8) -> Any:
    """Nested tables and lists to a depth that a page can show; what is deeper is left out."""
    if isinstance(value, dict):
        return {key: _shallow(item, depth - 1) for key, item in value.items()} if depth else "..."
    if isinstance(value, list):
        return [_shallow(item, depth - 1) for item in value] if depth else "..."
    return value


def _curve(stage: str, losses: list[float]) -> dict[str, Any]:
    """A loss over its steps as points of a drawing of 640 x 200, averaged to at most `POINTS`."""
    values = np.array([part.mean() for part in np.array_split(np.array(losses), min(POINTS, len(losses)))])
    least, most = float(values.min()), float(values.max())
    x = np.linspace(40, 630, len(values))
    y = 190 - 180 * (values - least) / ((most - least) or 1)
    text = f"Loss of {stage}: {len(losses)} steps, {values[0]:.4g} at the beginning, {values[-1]:.4g} at the end"
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return {"points": points, "least": least, "most": most, "steps": len(losses), "text": text}
