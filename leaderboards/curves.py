"""Dice over the share of the labels that was used (the paper's Figure 4), and the area under it."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from leaderboards import statistics
from leaderboards.board import Group, Table
from leaderboards.records import SHARED
from leaderboards.text import align, printable

FRACTION = SHARED.index("label_fraction")


@dataclass(frozen=True)
class Curve:
    """The curve of one method on one backbone.

    Attributes:
        fractions: the label fractions, in ascending order.
        groups: the rows of the method, one per fraction.
        area: value, low, high; the area under the curve divided by its range, which is a mean Dice.
    """

    name: str
    fractions: tuple[float, ...]
    groups: list[Group]
    area: tuple[float, float, float]


@dataclass(frozen=True)
class Curves:
    """Curves that share everything but the label fraction. Areas are comparable only between curves over the same fractions."""

    title: str
    curves: list[Curve]

    def __str__(self) -> str:
        fractions = sorted({fraction for curve in self.curves for fraction in curve.fractions})
        widest = max((curve.fractions for curve in self.curves), key=len)
        rows = [["", *(f"{fraction:.0%}" for fraction in fractions), "area [95 % CI]"]]
        for curve in sorted(self.curves, key=lambda curve: -curve.area[0]):
            dice = dict(zip(curve.fractions, (group.dice.mean[-1] for group in curve.groups), strict=True))
            value, low, high = curve.area
            note = "" if curve.fractions == widest else "  (other fractions: not comparable)"
            table_cells = [f"{dice[fraction]:.4f}" if fraction in dice else "-" for fraction in fractions]
            rows.append([printable(curve.name), *table_cells, f"{value:.4f} [{low:.4f}, {high:.4f}]{note}"])
        return "\n".join([printable(self.title), *align(rows, right=range(1, 1 + len(fractions)))])


def find(tables: Sequence[Table]) -> list[Curves]:
    """The curves of all methods with two or more label fractions, in sets that share everything else."""
    sets: dict[tuple[Any, ...], dict[str, list[tuple[float, Group]]]] = defaultdict(lambda: defaultdict(list))
    for table in tables:
        rest = (*table.key[:FRACTION], *table.key[FRACTION + 1 :], table.targets)
        for group in table.groups:
            sets[rest][group.name].append((table.key[FRACTION], group))
    curve_sets = []
    for rest, members in sets.items():
        curves = []
        for name, points in members.items():
            if len(points) < 2:
                continue
            points.sort(key=lambda point: point[0])
            fractions, groups = tuple(fraction for fraction, _ in points), [group for _, group in points]
            area = statistics.label_efficiency(fractions, [group.dice for group in groups])
            curves.append(Curve(name, fractions, groups, area))
        if curves:
            task, data, preset, mode, protocol = rest[:5]
            curve_sets.append(Curves(f"{task}, {data}, preset {preset}, {mode}, {protocol}", curves))
    return curve_sets
