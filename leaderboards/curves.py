"""Dice over the share of the labels (the paper's Figure 4) or over a training budget, and the area under each curve."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from leaderboards import statistics
from leaderboards.board import Group, Table, drawn_text
from leaderboards.records import SHARED, Run
from leaderboards.text import align, printable

MOST_STEPS = 10**12
FRACTION, SUBSET = SHARED.index("label_fraction"), SHARED.index("label_subset")


@dataclass(frozen=True)
class Axis:
    """What a curve is drawn over.

    Attributes:
        label: of the axis in a figure.
        values: in words, for messages.
        form: value -> text.
        scale: factor from the value to the number on the axis.
    """

    label: str
    values: str
    form: Callable[[float], str]
    scale: float = 1


AXES = {
    "label_fraction": Axis("labels used, %", "label fractions", lambda value: f"{value:.0%}", 100),
    "pretrain.steps": Axis("pre-training steps", "numbers of pre-training steps", lambda value: f"{value:.0f}"),
    "finetune.steps": Axis("fine-tuning steps", "numbers of fine-tuning steps", lambda value: f"{value:.0f}"),
}


@dataclass(frozen=True)
class Curve:
    """The curve of one method on one backbone.

    Attributes:
        points: label fractions or numbers of steps, in ascending order.
        groups: the rows of the method, one per point.
        area: value, low, high; the area under the curve divided by its range, which is a mean Dice.
    """

    name: str
    points: tuple[float, ...]
    groups: list[Group]
    area: tuple[float, float, float]

    def area_text(self, digits: int) -> str:
        """The area with its interval, where it has one."""
        value, low, high = (f"{number:.{digits}f}" for number in self.area)
        return value if low == "nan" else f"{value} [{low}, {high}]"


@dataclass(frozen=True)
class Curves:
    """Curves that share everything but `over`, a key of `AXES`. Areas are comparable only between curves over the same points.

    Attributes:
        left_out: rows that have the same point as another row of their curve.
    """

    title: str
    over: str
    curves: list[Curve]
    left_out: list[str]

    @property
    def axis(self) -> Axis:
        """What the curves are drawn over."""
        return AXES[self.over]

    def __str__(self) -> str:
        points = sorted({point for curve in self.curves for point in curve.points})
        widest = max((curve.points for curve in self.curves), key=len)
        rows = [["", *map(self.axis.form, points), "area [95 % CI]"]]
        for curve in sorted(self.curves, key=lambda curve: -curve.area[0]):
            dice = dict(zip(curve.points, (group.dice.mean[-1] for group in curve.groups), strict=True))
            note = "" if curve.points == widest else f"  (other {self.axis.values}: not comparable)"
            table_cells = [f"{dice[point]:.4f}" if point in dice else "-" for point in points]
            rows.append([printable(curve.name), *table_cells, f"{curve.area_text(4)}{note}"])
        lines = [printable(self.title), *align(rows, right=range(1, 1 + len(points)))]
        lines += [f"  {note}" for curve in self.curves if (note := _unequal_seeds(curve, self.axis.form))]
        lines += [f"  left out, as another row has the same point: {printable(name)}" for name in self.left_out]
        return "\n".join(lines)


def _unequal_seeds(curve: Curve, form: Callable[[float], str]) -> str:
    """Which seeds each point has, where they differ: then the curve shows their luck as well. Empty where they are equal."""
    seeds = [", ".join(str(run.seed) for run in group.runs) for group in curve.groups]
    if len(set(seeds)) == 1:
        return ""
    points = "; ".join(f"{form(point)}: {own}" for point, own in zip(curve.points, seeds, strict=True))
    return f"{printable(curve.name)} has other seeds at each point ({points}): do not compare them"


def find(tables: Sequence[Table], over: str = "label_fraction") -> list[Curves]:
    """The curves of all methods with two or more points, in sets that share everything else.

    Over `pretrain.steps`, each curve begins at 0 with the control of its table and backbone. It does not for records under
    rules 1, where another budget is another table.
    """
    left_out: dict[tuple[Any, ...], list[str]] = defaultdict(list)
    sets: dict[tuple[Any, ...], dict[str, dict[float, Group]]] = defaultdict(lambda: defaultdict(dict))
    for table in tables:
        for group in [group for group in table.groups if not group.imported]:
            point = _point(group.runs[0], over)
            if point is not None:
                name = f"{group.runs[0].method_without(over)} ({group.backbone})"
                rest = _rest(table, group.runs[0], over)
                if sets[rest][name].setdefault(point, group) is not group:
                    left_out[rest].append(f"{group.name}, {AXES[over].form(point)}")
    curve_sets = []
    for rest, members in sets.items():
        if over == "pretrain.steps":
            _begin_with_controls(members, [table for table in tables if _key(table) == rest])
        curves = []
        for name, groups in members.items():
            if len(groups) < 2:
                continue
            points = tuple(sorted(groups))
            ordered = [groups[point] for point in points]
            area = statistics.area_under_curve(points, [group.dice for group in ordered])
            curves.append(Curve(name, points, ordered, area))
        if curves:
            task, data, preset, mode, protocol, *fraction = rest[:6]
            labels = "" if over == "label_fraction" else f", {fraction[0]:.0%} of the labels"
            labels += drawn_text(curves[0].groups[0].runs[0].table[SUBSET])
            curve_sets.append(
                Curves(f"{task}, {data}, preset {preset}, {mode}, {protocol}{labels}", over, curves, left_out[rest])
            )
    return curve_sets


def _begin_with_controls(members: dict[str, dict[float, Group]], tables: Sequence[Table]) -> None:
    """Add the control of the same backbone at 0 steps to each curve that has another point."""
    controls = {group.backbone: group for table in tables for group in table.groups if group.is_control}
    for groups in members.values():
        backbone = next(iter(groups.values())).backbone
        if backbone in controls:
            groups.setdefault(0.0, controls[backbone])


def _point(run: Run, over: str) -> float | None:
    """The value of a run on the axis; None where it has none: it pre-trains nothing, or its budget is in epochs."""
    if over == "label_fraction":
        return float(run.record["label_fraction"])
    stage = over.partition(".")[0]
    if stage not in run.record["timing"]["seconds"]:
        return None
    config = run.record.get("config", {})
    settings = config.get(stage, {}) if isinstance(config, dict) else {}
    steps = settings.get("steps") if isinstance(settings, dict) else None
    if not isinstance(steps, int) or isinstance(steps, bool) or not 0 < steps <= MOST_STEPS:
        return None
    return float(steps)


def _rest(table: Table, run: Run, over: str) -> tuple[Any, ...]:
    """What the runs of a set of curves share."""
    if over == "label_fraction":
        return (*table.key[:FRACTION], *table.key[FRACTION + 1 :], table.targets)
    mode = SHARED.index("mode")
    shared = run.table_without(over)
    # The control is in the tables of every mode.
    return (*shared[:mode], table.key[mode], *shared[mode + 1 :], table.targets)


def _key(table: Table) -> tuple[Any, ...]:
    """The key of a table with its targets."""
    return (*table.key, table.targets)
