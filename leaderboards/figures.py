"""Figures of a leaderboard as PNG and SVG. Hatches and markers keep them readable in print and with any colour vision."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import seaborn
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from leaderboards.board import Group, Table
from leaderboards.curves import Curves
from leaderboards.text import printable

MOST = 24
"""Largest number of rows in a figure; of more rows, the best are shown."""
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--")
MARKERS = "osD^vP*X<>"
PHASES = ("forward", "backward", "optimizer")
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "harness",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
Draw = Callable[[Axes], None]


def table_figures(table: Table, folder: Path) -> dict[str, str]:
    """Draw all figures of a table into `folder`. Returns file name without ending -> description of the figure."""
    table = table.with_short_names()
    groups = _best(table)
    descriptions = {}
    kinds: tuple[tuple[str, bool, Callable[[Table, list[Group], Path], str]], ...] = (
        ("difference", len(_compared(groups)) > 0, forest),
        ("dice", True, dice_points),
        ("ranks", sum(group.is_ranked for group in groups) > 1 and table.stability is not None, rank_stability),
        ("pareto", any(group.pretrain_seconds for group in groups), pareto),
        ("step_time", any(group.step_ms for group in groups), step_times),
        ("settings", len(_settings(groups)) > 0, settings_and_time),
        ("convergence", any(group.learning for group in groups), convergence),
        ("training", any((group.runs[0].folder / "history.jsonl").exists() for group in groups), training),
    )
    for name, drawable, draw in kinds:
        if drawable:
            descriptions[name] = draw(table, groups, folder / name)
    return descriptions


def forest(table: Table, groups: list[Group], path: Path) -> str:
    """Draw each row's Dice minus that of scratch with its 95 % interval, over the headroom. Returns a description."""
    rows = sorted(_compared(groups), key=lambda row: row[1])
    headrooms = [each for each in table.calibrations if each.headroom is not None]

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        if len(headrooms) == 1 and headrooms[0].headroom is not None:
            value, *_ = headrooms[0].headroom
            axes.axvspan(0, value, color="0.9", zorder=0)
            axes.text(value, len(rows) - 0.45, f"headroom {value:+.3f} ", ha="right", va="bottom", fontsize="x-small")
        axes.axvline(0, color="0.4", linewidth=0.8, zorder=1)
        for position, (group, mean, low, high) in enumerate(rows):
            axes.errorbar(
                mean,
                position,
                xerr=np.nan_to_num([[mean - low], [high - mean]]).clip(0),
                marker="o",
                color="black",
                markerfacecolor="black" if group.is_ranked else "white",
                linestyle="",
                capsize=2,
            )
        axes.set_yticks(range(len(rows)), [plain(group.name) for group, *_ in rows])
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.set_xlabel("Dice minus scratch, average over targets (hollow: control)")

    save(path, (7, 1.4 + 0.3 * len(rows)), table.title, draw)
    said = "; ".join(
        f"{group.name} {mean:+.4f}" + ("" if np.isnan(low) else f" [{low:+.4f}, {high:+.4f}]")
        for group, mean, low, high in rows[::-1]
    )
    headroom = "".join(
        f"; headroom on {each.backbone} {each.headroom[0]:+.4f}" for each in headrooms if each.headroom is not None
    )
    return f"Dice minus scratch with 95 % intervals, the best first: {said}{headroom}"


def _compared(groups: Sequence[Group]) -> list[tuple[Group, float, float, float]]:
    """The rows that have a difference from scratch, with it and the ends of its interval."""
    compared = [
        (group, group.delta) for group in groups if group.delta is not None and not np.isnan(group.delta.mean[-1])
    ]
    return [(group, float(each.mean[-1]), float(each.low[-1]), float(each.high[-1])) for group, each in compared]


def dice_points(table: Table, groups: list[Group], path: Path) -> str:
    """Draw Dice per target with 95 % intervals. Returns a description."""
    names = table.names if len(table.targets) > 1 else table.targets
    palette, width = colours(len(groups)), 0.8 / len(groups)

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        for number, group in enumerate(groups):
            mean, low, high = (values[: len(names)] for values in (group.dice.mean, group.dice.low, group.dice.high))
            axes.errorbar(
                np.arange(len(names)) + (number - (len(groups) - 1) / 2) * width,
                mean,
                yerr=np.nan_to_num(np.stack([mean - low, high - mean])).clip(0),
                marker=MARKERS[number % len(MARKERS)],
                color=palette[number],
                markeredgecolor="black",
                markeredgewidth=0.5,
                linestyle="",
                linewidth=0.8,
                capsize=1.5,
                label=plain(group.name),
            )
        for edge in range(1, len(names)):
            axes.axvline(edge - 0.5, color="0.85", linewidth=0.6)
        axes.set_xticks(range(len(names)), [plain(name) for name in names], rotation=30 if len(names) > 4 else 0)
        axes.set_ylabel("Dice (the axis does not begin at 0)")
        legend(axes)

    size = (max(6.5, min(16, 0.18 * len(groups) * len(names) + 3)), 3.8)
    save(path, size, table.title, draw)
    return f"Dice per target with 95 % intervals: {_best_in_words(groups)}"


