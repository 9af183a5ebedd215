"""Tables of methods that may be compared, made from runs, with all statistics about them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from leaderboards import statistics
from leaderboards.calibration import Calibration, Interval, calibrate
from leaderboards.convergence import CONTROL, Curve, curve, flat_in_labels, unconverged
from leaderboards.folds import fold_note, pool
from leaderboards.ranks import Ranks, least_freedom, rank_stability
from leaderboards.records import SHARED, SUMMARY, Run
from leaderboards.statistics import Estimate, Values

SEEDS_MARK = "vs scratch: over seed "
LEFT_OUT = "older runs of the same seeds left out"
CALIBRATES = {
    "positive": "positive control: pre-trained with labels, neither ranked nor tested",
    "negative": "negative control: nothing pre-trained, neither ranked nor tested",
}
"""Controls that calibrate a table, and the note of their rows."""


class NotComparableError(Exception):
    """Results do not belong to one table; the message says which fields differ."""


@dataclass(frozen=True)
class Group:
    """One row of a table: all seeds of a method on a backbone.

    Attributes:
        runs: one run per seed, in the order of the seeds.
        dice, hd95, surface_dice: means per target, and last their average. `draws` is kept for the average Dice only, with
            shape (RESAMPLES, 1).
        delta: Dice minus the Dice of the control, over the seeds that both have; None without a control.
        p: p-values (targets + 1), Holm-corrected over the methods of the table; NaN where there is none.
        note: what a reader must know, for instance why there is no p-value.
        unconverged: which seeds had not converged, see `leaderboards.convergence`; empty if all had.
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
    unconverged: str

    @property
    def name(self) -> str:
        """The row's name in figures and sentences."""
        return f"{self.method} ({self.backbone})"

    @property
    def members(self) -> list[Run]:
        """The runs in run folders: those of all seeds and, where folds are pooled, of all folds."""
        return [member for run in self.runs for member in run.members]

    @property
    def is_control(self) -> bool:
        """Whether the method is training from scratch."""
        return self.control == "matched"

    @property
    def control(self) -> str:
        """As `Run.control`. A row is a control if one of its runs is."""
        return next((run.control for run in self.runs if run.control), "")

    @property
    def is_calibration(self) -> bool:
        """Whether the row calibrates the table; it is neither ranked nor tested."""
        return self.control in CALIBRATES

    @property
    def imported(self) -> str:
        """What a reader must know about results of other software; empty for measured ones."""
        return imported_note(self.runs)

    @property
    def is_ranked(self) -> bool:
        """Whether the row is ranked: neither calibration nor imported."""
        return not self.is_calibration and not self.imported

    @property
    def num_test_seen(self) -> int | None:
        """The largest `Run.num_test_seen` of the seeds; None where it is not above 0 and not known for one of them."""
        return most_seen(self.runs)

    @cached_property
    def learning(self) -> Curve | None:
        """Dice on validation cases while fine-tuning ran; None where it was not recorded."""
        return curve(self.runs)

    @property
    def seconds(self) -> float:
        """Seconds of all stages of all runs; pre-training that runs share counts for each of them."""
        return float(sum(sum(run.record["timing"]["seconds"].values()) for run in self.members))

    @property
    def gpu_hours(self) -> float | None:
        """Mean GPU hours of a run; None where a run used no GPU."""
        return _mean([run.gpu_hours for run in self.members])

    @property
    def kwh(self) -> float | None:
        """Mean energy of a run in kWh; None where it is not known of all runs."""
        return _mean([run.kwh for run in self.members])

    @property
    def peak_memory(self) -> float | None:
        """Largest peak memory of the runs in GiB, as `Run.peak_memory`; None where it is not known of all."""
        peaks = [run.peak_memory for run in self.members if run.peak_memory is not None]
        return max(peaks) if len(peaks) == len(self.members) else None

    @property
    def step_ms(self) -> float | None:
        """Median time of a pre-training step in ms, over the seeds; None where nothing was pre-trained."""
        timing = [run.record["timing"] for run in self.members]
        steps = [times["pretrain_step"]["step"]["p50_ms"] for times in timing if times.get("pretrain_step")]
        return float(np.median(steps)) if steps else None

    @property
    def pretrain_seconds(self) -> float | None:
        """Mean seconds of pre-training and `Method.prepare`, over the seeds; None where nothing was pre-trained."""
        timing = [run.record["timing"]["seconds"] for run in self.members]
        seconds = [times["pretrain"] + times.get("method_prepare", 0.0) for times in timing if "pretrain" in times]
        return float(np.mean(seconds)) if seconds else None


