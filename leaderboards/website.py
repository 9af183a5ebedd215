"""The leaderboard as a static web site in one folder: tables, figures, a page for each run. It opens from disk without network.

Jinja's autoescaping applies to everything that comes from a record, so that it appears as text and never acts as a script. The
folder `runs` of a site is a runs folder with records and cases, so that others can check and merge them.
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
from leaderboards.calibration import share_text
from leaderboards.records import Run
from leaderboards.text import seen_text

MARK = ".harness-site"
LINKED = ("record.json", "cases.csv")
INLINE = 2000
"""Largest number of table rows on the first page; the other tables are links."""
DATATABLES = {"datatables_js": "dataTables-3.1.5.min.js", "datatables_css": "dataTables-3.1.2.min.css"}
SECTIONS = ("config", "data", "transfer", "timing", "memory", "computed_with", "environment", "method_prepare", "files")
POINTS = 200  # of a loss curve, at most


class PublishError(Exception):
    """The site cannot be published; the message says why."""


def is_site(folder: Path) -> bool:
    """Whether a folder is a published site, which has its runs in `runs` and its table in `leaderboard.csv`."""
    return (folder / "runs").is_dir() and (folder / "leaderboard.csv").is_file()


def publish(
    runs: Sequence[Run],
    out: Path,
    *,
    title: str,
    note: Path | None = None,
    pictures: bool = True,
    reported: pd.DataFrame | None = None,
) -> int:
    """Write the site into a new folder, then rename that to `out`. Returns the number of pages.

    Args:
        out: a new or empty folder, or a site, which is replaced.
        note: a text file with paragraphs separated by empty lines.
        pictures: copy the runs' pictures of scans; False where the licence of the data forbids it.
        reported: rows that papers report.

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
        site = Path(partial) / "site"
        pages = _Site(site, title, _paragraphs(note), pictures).write(runs, reported)
        if out.exists():
            out.replace(Path(partial) / "old")
        site.replace(out)
    return pages


