"""How fast fine-tuning learned, and whether it had converged when it ended: a comparison of runs that have not says little."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

import numpy as np

from leaderboards.records import SHARED, Run

CONTROL = "scratch"

GAP = 0.1
"""A run has not converged if the soft Dice of its last training crops is this much below the Dice of its test cases.

Soft Dice is 1 minus the Dice loss, averaged over the last tenth of the steps. Training crops are easier than test cases, so
that in a converged run it is about as high as the test Dice, or higher. Early in a training the network is right more often than
it is sure, so that soft Dice is far below.
"""
UNLEARNED = 0.3
"""Nor has a run whose soft Dice is below this: the network does not fit its own training crops yet."""
MORE_LABELS = 4
"""How many times as many labelled cases must raise the Dice of scratch."""
LEAST_GAIN = 0.01
"""By how much they must raise it. Fine-tuning that gains less ends before it has used the labels."""
LABEL_MARK = "not converged: scratch has "


def soft_dice(run: Run) -> float | None:
    """Soft Dice at the end of fine-tuning; None in records of versions before 0.5.0, which do not have it."""
    recorded = run.record.get("final_soft_dice")
    return None if recorded is None else float(recorded)


def unconverged(runs: Sequence[Run], by_labels: str = "") -> str:
    """A sentence about the runs whose fine-tuning had not converged; empty if there are none.

    Args:
        by_labels: the sentence of `flat_in_labels` about their table, for records without soft Dice.
    """
    pairs = [(run, soft_dice(run)) for run in runs]
    if not any(run.imported or soft is not None for run, soft in pairs):
        return by_labels
    gaps = [
        (run.seed, soft, dice)
        for run, soft in pairs
        if soft is not None
        and (dice := run.record["metrics"].get("average", {}).get("dice")) is not None
        and (dice - soft > GAP or soft < UNLEARNED)
    ]
    if not gaps:
        return ""
    early = list(dict.fromkeys(seed for seed, _, _ in gaps))
    seeds = ("seed " if len(early) == 1 else "seeds ") + ", ".join(map(str, early))
    seed, soft, dice = max(gaps, key=lambda gap: gap[2] - gap[1])
    which = f" (seed {seed})" if len(early) > 1 else ""
    return f"not converged ({seeds}): soft Dice {soft:.2f} on the last crops, Dice {dice:.2f} on the test cases{which}"


def flat_in_labels(tables: Mapping[tuple[Any, ...], Mapping[tuple[str, str], Sequence[Run]]]) -> dict[Any, str]:
    """Sentences about tables in which scratch gains nothing from `MORE_LABELS` times as many labelled cases.

    The tables share everything but the labelled cases; scratch is compared over the seeds that both have. The rule is for records
    without soft Dice: it needs no more than a table does.

    Args:
        tables: runs by method and backbone, of each key of a table.

    Returns:
        a sentence for each key and backbone with such a pair.
    """
    # The numbers of labelled cases differ, and so may the way in which they were drawn.
    labels = {SHARED.index("label_fraction"), SHARED.index("label_subset")}
    curves: dict[Any, dict[Any, dict[int, Run]]] = defaultdict(dict)
    for key, rows in tables.items():
        rest = tuple(value for index, value in enumerate(key) if index not in labels)
        for (method, backbone), runs in rows.items():
            if method == CONTROL:
                curves[rest, backbone][key] = {run.seed: run for run in runs}
    sentences: dict[Any, str] = {}
    for (_, backbone), points in curves.items():
        pairs = [(*_gain(few, many), first, second) for (first, few), (second, many) in permutations(points.items(), 2)]
        # The widest pair comes last, and its sentence stays.
        for times, gain, sentence, first, second in sorted(pairs, key=lambda pair: pair[:2]):
            if times >= MORE_LABELS and gain < LEAST_GAIN:
                sentences.update({(first, backbone): sentence, (second, backbone): sentence})
    return sentences


def _gain(few: Mapping[int, Run], many: Mapping[int, Run]) -> tuple[float, float, str]:
    """Compare runs with few labelled cases and with many, over the seeds that both have.

    Returns:
        how many times as many cases there are, 0 where it is not known; by how much the mean Dice is higher; both in words.
    """
    pairs = [(few[seed].record, many[seed].record) for seed in sorted(few.keys() & many.keys())]
    numbers = [[record["data"].get("n_train") for record in pair] for pair in pairs]
    means = [[record["metrics"].get("average", {}).get("dice") for record in pair] for pair in pairs]
    if not pairs or any(not value for pair in numbers + means for value in pair):
        return 0.0, 0.0, ""
    (least, most), (low, high) = np.mean(numbers, axis=0), np.mean(means, axis=0)
    sentence = f"Dice {low:.3f} with {least:.0f} labelled cases and {high:.3f} with {most:.0f}"
    return float(most / least), float(high - low), LABEL_MARK + sentence


@dataclass(frozen=True)
class Curve:
    """Mean Dice on the validation cases while fine-tuning runs, over the seeds.

    Attributes:
        cases: their names.
        steps: at which the cases were scored, in ascending order.
        dice: at these steps.
        seconds: of pre-training and of fine-tuning up to these steps.
    """

    cases: tuple[str, ...]
    steps: tuple[int, ...]
    dice: tuple[float, ...]
    seconds: tuple[float, ...]

    def reaches(self, dice: float) -> tuple[int, float] | None:
        """The first step with this Dice or more, and its seconds; None if it is never reached."""
        points = zip(self.steps, self.dice, self.seconds, strict=True)
        return next(((step, seconds) for step, value, seconds in points if value >= dice), None)


def curve(runs: Sequence[Run]) -> Curve | None:
    """The curve of runs; None where a run has none, or runs were scored at different steps or on different cases."""
    validations = [run.record.get("validation", {}) for run in runs]
    points = [each.get("curve", []) for each in validations]
    steps = {tuple(step for step, _ in each) for each in points}
    cases = {tuple(each.get("cases", [])) for each in validations}
    if len(steps) != 1 or len(cases) != 1 or not (own := steps.pop()):
        return None
    dice = np.mean([[value for _, value in each] for each in points], axis=0)
    timing = [run.record["timing"]["seconds"] for run in runs]
    before = float(np.mean([each.get("pretrain", 0) + each.get("method_prepare", 0) for each in timing]))
    finetune = float(np.mean([each.get("finetune", 0) for each in timing]))
    return Curve(cases.pop(), own, tuple(map(float, dice)), tuple(before + finetune * step / own[-1] for step in own))