@dataclass(frozen=True)
class Table:
    """Rows that may be compared. `key`: the fields that all of them share, as in `Run.table`."""

    key: tuple[Any, ...]
    targets: tuple[str, ...]
    groups: list[Group]
    calibrations: list[Calibration]

    def to_scratch(self, group: Group) -> tuple[int, float] | None:
        """Fine-tuning steps and seconds (pre-training included) in which a row reaches the final validation Dice of scratch.

        Over the seeds that both have. None where a curve is missing or of other cases, or it is not reached.
        """
        control = next((each for each in self.groups if each.is_control and each.backbone == group.backbone), None)
        if control is None:
            return None
        first, second = paired(group.runs, control.runs)
        own, aim = curve(first), curve(second)
        return own.reaches(aim.dice[-1]) if own is not None and aim is not None and own.cases == aim.cases else None

    @property
    def sentences(self) -> list[str]:
        """What a reader must know about the whole table, one sentence each."""
        sentences = []
        if number := sum(bool(group.unconverged) for group in self.groups):
            sentences.append(
                f"NOT CONVERGED: the fine-tuning of {number} of {len(self.groups)} rows ended too early for a comparison: give "
                "more steps or a higher learning rate"
            )
        if unknown := [f"{group.method} on {group.backbone}" for group in self.groups if group.num_test_seen is None]:
            sentences.append(
                f"UNKNOWN: nobody knows whether weights were trained on test cases (column seen): {', '.join(unknown)}"
            )
        return sentences + [sentence for each in self.calibrations for sentence in each.sentences()]

    def share(self, group: Group) -> Interval | None:
        """The share of the headroom that a row gains; None where it is not known."""
        shares = [each.shares for each in self.calibrations if each.backbone == group.backbone]
        return shares[0].get(group.method) if shares else None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the targets, then "average"."""
        return (*self.targets, "average")

    def shared(self, field: str) -> Any:
        """The value of one of the fields in `SHARED`."""
        return self.key[SHARED.index(field)]

    def ranks(self, target: int = -1) -> list[int | None]:
        """Rank of each group by its mean Dice; groups with equal means share a rank.

        A group without a mean, one that calibrates the table, and imported results have None.
        """
        means = [group.dice.mean[target] if group.is_ranked else np.nan for group in self.groups]
        scored = sorted((mean for mean in means if not np.isnan(mean)), reverse=True)
        return [None if np.isnan(mean) else scored.index(mean) + 1 for mean in means]

    @cached_property
    def stability(self) -> Ranks | None:
        """Rank stability of the average Dice over the resamples; None where fewer than two rows can be compared.

        A row that has fewer than two seeds in common with the best one has no share: the luck of its seed is not known.
        """
        ranked = [group for group in self.groups if group.is_ranked and self.is_tested(group.runs)]
        best = max(ranked, key=lambda group: np.nan_to_num(group.dice.mean[-1]), default=None)
        if best is None:
            return None
        pairs = {group.name: paired(best.runs, group.runs) for group in ranked if group is not best}
        pairs = {name: pair for name, pair in pairs.items() if self.is_tested(pair[0])}
        if not pairs:
            return None
        without = np.full_like(best.dice.mean, np.nan)
        held = {best.name, *pairs}
        estimates = [
            group.dice if group.is_ranked and group.name in held else replace(group.dice, mean=without)
            for group in self.groups
        ]
        stacked = [(stack(first, "dice"), stack(second, "dice")) for first, second in pairs.values()]
        return rank_stability(estimates, least_freedom(stacked))

    def is_tested(self, runs: Sequence[Run]) -> bool:
        """Whether runs are enough for a test of significance."""
        return bool(runs) and not statistics.why_no_test(len(runs), len(runs[0].cases), self.folds)

    @cached_property
    def luck(self) -> statistics.Luck:
        """The variance of a mean that the seed alone causes, pooled over the measured rows."""
        return statistics.luck([stack(group.runs, "dice") for group in self.groups if not group.imported], self.folds)

    @property
    def folds(self) -> statistics.Folds:
        """The fold of each case, where folds are pooled."""
        return next((group.runs[0].folds for group in self.groups if not group.imported), ())

    def with_short_names(self) -> "Table":
        """The table without the settings that all rows with settings share: they take room and tell nothing apart."""
        methods = short_names([group.method for group in self.groups])
        backbones = short_names([group.backbone for group in self.groups])
        # Two methods, or two networks, must not get one name, not even in different rows.
        if any(len(set(names.values())) < len(names) for names in (methods, backbones)):
            return self
        groups = [replace(each, method=methods[each.method], backbone=backbones[each.backbone]) for each in self.groups]
        calibrations = [
            replace(
                each,
                backbone=backbones[each.backbone],
                positive=methods.get(each.positive, ""),
                luck={methods[method]: interval for method, interval in each.luck.items()},
                shares={methods[method]: interval for method, interval in each.shares.items()},
            )
            for each in self.calibrations
        ]
        return replace(self, groups=groups, calibrations=calibrations)

    @property
    def shared_settings(self) -> str:
        """The settings that all rows with settings share, which `with_short_names` leaves out."""
        names = [name for group in self.groups for name in (group.method, group.backbone)]
        return ", ".join(sorted({each for kind in (names[::2], names[1::2]) for each in _shared(_settings(kind))}))

    @property
    def title(self) -> str:
        """One line that names what the rows share, with warnings first."""
        task, data, preset, mode, protocol, fraction = self.key[:6]
        marks = "PHANTOM DATA, says nothing about any method - " if data.startswith("phantom") else ""
        if any(group.num_test_seen for group in self.groups):
            marks += "TEST CASES WERE TRAINED OR PRE-TRAINED ON (column seen) - "
        first = next((group for group in self.groups if not group.imported), self.groups[0])
        number, drawn = first.runs[0].record["data"].get("n_train"), drawn_text(self.shared("label_subset"))
        cases = f" ({number} cases{drawn})" if fraction < 1 and isinstance(number, int) else ""
        return f"{marks}{task}, {data}, preset {preset}, {mode}, {protocol}, {fraction:.0%} of the labels{cases}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Name of a method or backbone with its changed settings -> the same without those that all names with settings share."""
    settings = _settings(names)
    shared = _shared(settings)
    own = {name: [each for each in given if each not in shared] for name, given in settings.items()}
    plain = {name: name.partition("{")[0] if settings[name] else name for name in names}
    return {name: f"{plain[name]}{{{', '.join(own[name])}}}" if own[name] else plain[name] for name in names}