class _Site:
    """The writer of a site: its folder, its templates and the number of pages so far."""

    def __init__(self, folder: Path, title: str, note: list[str], pictures: bool) -> None:
        self.folder, self.note, self.pictures, self.pages = folder, note, pictures, 0
        loader = jinja2.PackageLoader("leaderboards", "templates")
        self.templates = jinja2.Environment(
            loader=loader, autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined
        )
        self.templates.globals |= {"title": title, "version": version("ssl-seg-harness"), **DATATABLES}

    def write(self, runs: Sequence[Run], reported: pd.DataFrame | None) -> int:
        """Write all pages and files. Returns the number of pages."""
        tables = board.gather(runs)
        static = resources.files("leaderboards") / "static"
        (self.folder / "static").mkdir(parents=True)
        for entry in static.iterdir():
            (self.folder / "static" / entry.name).write_bytes(entry.read_bytes())
        frame, warnings = table.build(tables), table.warnings_of(tables)
        whole = frame if reported is None else pd.concat([frame, reported])
        for name in ("leaderboard.csv", "leaderboard.md", "leaderboard.tex"):
            table.write(whole, self.folder / name, warnings)
        overview = [self._table(number, each) for number, each in enumerate(tables, 1)]
        self._index(runs, tables, overview, reported)
        memberships: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for number, ranked in enumerate(tables, 1):
            for run in (run for group in ranked.groups for run in group.members):
                memberships[run.run_id].append((number, ranked.title))
        for run in runs:
            self._run(run, memberships[run.run_id])
        (self.folder / MARK).write_text("A site written by `harness leaderboard publish`, which may replace it.\n")
        return self.pages

    def _page(self, template: str, path: str, **values: Any) -> None:
        """Render a template to `path` in the site, and count the page."""
        root = "../" * path.count("/")
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(self.templates.get_template(template).render(root=root, **values), encoding="utf-8")
        self.pages += 1

    def _table(self, number: int, ranked: Table) -> dict[str, Any]:
        """Write the page of one table. Returns the values that the first page shows of it."""
        whole, ranked = ranked, ranked.with_short_names()
        rows: list[dict[str, Any]] = []
        for rank, group in zip(ranked.ranks(), ranked.groups, strict=True):
            missed = sum(int(run.missed.sum()) for run in group.runs)
            seen = seen_text(group.num_test_seen)
            share = ranked.share(group)
            value, _, interval = share_text(share).partition(" ")
            cell = {"order": share[0] if share else -1e9, "value": value, "interval": interval}
            rows.append({"rank": rank, "group": group, "missed": missed, "seen": seen, "share": cell})
            rows[-1]["to_scratch"] = ranked.to_scratch(group)
        rows.sort(key=_sort_key)
        drawn = figures.table_figures(ranked, self.folder / "figures" / str(number)) if len(rows) > 1 else {}
        values = {
            "number": number,
            "title": ranked.title,
            "targets": ranked.targets,
            "shared": ranked.shared,
            "rows": rows,
            "seen": any(row["seen"] for row in rows),
            "to_scratch": any(row["to_scratch"] for row in rows),
            "shares": any(each.shares for each in ranked.calibrations),
            "sentences": ranked.sentences,
            "settings": whole.shared_settings if whole is not ranked else "",
            "figures": drawn,
            "main_figures": {name: text for name, text in drawn.items() if name in ("difference", "ranks", "pareto")},
        }
        self._page("table.html", f"tables/{number}.html", table=values, backbones=_backbones([values]))
        return values

    def _index(
        self,
        runs: Sequence[Run],
        tables: Sequence[Table],
        overview: list[dict[str, Any]],
        reported: pd.DataFrame | None,
    ) -> None:
        """Write the first page."""
        inline: list[dict[str, Any]] = []
        rows = 0
        for values in sorted(overview, key=lambda values: -len(values["rows"])):
            if not inline or rows + len(values["rows"]) <= INLINE:
                inline.append(values)
                rows += len(values["rows"])
        curve_sets = [each for over in curves.AXES for each in curves.find(tables, over)]
        efficiency = {
            f"efficiency_{number}": figures.efficiency(each, self.folder / "figures" / f"efficiency_{number}")
            for number, each in enumerate(curve_sets, 1)
        }
        columns = ["task", "mode", "method", "backbone", "label_fraction", "target", "dice", "hd95_mm", "note"]
        self._page(
            "index.html",
            "index.html",
            note=self.note,
            phantom=any(run.phantom for run in runs),
            num_runs=len(runs),
            overview=overview,
            tables=inline,
            backbones=_backbones(overview),
            efficiency=efficiency,
            efficiency_texts=list(map(str, curve_sets)),
            reported=[] if reported is None else reported[columns].astype(object).fillna("-").to_numpy().tolist(),
            reported_columns=columns,
        )

    def _run(self, run: Run, memberships: list[tuple[int, str]]) -> None:
        """Write the page of one run, and copy its record, its cases and its pictures."""
        folder = self.folder / "runs" / run.run_id
        folder.mkdir(parents=True)
        for name in LINKED:
            (folder / name).write_bytes((run.folder / name).read_bytes())
        # Links are left out: their targets do not belong to the run.
        copied = self.pictures and not (run.folder / "figures").is_symlink()
        paths = sorted((run.folder / "figures").glob("*.png")) if copied else []
        pictures = [path.name for path in paths if path.is_file() and not path.is_symlink()]
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


def _sort_key(row: dict[str, Any]) -> tuple[float, str]:
    """Sort key of a row: rank, then name; rows without a rank come last."""
    return row["rank"] or np.inf, row["group"].name


def _backbones(overview: Sequence[dict[str, Any]]) -> list[str]:
    """The backbones of all tables, in alphabetical order."""
    return sorted({row["group"].backbone for values in overview for row in values["rows"]})


def _paragraphs(note: Path | None) -> list[str]:
    """The paragraphs of the note. Raises PublishError where it is no text."""
    if note is None:
        return []
    try:
        text = note.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PublishError(f"--note {note} cannot be read as text ({error}): give a text file in UTF-8") from None
    return [" ".join(paragraph.split()) for paragraph in text.split("\n\n") if paragraph.strip()]


def _shallow(value: Any, depth: int = 8) -> Any:
    """Nested dictionaries and lists down to `depth` levels; deeper values become "..."."""
    if isinstance(value, dict):
        return {key: _shallow(item, depth - 1) for key, item in value.items()} if depth else "..."
    if isinstance(value, list):
        return [_shallow(item, depth - 1) for item in value] if depth else "..."
    return value


def _curve(stage: str, losses: list[float]) -> dict[str, Any]:
    """A loss curve as points of an SVG drawing of 640 x 200, averaged to at most `POINTS` points, with its text."""
    values = np.array([part.mean() for part in np.array_split(np.array(losses), min(POINTS, len(losses)))])
    least, most = float(values.min()), float(values.max())
    x = np.linspace(40, 630, len(values))
    y = 190 - 180 * (values - least) / ((most - least) or 1)
    text = f"Loss of {stage}: {len(losses)} steps, {values[0]:.4g} at the beginning, {values[-1]:.4g} at the end"
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))
    return {"points": points, "least": least, "most": most, "steps": len(losses), "text": text}
