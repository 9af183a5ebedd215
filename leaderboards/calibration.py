"""What the calibration controls say about a table: how much there was to gain, and whether luck is taken for a benefit."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from leaderboards import statistics

if TYPE_CHECKING:
    from leaderboards.board import Group

UNTRAINED = "untrained"
Interval = tuple[float, float, float]
"""Value, lower end, upper end."""


@dataclass(frozen=True)
class Calibration:
    """The calibration of the rows of one backbone, in Dice averaged over targets.

    Attributes:
        headroom: `supervised` minus `scratch`; None without one of them.
        luck: `untrained` minus `scratch`; None without one of them.
        shares: name of a method -> its share of the headroom; empty where the headroom is not above its interval.
    """

    backbone: str
    headroom: Interval | None = None
    luck: Interval | None = None
    shares: dict[str, Interval] = field(default_factory=dict)

    @property
    def insensitive(self) -> bool:
        """Whether labels for all training cases gained nothing, so that no method can show a benefit."""
        return self.headroom is not None and self.headroom[1] <= 0

    @property
    def miscalibrated(self) -> bool:
        """Whether other initial values alone make a difference that the interval does not cover."""
        return self.luck is not None and (self.luck[1] > 0 or self.luck[2] < 0)

    def sentences(self) -> list[str]:
        """What a reader must know, one sentence each. Without an interval nothing can be said."""
        said = []
        if self.headroom is not None and np.isfinite(self.headroom).all():
            text = f"headroom {interval_text(self.headroom, '+.4f')} (supervised minus scratch)"
            said.append(
                f"{self.backbone}: INSENSITIVE, {text} is not above 0: this table cannot show the benefit of any method"
                if self.insensitive
                else f"{self.backbone}: {text}: what a pre-training that has all labels gains"
            )
        if self.luck is not None and np.isfinite(self.luck).all():
            text = f"untrained minus scratch is {interval_text(self.luck, '+.4f')}"
            said.append(
                f"{self.backbone}: MIS-CALIBRATED, {text}, although only the initial values differ: the intervals are too narrow"
                if self.miscalibrated
                else f"{self.backbone}: {text}: luck, as it must be"
            )
        return said


def calibrate(groups: Sequence["Group"], pooled: statistics.Luck) -> list[Calibration]:
    """The calibration of each backbone that has a control for it.

    Args:
        groups: the rows of a table.
        pooled: the variance over seeds in this table.
    """
    calibrations = []
    for backbone in dict.fromkeys(group.backbone for group in groups):
        rows = [group for group in groups if group.backbone == backbone]
        headroom = next((_difference(group) for group in rows if group.uses_labels and group.delta), None)
        luck = next((_difference(group) for group in rows if group.is_untrained and group.delta), None)
        if headroom is None and luck is None:
            continue
        calibration = Calibration(backbone, headroom, luck)
        if headroom is not None and headroom[1] > 0:
            calibration.shares.update(_shares(rows, pooled))
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
    return f"{value:.0%}" if np.isnan(low) or np.isnan(high) else f"{value:.0%} [{low:.0%}, {high:.0%}]"


def _difference(group: "Group") -> Interval:
    """The difference of a row from scratch in the average Dice."""
    assert group.delta is not None
    return float(group.delta.mean[-1]), float(group.delta.low[-1]), float(group.delta.high[-1])


def _shares(rows: Sequence["Group"], pooled: statistics.Luck) -> dict[str, Interval]:
    """The share of the headroom that each method gains, over the seeds that it, scratch and `supervised` have."""
    by_seed = {group.method: {run.seed: run.dice for run in group.runs} for group in rows}
    control = next(by_seed[group.method] for group in rows if group.is_control)
    positive = next(by_seed[group.method] for group in rows if group.uses_labels)
    shares = {}
    for group in rows:
        if group.is_control or group.is_calibration:
            continue
        own = by_seed[group.method]
        seeds = sorted(own.keys() & control.keys() & positive.keys())
        if seeds:
            first, base, best = (np.stack([side[seed] for seed in seeds]) for side in (own, control, positive))
            shares[group.method] = statistics.share(first, base, best, pooled)
    return shares
