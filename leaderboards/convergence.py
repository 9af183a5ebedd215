"""Whether fine-tuning had converged when it ended: a comparison of runs that have not says little."""

import json
from collections.abc import Sequence
from typing import Any

from leaderboards.records import Run

GAP = 0.1
"""A run has not converged if the soft Dice of its last training crops is this much below the Dice of its test cases.

Soft Dice is 1 minus the Dice loss, averaged over the last tenth of the steps. Training crops are easier than test cases, so
that in a converged run it is about as high as the test Dice, or higher. Early in a training the network is right more often than
it is sure, so that soft Dice is far below.
"""


def soft_dice(run: Run) -> float | None:
    """Soft Dice at the end of fine-tuning, from the record, or else from the history; None where neither has it."""
    recorded = run.record.get("final_soft_dice")
    return float(recorded) if recorded is not None else _from_history(run)


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
    seeds = ("seed " if len(gaps) == 1 else "seeds ") + ", ".join(str(seed) for seed, _, _ in gaps)
    _, soft, dice = max(gaps, key=lambda gap: gap[2] - gap[1])
    return f"not converged ({seeds}): soft Dice {soft:.2f} on the last crops, Dice {dice:.2f} on the test cases"


def _from_history(run: Run) -> float | None:
    """Soft Dice at the end of fine-tuning from `history.jsonl`; None if there is none, or it is not readable."""
    path = run.folder / "history.jsonl"
    if not path.is_file():
        return None
    losses = []
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            step: Any = json.loads(line)
            if step["stage"] == "finetune":
                losses.append(float(step["terms"]["dice"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # a foreign file: the mark is an extra, the table does not depend on it
    last = losses[-max(1, len(losses) // 10) :]
    return 1 - sum(last) / len(last) if last else None
