"""Runs -> tables of methods that may be compared, with everything that is computed about them."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from leaderboards import statistics
from leaderboards.records import SHARED, Run
from leaderboards.statistics import Estimate, Values

CONTROL = "scratch"


class NotComparableError(Exception):
    """Results that share no table; the message says which fields differ."""


@dataclass(frozen=True)
class Group:
    """One row: the seeds of a method on a backbone.

    Attributes:
        runs: one per seed, by seed.
        dice, hd95, surface_dice: per target, and last the average. `draws` is kept for the average Dice only, (RESAMPLES, 1).
        delta: Dice minus the control's over the seeds that both have; None without a control.
        p: Holm-corrected over the methods of the table, (targets + 1); NaN where there is none.
        note: what a reader must know, for instance why there is no p-value.
    """

    method: str
    backbone: str
    runs: list[Run]
    dice: Estimate
    hd95: Estimate
    surface_dice: Estimate
    delta: Estimate | None
    p: Values
    note: str

    @property
    def name(self) -> str:
        """For figures and sentences."""
        return f"{self.method} ({self.backbone})"

    @property
    def is_control(self) -> bool:
        """Whether this is training from scratch."""
        return self.runs[0].record["method"] == CONTROL

    @property
    def step_ms(self) -> float | None:
        """Median pre-training step, over seeds."""
        timing = [run.record["timing"] for run in self.runs]
        steps = [t["pretrain_step"]["step"]["p50_ms"] for t in timing if t.get("pretrain_step")]
        return float(np.median(steps)) if steps else None

    @property
    def pretrain_seconds(self) -> float | None:
        """Mean time of pre-training with the method's own preparation, over seeds."""
        found = [run.record["timing"]["seconds"] for run in self.runs]
        seconds = [each["pretrain"] + each.get("method_prepare", 0.0) for each in found if "pretrain" in each]
        return float(np.mean(seconds)) if seconds else None


@dataclass(frozen=True)
class Table:
    """Rows that may be compared; `key` is what they share, as `Run.table` gives it."""

    key: tuple[Any, ...]
    targets: tuple[str, ...]
    groups: list[Group]

    @property
    def names(self) -> tuple[str, ...]:
        """Targets, then "average"."""
        return (*self.targets, "average")

    def shared(self, field: str) -> Any:
        """One of `SHARED`."""
        return self.key[SHARED.index(field)]

    def ranks(self, target: int = -1) -> list[int | None]:
        """Rank of each group by its mean Dice; ties share one, None where there is no mean."""
        means = [group.dice.mean[target] for group in self.groups]
        scored = sorted((mean for mean in means if not np.isnan(mean)), reverse=True)
        return [None if np.isnan(mean) else scored.index(mean) + 1 for mean in means]

    def stability(self) -> statistics.Ranks:
        """How firm the ranks of the average are."""
        return statistics.ranks([group.dice for group in self.groups])

    @property
    def title(self) -> str:
        """One line that says what the rows share, with its warnings first."""
        task, data, preset, mode, protocol, fraction = self.key[:6]
        marks = "PHANTOM DATA, says nothing about any method - " if data.startswith("phantom") else ""
        if any(run.num_test_seen for group in self.groups for run in group.runs):
            marks += "TEST CASES WERE TRAINED OR PRE-TRAINED ON (column seen) - "
        return f"{marks}{task}, {data}, preset {preset}, {mode}, {protocol}, {fraction:.0%} of the labels"


