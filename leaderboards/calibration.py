"""What the calibration controls say about a table: how much there was to gain, and whether luck is taken for a benefit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from leaderboards import statistics
from leaderboards.statistics import Values

if TYPE_CHECKING:
    from leaderboards.board import Group

Interval = tuple[float, float, float]
"""Value, lower end, upper end."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of the rows of one backbone, in Dice averaged over targets.

    Attributes:
        positive: the method of the positive control, of several the one with the largest gain; empty without one.
        headroom: what it gains over `scratch`; None without both.
        luck: method of each negative control -> its difference from `scratch`.
        shares: method -> its share of the headroom; empty where the headroom is not above its interval.
    """

    backbone: str
    positive: str = ""
    headroom: Interval | None = None
    luck: dict[str, Interval] = field(default_factory=dict)
    shares: dict[str, Interval] = field(default_factory=dict)

    @property
    def insensitive(self) -> bool:
        """Whether labels for all training cases gained nothing, so that no method can show a benefit."""
        return self.headroom is not None and self.headroom[1] <= 0

    @property
    def miscalibrated(self) -> list[str]:
        """The negative controls whose initial values alone make a difference that the interval does not cover."""
        return [method for method, (_, low, high) in self.luck.items() if low > 0 or high < 0]

    def sentences(self) -> list[str]:
        """What a reader must know, one sentence each. Without an interval nothing can be said."""
        said = []
        if self.headroom is not None and np.isfinite(self.headroom).all():
            text = f"headroom {interval_text(self.headroom, '+.4f')} ({self.positive} minus scratch)"
            said.append(
                f"{self.backbone}: INSENSITIVE, {text} is not above 0: this table cannot show the benefit of any method"
                if self.insensitive
                else f"{self.backbone}: {text}: what a pre-training that has all labels gains"
            )
        for method, interval in self.luck.items():
            text = f"{method} minus scratch is {interval_text(interval, '+.4f')}"
            if method in self.miscalibrated:
                said.append(
                    f"{self.backbone}: MIS-CALIBRATED, {text}, although only the initial values differ: the intervals are too "
                    "narrow"
                )
            elif np.isfinite(interval).all():
                said.append(f"{self.backbone}: {text}: luck, as it must be")
        return said


def calibrate(groups: Sequence["Group"], pooled: statistics.Luck) -> list[Calibration]:
    """The calibration of each backbone that has scratch and a control for it, with two seeds in common or more.

    Args:
        groups: the rows of a table.
        pooled: the variance over seeds in this table.
    """
    calibrations = []
    for backbone in dict.fromkeys(group.backbone for group in groups):
        rows = [group for group in groups if group.backbone == backbone]
        scratch = next((_by_seed(group) for group in rows if group.is_control), None)
        if scratch is None:
            continue
        compared = [
            group
            for group in rows
            if group.delta is not None and len(_by_seed(group).keys() & scratch.keys()) >= statistics.MIN_SEEDS_TEST
        ]
        positives = [group for group in compared if group.control == "positive"]
        luck = {group.method: _difference(group) for group in compared if group.control == "negative"}
        positive = max(positives, key=lambda group: _difference(group)[0], default=None)
        if positive is None and not luck:
            continue
        headroom = None if positive is None else _difference(positive)
        calibration = Calibration(backbone, "" if positive is None else positive.method, headroom, luck)
        if positive is not None and headroom is not None and headroom[1] > 0:
            calibration.shares.update(_shares(rows, scratch, _by_seed(positive), pooled))
        calibrations.append(calibration)
    return calibrations


def interval_text(interval: Interval, form: str) -> str:
    """An interval as text."""
    value, low, high = interval
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


def share_text(share: Interval | None) -> str:
    """A share of the headroom in percent with its interval; a hyphen for None."""
    if share is None:
        return "-"
    value, low, high = share
    if np.isnan([low, high]).any():
        return f"{value:.0%}"
    return f"{value:.0%} [{low:.0%}, {high:.0%}]" if np.isfinite([low, high]).all() else f"{value:.0%} [unbounded]"


def _difference(group: "Group") -> Interval:
    """The difference of a row from scratch in the average Dice."""
    assert group.delta is not None
    return float(group.delta.mean[-1]), float(group.delta.low[-1]), float(group.delta.high[-1])


def _by_seed(group: "Group") -> dict[int, Values]:
    """Dice (cases, targets) of each seed of a row."""
    return {run.seed: run.dice for run in group.runs}


def _shares(
    rows: Sequence["Group"], scratch: dict[int, Values], positive: dict[int, Values], pooled: statistics.Luck
) -> dict[str, Interval]:
    """The share of the headroom that each method gains which has all seeds of the headroom."""
    seeds, shares = sorted(scratch.keys() & positive.keys()), {}
    for group in rows:
        own = _by_seed(group)
        if not group.is_control and group.is_ranked and own.keys() >= set(seeds):
            first, base, best = (np.stack([side[seed] for seed in seeds]) for side in (own, scratch, positive))
            shares[group.method] = statistics.share(first, base, best, pooled)
    return shares