def rank_stability(table: Table, groups: list[Group], path: Path) -> str:
    """Draw how often each method holds each rank over the bootstrap resamples. Returns a description."""
    stability = table.stability
    assert stability is not None, "the caller has looked"
    held = {id(group): shares for group, shares in zip(table.groups, stability.shares, strict=True)}
    groups = [group for group in groups if group.is_ranked and not np.isnan(held[id(group)]).all()]
    shares = np.stack([held[id(group)] for group in groups])[:, : len(groups)]

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        seaborn.heatmap(
            shares,
            ax=axes,
            cmap="Blues",
            vmin=0,
            vmax=1,
            annot=np.vectorize(lambda share: f"{share:.0%}" if share >= 0.005 else "")(shares)
            if len(groups) <= 16
            else False,
            fmt="",
            linewidths=0.5,
            xticklabels=[str(rank + 1) for rank in range(len(groups))],
            yticklabels=[plain(group.name) for group in groups],
            cbar_kws={"label": "share of resamples"},
        )
        axes.set_xlabel(f"rank by mean Dice (Kendall's tau {stability.tau:.2f})")
        axes.tick_params(axis="y", rotation=0)

    save(path, (4.5 + 0.42 * len(groups), 1.8 + 0.34 * len(groups)), table.title, draw)
    best = list(zip(groups, shares, strict=True))[:6]
    firmest = ", ".join(f"{group.name} {share.max():.0%} at rank {share.argmax() + 1}" for group, share in best)
    return f"How often each method holds each rank among the resamples: {firmest}"


def pareto(table: Table, groups: list[Group], path: Path) -> str:
    """Draw Dice over hours of pre-training, with the Pareto front of the rows that are ranked. Returns a description."""
    seconds = [group.pretrain_seconds or 0.0 for group in groups]
    unit, length = ("hours", 3600) if max(seconds) > 3 * 3600 else ("minutes", 60)
    cost = [each / length for each in seconds]
    dice = [float(group.dice.mean[-1]) for group in groups]
    front: list[int] = []
    for index in sorted(range(len(groups)), key=lambda index: (cost[index], -dice[index])):
        if not groups[index].is_ranked or np.isnan(dice[index]):
            continue
        if not front or dice[index] > dice[front[-1]]:
            front.append(index)

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        palette = colours(len(groups))
        axes.plot(
            [cost[index] for index in front],
            [dice[index] for index in front],
            color="0.5",
            linestyle="--",
            zorder=1,
            label="Pareto front",
        )
        for number, group in enumerate(groups):
            low, high = group.dice.low[-1], group.dice.high[-1]
            axes.errorbar(
                cost[number],
                dice[number],
                yerr=np.nan_to_num([[dice[number] - low], [high - dice[number]]]).clip(0),
                marker=MARKERS[number % len(MARKERS)],
                color=palette[number],
                markeredgecolor="black",
                linestyle="",
                capsize=2,
                label=plain(group.name),
            )
        least = min(filter(None, cost), default=0)
        if max(cost) > 20 * least > 0:
            axes.set_xscale("symlog", linthresh=least)  # a row without pre-training is at 0
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(f"{unit} of pre-training (with the method's own preparation)")
        axes.set_ylabel("Dice, average over targets")
        legend(axes)

    save(path, (6.5, 4), table.title, draw)
    return f"Dice over {unit} of pre-training; on the Pareto front: {', '.join(groups[index].name for index in front)}"


def step_times(table: Table, groups: list[Group], path: Path) -> str:
    """Draw the median pre-training step, split into its phases (the paper's Figure 5). Returns a description."""
    timed = [group for group in groups if group.step_ms]
    splits = []
    for group in timed:
        steps = [
            run.record["timing"]["pretrain_step"] for run in group.members if run.record["timing"]["pretrain_step"]
        ]
        splits.append([float(np.median([step[phase]["p50_ms"] for step in steps])) for phase in PHASES])

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        stacked(axes, np.nan_to_num(splits), [plain(group.name) for group in timed])
        axes.set_xlabel("median pre-training step, ms (without the wait for data)")
        legend(axes)

    save(path, (6.5, 1.6 + 0.35 * len(timed)), table.title, draw)
    return "Median pre-training step: " + ", ".join(f"{group.name} {group.step_ms:.0f} ms" for group in timed)