def gather(runs: Sequence[Run]) -> list[Table]:
    """Tables of the runs that share everything but method and backbone. The control stands in those of both modes."""
    tables: dict[tuple[Any, ...], dict[tuple[str, str], list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        tables[(*run.table, run.targets)][run.method, run.backbone].append(run)
    by_rest: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for key in tables:
        by_rest[without_mode(key)].append(key)
    for run in [run for run in runs if run.record["method"] == CONTROL]:
        own = (*run.table, run.targets)
        for key in by_rest[without_mode(own)]:
            if key != own:
                tables[key][run.method, run.backbone].append(run)
    return [_table(key, tables[key]) for key in sorted(tables)]


def without_mode(table: tuple[Any, ...]) -> tuple[Any, ...]:
    """A table's key but for what was pre-trained on: the controls of its rows are found under it."""
    place = SHARED.index("mode")
    return (*table[:place], *table[place + 1 :])


def differing(first: Run, second: Run) -> list[str]:
    """What keeps two runs out of one table, in words; empty where they share one."""
    found = []
    for name, mine, theirs in zip(SHARED, first.table, second.table, strict=True):
        if name == "mode" and CONTROL in (first.record["method"], second.record["method"]):
            continue
        if mine != theirs:
            shown = (f"{len(mine)} cases", f"{len(theirs)} others") if name == "test_cases" else (mine, theirs)
            found.append(f"{name} ({shown[0]} and {shown[1]})")
    return found if found or first.targets == second.targets else ["targets"]


def stack(runs: Sequence[Run], field: str) -> Values:
    """One of a run's arrays for several seeds, (seeds, cases, targets)."""
    return np.stack([getattr(run, field) for run in runs])


def paired(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of the seeds that both have, in one order: a seed that only one has says nothing about the difference."""
    mine, theirs = ({run.seed: run for run in side} for side in (first, second))
    shared = sorted(mine.keys() & theirs.keys())
    return [mine[seed] for seed in shared], [theirs[seed] for seed in shared]


def _table(key: tuple[Any, ...], members: dict[tuple[str, str], list[Run]]) -> Table:
    chosen = {name: _one_per_seed(runs) for name, runs in sorted(members.items())}
    runs = {name: each for name, (each, _) in chosen.items()}
    dice = [stack(each, "dice") for each in runs.values()]
    estimates = [statistics.estimates(dice)]
    estimates += [
        statistics.estimates([stack(each, name) for each in runs.values()]) for name in ("hd95", "surface_dice")
    ]
    deltas, p, notes = _against_control(runs, statistics.luck(dice), len(key[-1]))
    groups = []
    for number, (method, backbone) in enumerate(runs):
        mine, hd95, surface = (each[number] for each in estimates)
        name = method, backbone
        said = "; ".join(note for note in (chosen[name][1], notes[name]) if note)
        kept = replace(mine, draws=mine.draws[:, -1:].copy())
        group = Group(
            method, backbone, runs[name], kept, _means(hd95), _means(surface), deltas.get(name), p[number], said
        )
        groups.append(group)
    return Table(key[:-1], key[-1], groups)


def _against_control(
    runs: dict[tuple[str, str], list[Run]], pooled: statistics.Luck, num_targets: int
) -> tuple[dict[tuple[str, str], Estimate], Values, dict[tuple[str, str], str]]:
    """Differences to the control of the same backbone, Holm-corrected p-values (rows, targets + 1), and notes."""
    notes, pairs = dict.fromkeys(runs, ""), {}
    for name, mine in runs.items():
        control = runs.get((CONTROL, name[1]))
        if mine[0].record["method"] == CONTROL:
            notes[name] = "the control"
        elif control is None:
            notes[name] = "no scratch run to compare with: same backbone and settings are needed"
        else:
            first, second = paired(mine, control)
            if first:
                pairs[name] = stack(first, "dice"), stack(second, "dice")
                notes[name] = statistics.why_no_test(len(first), len(first[0].cases))
            else:
                notes[name] = "no seed in common with scratch"
    both = list(pairs.values())
    deltas = dict(zip(pairs, map(_means, statistics.differences(both)), strict=True))
    tested = dict(zip(pairs, statistics.p_values(both, pooled), strict=True))
    p = np.array([tested.get(name, np.full(num_targets + 1, np.nan)) for name in runs])
    corrected = np.array([statistics.holm(column.tolist()) for column in p.T]).T
    return deltas, corrected, notes


def _means(estimate: Estimate) -> Estimate:
    # Copied: a view would keep the draws of the whole batch.
    return replace(estimate, draws=estimate.draws[:0].copy())


def _one_per_seed(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """Of several runs of one seed (made by different versions), the one that finished last."""
    latest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (str(run.record.get("finished", "")), run.run_id)):
        latest[run.seed] = run
    note = f"{len(runs) - len(latest)} older runs of the same seeds left out" if len(latest) < len(runs) else ""
    return [latest[seed] for seed in sorted(latest)], note