def _settings(names: Sequence[str]) -> dict[str, list[str]]:
    """Name of a method or backbone -> its changed settings, as KEY=VALUE. A name that begins with a brace has none."""
    inner = {name: name.removesuffix("}").partition("{") for name in names}
    return {name: rest.split(", ") if plain and rest else [] for name, (plain, _, rest) in inner.items()}


def _shared(settings: dict[str, list[str]]) -> set[str]:
    """The settings that all names with settings have."""
    given = [set(each) for each in settings.values() if each]
    return set.intersection(*given) if given else set()


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean; None where a value is missing."""
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None


def most_seen(runs: Iterable[Run]) -> int | None:
    """The largest number of test cases that a run has seen; None where it is 0 as far as known, but not known for all."""
    numbers = [run.num_test_seen for run in runs]
    return max((number or 0 for number in numbers), default=0) or (None if None in numbers else 0)


def drawn_text(subset: str) -> str:
    """How labelled cases were drawn, as the end of a title; empty for the first ones of a fixed order."""
    return "" if subset in ("first", "") else f", drawn {subset}"


def gather(runs: Sequence[Run]) -> list[Table]:
    """Tables of runs that share everything but method and backbone. Controls are in the tables of every mode.

    Folds of a cross-validation are pooled where all of them are there. Imported results are in every table of the same task,
    data, test cases and metrics; in one of their own only where there is none.
    """
    tables: dict[tuple[Any, ...], dict[tuple[str, str], list[Run]]] = defaultdict(lambda: defaultdict(list))
    runs = pool(runs)
    for run in [run for run in runs if not run.imported]:
        tables[(*run.table, run.targets)][run.method, run.backbone].append(run)
    by_rest: dict[tuple[Any, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for key in tables:
        by_rest[without_mode(key)].append(key)
    for run in [run for run in runs if run.control]:
        own_key = (*run.table, run.targets)
        for key in by_rest[without_mode(own_key)]:
            if key != own_key:
                tables[key][run.method, run.backbone].append(run)
    measured = {key: next(iter(rows.values()))[0] for key, rows in tables.items()}
    for run in [run for run in runs if run.imported]:
        same = [key for key, first in measured.items() if not _other_cases(first, run)]
        for key in same or [(*run.table, run.targets)]:
            tables[key][run.method, run.backbone].append(run)
    flat = flat_in_labels(tables)
    return [_table(key, tables[key], flat) for key in sorted(tables)]


def imported_note(runs: Sequence[Run]) -> str:
    """What a reader must know about results of other software; empty if the runs are measured."""
    sources = [run.imported for run in runs if run.imported]
    kinds = dict.fromkeys("label maps, scored here" if each["kind"] != SUMMARY else SUMMARY for each in sources)
    notes = dict.fromkeys(each.get("note", "") for each in sources if each.get("note"))
    return "; ".join([f"imported ({', '.join(kinds)}): neither ranked nor tested", *notes]) if sources else ""


def _other_cases(first: Run, second: Run) -> list[str]:
    """The fields of two runs that differ among those that imported results must share: task, data, test cases, metrics, folds."""
    fields = ("task", "data", "metric_policy", "metric_definitions", "test_cases")
    pairs = [(field, *(run.table[SHARED.index(field)] for run in (first, second))) for field in fields]
    pairs += [("targets", first.targets, second.targets), ("folds", first.folds, second.folds)]
    return [field for field, own, other in pairs if own != other]


def without_mode(table: tuple[Any, ...]) -> tuple[Any, ...]:
    """The key of a table without the mode. The controls of its rows share this key, since they are not pre-trained."""
    index = SHARED.index("mode")
    return (*table[:index], *table[index + 1 :])


def differing(first: Run, second: Run) -> list[str]:
    """The fields that keep two runs out of one table, in words; empty where they share a table."""
    if first.imported or second.imported:
        return _other_cases(first, second)
    differences = []
    for name, first_value, second_value in zip(SHARED, first.table, second.table, strict=True):
        if name == "mode" and (first.control or second.control):
            continue
        if first_value != second_value:
            texts: tuple[Any, Any] = (first_value, second_value)
            if name == "test_cases":
                texts = f"{len(first_value)} cases", f"{len(second_value)} others"
            elif name == "label_fraction":
                texts = f"{first_value:.3g}", f"{second_value:.3g}"
            differences.append(f"{name} ({texts[0]} and {texts[1]})")
    return differences if differences or first.targets == second.targets else ["targets"]


def stack(runs: Sequence[Run], field: str) -> Values:
    """One of the arrays of runs (`field`), stacked over the seeds: (seeds, cases, targets)."""
    return np.stack([getattr(run, field) for run in runs])


def paired(first: Sequence[Run], second: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """The runs of the seeds that both sides have, in the same order.

    A seed that only one side has says nothing about the difference.
    """
    first_by_seed, second_by_seed = ({run.seed: run for run in side} for side in (first, second))
    shared = sorted(first_by_seed.keys() & second_by_seed.keys())
    return [first_by_seed[seed] for seed in shared], [second_by_seed[seed] for seed in shared]


def _table(key: tuple[Any, ...], members: dict[tuple[str, str], list[Run]], flat: dict[Any, str]) -> Table:
    """A table with its rows, and all statistics about them.

    Args:
        members: the runs of each method and backbone.
        flat: the sentences of `flat_in_labels`.
    """
    chosen = {name: _one_per_seed(runs) for name, runs in sorted(members.items())}
    runs = {name: seeds for name, (seeds, _) in chosen.items()}
    dice, folds = [stack(seeds, "dice") for seeds in runs.values()], next(iter(runs.values()))[0].folds
    estimates = [statistics.estimates(dice, folds)]
    estimates += [
        statistics.estimates([stack(seeds, field) for seeds in runs.values()], folds)
        for field in ("hd95", "surface_dice")
    ]
    tested = [values for values, seeds in zip(dice, runs.values(), strict=True) if not seeds[0].imported]
    pooled = statistics.luck(tested or dice, folds)
    deltas, p, notes = _against_control(runs, pooled, len(key[-1]))
    groups = []
    for index, (method, backbone) in enumerate(runs):
        dice_of_row, hd95, surface = (column[index] for column in estimates)
        name = method, backbone
        own = [member for run in runs[name] for member in run.members]
        early, pooling = unconverged(own, flat.get((key, backbone), "")), fold_note(runs[name])
        text = "; ".join(
            note for note in (early, chosen[name][1], notes[name], _tuned(own), _collapsed(own), pooling) if note
        )
        slim = replace(dice_of_row, draws=dice_of_row.draws[:, -1:].copy())
        group = Group(
            method, backbone, runs[name], slim, _means(hd95), _means(surface), deltas.get(name), p[index], text, early
        )
        groups.append(group)
    return Table(key[:-1], key[-1], groups, calibrate(groups, pooled))


def _against_control(
    runs: dict[tuple[str, str], list[Run]], pooled: statistics.Luck, num_targets: int
) -> tuple[dict[tuple[str, str], Estimate], Values, dict[tuple[str, str], str]]:
    """Compare every row with the control of the same backbone.

    Returns:
        the differences in Dice; Holm-corrected p-values, (rows, targets + 1); notes for the reader.
    """
    notes, pairs = dict.fromkeys(runs, ""), {}
    for name, own_runs in runs.items():
        control = runs.get((CONTROL, name[1]))
        if own_runs[0].imported:
            notes[name] = imported_note(own_runs)
        elif own_runs[0].control == "matched":
            notes[name] = "the control"
        elif control is None:
            notes[name] = "no scratch run to compare with: same backbone and settings are needed"
        else:
            first, second = paired(own_runs, control)
            if first:
                pairs[name] = stack(first, "dice"), stack(second, "dice")
                notes[name] = statistics.why_no_test(len(first), len(first[0].cases), first[0].folds)
                if len(first) < max(len(own_runs), len(control)):
                    seeds = ", ".join(str(run.seed) for run in first)
                    notes[name] = "; ".join(filter(None, (notes[name], f"{SEEDS_MARK}{seeds}, which both have")))
            else:
                notes[name] = "no seed in common with scratch"
        notes[name] = "; ".join(filter(None, (CALIBRATES.get(own_runs[0].control, ""), notes[name])))
    both = list(pairs.values())
    deltas = dict(zip(pairs, map(_means, statistics.differences(both, pooled.folds)), strict=True))
    tested = dict(zip(pairs, statistics.p_values(both, pooled), strict=True))
    tested = {name: values for name, values in tested.items() if runs[name][0].control not in CALIBRATES}
    p = np.array([tested.get(name, np.full(num_targets + 1, np.nan)) for name in runs])
    corrected = np.array([statistics.holm(column.tolist()) for column in p.T]).T
    return deltas, corrected, notes


def _means(estimate: Estimate) -> Estimate:
    """The estimate without its draws."""
    # The empty slice is copied: a view would keep the draws of the whole batch in memory.
    return replace(estimate, draws=estimate.draws[:0].copy())


def _tuned(runs: Sequence[Run]) -> str:
    """The settings that tuning chose for the seeds of a row; empty where nothing was tuned."""
    seeds: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        if run.chosen:
            split = run.record["data"].get("split", "fixed")
            seeds[run.chosen].append(f"{run.seed} fold {split.partition('@')[0]}" if "/" in split else str(run.seed))
    named = [f"{text} (seed{'s' * (len(set(own)) > 1)} {', '.join(dict.fromkeys(own))})" for text, own in seeds.items()]
    return f"tuning chose {'; '.join(named)}" if named else ""


def _collapsed(runs: Sequence[Run]) -> str:
    """The seeds whose features collapsed while pre-training ran, as far as it was probed; empty if there is none."""
    probes = [(run.seed, run.record.get("probe") or {}) for run in runs]
    seeds = dict.fromkeys(str(seed) for seed, probe in probes if probe.get("collapsed") is not None)
    return f"features collapsed in pre-training (seed{'s' * (len(seeds) > 1)} {', '.join(seeds)})" if seeds else ""


def _one_per_seed(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """One run per seed, and a note about the others.

    Of several runs of one seed, made by different versions, the run that finished last is taken.
    """
    latest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (str(run.record.get("finished", "")), run.run_id)):
        latest[run.seed] = run
    note = f"{len(runs) - len(latest)} {LEFT_OUT}" if len(latest) < len(runs) else ""
    return [latest[seed] for seed in sorted(latest)], note