def stacked(axes: Axes, splits: Any, names: Sequence[str]) -> Any:
    """Draw one bar per name, stacked from the phases of a step in ms, (names, phases). Returns the ends of the bars."""
    left = np.zeros(len(names))
    for number, phase in enumerate(PHASES):
        values = np.asarray(splits)[:, number]
        axes.barh(
            range(len(names)),
            values,
            left=left,
            color=colours(3)[number],
            hatch=HATCHES[number],
            edgecolor="black",
            linewidth=0.5,
            label="update" if phase == "optimizer" else phase,
        )
        left += values
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    return left


def settings_and_time(table: Table, groups: list[Group], path: Path) -> str:
    """Draw Dice and the time of a step for several settings of a method (the paper's Figure 6). Returns a description."""
    rows = [group for members in _settings(groups).values() for group in members]

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        axes.bar(
            range(len(rows)), [group.step_ms or 0 for group in rows], color="0.8", edgecolor="black", linewidth=0.5
        )
        axes.set_ylabel("median step, ms (bars)")
        axes.set_xticks(range(len(rows)), [plain(group.name) for group in rows], rotation=30, ha="right")
        other = axes.twinx()
        mean = np.array([group.dice.mean[-1] for group in rows])
        ends = np.stack([mean - [group.dice.low[-1] for group in rows], [group.dice.high[-1] for group in rows] - mean])
        ends = np.nan_to_num(ends).clip(0)
        other.errorbar(range(len(rows)), mean, yerr=ends, marker="o", color=colours(1)[0], linestyle="", capsize=2)
        other.set_ylabel("Dice (points)")

    save(path, (3 + 0.8 * len(rows), 4.2), table.title, draw)
    return "Dice and time of a step by setting: " + ", ".join(
        f"{group.name} {group.dice.mean[-1]:.4f} at {group.step_ms or float('nan'):.0f} ms" for group in rows
    )


def training(table: Table, groups: list[Group], path: Path) -> str:
    """Draw the loss of fine-tuning over its steps, averaged over the seeds and smoothed. Returns a description."""
    curves = {group.name: curve for group in groups if (curve := _losses(group)) is not None}

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        palette = colours(len(curves))
        for number, (name, (steps, losses)) in enumerate(curves.items()):
            style = ("-", "--", ":", "-.")[number % 4]
            axes.plot(steps, losses, color=palette[number], linestyle=style, linewidth=1.2, label=plain(name))
        axes.set_xlabel("step of fine-tuning")
        axes.set_ylabel("loss, mean over seeds")
        legend(axes)

    save(path, (6.5, 3.8), table.title, draw)
    ends = ", ".join(f"{name} {losses[-1]:.3f}" for name, (_, losses) in list(curves.items())[:8])
    return f"Loss of fine-tuning; at its end: {ends}"


def efficiency(curves: Curves, path: Path) -> str:
    """Draw Dice over the share of the labels (the paper's Figure 4) or over a number of steps. Returns a description."""
    best = sorted(curves.curves, key=lambda curve: -curve.area[0])[:MOST]

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        palette = colours(len(best))
        for number, curve in enumerate(best):
            points = [curves.axis.scale * point for point in curve.points]
            mean, low, high = (
                [getattr(group.dice, end)[-1] for group in curve.groups] for end in ("mean", "low", "high")
            )
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(
                points, mean, marker=marker, color=palette[number], label=f"{plain(curve.name)}: {curve.area[0]:.3f}"
            )
            axes.fill_between(points, low, high, color=palette[number], alpha=0.15, linewidth=0)
        axes.set_xlabel(curves.axis.label)
        axes.set_ylabel("Dice, average over targets")
        legend(axes, title="area under the curve")

    save(path, (6, 4), curves.title, draw)
    return f"Dice over {curves.axis.label.removesuffix(', %')}; area: " + ", ".join(
        f"{curve.name} {curve.area_text(3)}" for curve in best
    )


