"""How fast fine-tuning learned, and whether it had converged when it ended: a comparison of runs that have not says little."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from leaderboards.records import Run

GAP = 0.1
"""A run has not converged if the soft Dice of its last training crops is this much below the Dice of its test cases.

Soft Dice is 1 minus the Dice loss, averaged over the last tenth of the steps. Training crops are easier than test cases, so
that in a converged run it is about as high as the test Dice, or higher. Early in a training the network is right more often than
it is sure, so that soft Dice is far below.
"""


def soft_dice(run: Run) -> float | None:
    """Soft Dice at the end of fine-tuning; None in records of versions before 0.5.0, which do not have it."""
    recorded = run.record.get("final_soft_dice")
    return None if recorded is None else float(recorded)


def unconverged(runs: Sequence[Run]) -> str:
    """A sentence about the runs whose fine-tuning had not converged; empty if there are none."""
    pairs = [(run, soft_dice(run)) for run in runs]
    gaps = [
        (run.seed, soft, dice)
        for run, soft in pairs
        if soft is not None and (dice := run.record["metrics"].get("average", {}).get("dice")) and dice - soft > GAP
    ]
    if not gaps:
        return ""
    early = list(dict.fromkeys(seed for seed, _, _ in gaps))
    seeds = ("seed " if len(early) == 1 else "seeds ") + ", ".join(map(str, early))
    _, soft, dice = max(gaps, key=lambda gap: gap[2] - gap[1])
    return f"not converged ({seeds}): soft Dice {soft:.2f} on the last crops, Dice {dice:.2f} on the test cases"


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