def convergence(table: Table, groups: list[Group], path: Path) -> str:
    """Draw Dice on the validation cases over the steps of fine-tuning. Returns a description."""
    drawn = [(group, line) for group in groups if (line := group.learning) is not None]

    def draw(axes: Axes) -> None:
        """Draw into the axes."""
        palette = colours(len(drawn))
        for number, (group, line) in enumerate(drawn):
            marker = MARKERS[number % len(MARKERS)]
            axes.plot(line.steps, line.dice, marker=marker, color=palette[number], label=plain(group.name))
        axes.set_xscale("log", base=2)
        axes.set_xticks(drawn[0][1].steps, [str(step) for step in drawn[0][1].steps])
        axes.set_xlabel("fine-tuning steps")
        axes.set_ylabel("Dice on validation cases")
        legend(axes)

    save(path, (7, 4), table.title, draw)
    ends = ", ".join(f"{group.name} {line.dice[-1]:.3f}" for group, line in drawn[:8])
    return f"Dice on the validation cases while fine-tuning runs, means over seeds; at its end: {ends}"


def _best(table: Table) -> list[Group]:
    """The rows with the best ranks, at most `MOST`."""
    ranked = sorted(zip(table.ranks(), table.groups, strict=True), key=lambda pair: (pair[0] or np.inf, pair[1].name))
    return [group for _, group in ranked[:MOST]]


def _best_in_words(groups: Sequence[Group]) -> str:
    """Name and average Dice of the first eight rows, and how many more there are."""
    more = f" and {len(groups) - 8} more rows" if len(groups) > 8 else ""
    return ", ".join(f"{group.name} {group.dice.mean[-1]:.4f}" for group in groups[:8]) + more


def _settings(groups: Sequence[Group]) -> dict[tuple[str, str], list[Group]]:
    """The rows of each method and backbone that has several settings."""
    members: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups:
        members[group.runs[0].record["method"], group.backbone].append(group)
    return {key: sorted(rows, key=lambda group: group.name) for key, rows in members.items() if len(rows) > 1}


def _losses(group: Group) -> tuple[Any, Any] | None:
    """Steps and smoothed losses of fine-tuning, averaged over the seeds that have a history; None where none has one."""
    histories = [
        losses for run in group.members if (losses := read_losses(run.folder / "history.jsonl").get("finetune"))
    ]
    if not histories:
        return None
    length = min(map(len, histories))
    mean = np.mean([losses[:length] for losses in histories], axis=0)
    window = max(1, length // 25)
    smoothed = np.convolve(mean, np.ones(window) / window, mode="valid")
    return np.arange(window, length + 1), smoothed


def read_losses(path: Path) -> dict[str, list[float]]:
    """Losses per stage of a run, in the order of the steps. Lines that hold no loss are left out; empty without a history."""
    losses_of: dict[str, list[float]] = defaultdict(list)
    if not path.is_file():
        return losses_of
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                stage, loss = str(entry["stage"]), float(entry["loss"])
            except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
                continue
            if abs(loss) < 1e30:
                losses_of[stage].append(loss)
    return losses_of


def save(path: Path, size: tuple[float, float], title: str, draw: Draw) -> None:
    """Draw a figure of `size` inches with `draw`, and write it as PNG and SVG. `path`: without an ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with seaborn.axes_style("ticks", rc=STYLE), seaborn.plotting_context("paper"):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        draw(axes)
        figure.suptitle(_wrapped(title, int(size[0] * 13)), fontsize="small")
        with rc_context(STYLE):  # type: ignore[arg-type]
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
            figure.savefig(path.with_suffix(".png"), dpi=150)


def legend(axes: Axes, title: str | None = None) -> None:
    """Add a legend beside the axes, where it covers nothing."""
    axes.legend(
        frameon=False,
        fontsize="x-small",
        title=title,
        title_fontsize="x-small",
        loc="upper left",
        bbox_to_anchor=(1.01, 1),
    )


def colours(number: int) -> list[Any]:
    """`number` colours of Seaborn's colour-blind palette. Beyond ten they repeat, and hatches and markers tell rows apart."""
    return list(seaborn.color_palette("colorblind", min(number, 10))) * (1 + number // 10)


def plain(text: str, most: int = 44) -> str:
    """Text for Matplotlib, cut to `most` characters. A dollar sign is escaped: it would start a formula."""
    short = printable(text)
    return (short if len(short) <= most else f"{short[: most - 1]}…").replace("$", r"\$")


def _wrapped(title: str, width: int) -> str:
    """The title, broken into lines of at most `width` characters."""
    words, lines = printable(title)[:300].replace("$", r"\$").split(" "), [""]
    for word in words:
        if len(lines[-1]) + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)
